# SPDX-License-Identifier: MIT
"""Runs inside the lab as the owner: asks the helper what stands on stdin, a JSON list of requests a line.

Prints a line for each: the list of the replies as they came from the helper, up to the first error.
"""

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from banger.contract import errors, privileged
from banger.owner import helper
from banger.system import host


async def batch(requests: Sequence[privileged.Request[Any]]) -> list[privileged.Reply]:
    client = helper.Client(host.HELPER_SOCKET, op_id=lambda: "lab-test")
    replies: list[privileged.Reply] = []
    for request in requests:
        try:
            replies.append(privileged.Reply(result=await client.call(request)))
        except errors.BangerError as error:
            return [*replies, privileged.Reply(error=errors.to_body(error))]
    return replies


for line in sys.stdin:
    asked = msgspec.json.decode(line, type=list[privileged.AnyRequest])
    print(msgspec.json.encode(asyncio.run(batch(asked))).decode(), flush=True)
