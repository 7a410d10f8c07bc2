# SPDX-License-Identifier: MIT
"""Runs inside the lab as the owner: asks the helper what stands on stdin, one JSON request a line.

Prints one reply a line, as it came from the helper, and ends at the first error.
"""

import asyncio
import sys

import msgspec

from banger.contract import errors, privileged
from banger.owner import helper


async def main() -> int:
    client = helper.Client(op_id=lambda: "lab-test")
    for line in sys.stdin:
        request = msgspec.json.decode(line, type=privileged.AnyRequest)
        try:
            result = await client.call(request)
        except errors.BangerError as error:
            print(msgspec.json.encode(privileged.Reply(error=errors.to_body(error))).decode(), flush=True)
            return 1
        print(msgspec.json.encode(privileged.Reply(result=result)).decode(), flush=True)
    return 0


sys.exit(asyncio.run(main()))
