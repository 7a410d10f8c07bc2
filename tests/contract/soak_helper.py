# SPDX-License-Identifier: MIT
"""bangerd-root in the soak: the real server with its wire, its locks and its record.

Its operations are asked of the fake world, which lives in the test's process and survives it.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec

from banger.contract import errors, privileged
from banger.helper import operations as privileged_operations
from banger.helper import policy as policies
from banger.helper import server as helper_server
from tests.contract.soak_control import Start, control_socket, held, world_socket

_LENGTH = struct.Struct("!I")


def _helper(start: Start) -> None:
    top = Path(start.top)

    def ask(policy: policies.Policy, request: privileged.Request[Any]) -> Any:
        del policy
        envelope = msgspec.json.encode({"request": request, "op_id": ""})
        with socket.socket(socket.AF_UNIX) as wire:
            wire.settimeout(30)
            wire.connect(str(world_socket(top)))
            wire.sendall(_LENGTH.pack(len(envelope)) + envelope)
            with wire.makefile("rb") as answer:
                head = answer.read(_LENGTH.size)
                if len(head) < _LENGTH.size:
                    raise OSError("the kernel fell over an injected fault")
                reply = msgspec.json.decode(answer.read(_LENGTH.unpack(head)[0]), type=privileged.Reply)
        if reply.error is not None:
            raise errors.from_body(reply.error)
        return reply.result

    for kind in privileged_operations.OPERATIONS:
        privileged_operations.OPERATIONS[kind] = ask
    policy = policies.Policy(
        owner_uid=os.getuid(),
        owner_gid=os.getgid(),
        owner_name="soak",
        helper_dir=str(top / "h"),
        firecracker_sha256="0" * 64,
        jailer_sha256="0" * 64,
    )
    threading.Thread(target=_obey, args=(control_socket(top, "helper"),), daemon=True).start()
    helper_server.Server(policy, socket.socket(fileno=start.listener)).serve()


def _obey(path: Path) -> None:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.recv(64)
                connection.sendall(msgspec.json.encode(held()))


if __name__ == "__main__":
    _helper(msgspec.json.decode(sys.argv[1], type=Start))
