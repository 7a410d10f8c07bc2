# SPDX-License-Identifier: MIT
"""What a VMM's sockets must do, as data and as a program of the standard library alone: the lab runs it too.

`python3 vmm_cases.py VSOCK API` waits until the agent in the guest answers, plays the cases, prints JSON.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import time

GREETS = re.compile(rb"^OK [0-9]+\n$")
HANDSHAKES: dict[str, tuple[bytes, bool]] = {
    "the agent's port": (b"CONNECT 1023\n", True),
    "the port of its pulse": (b"CONNECT 1021\n", True),
    "a port nobody listens on": (b"CONNECT 1022\n", False),
    "no such word": (b"HELLO 1023\n", False),
    "no port": (b"CONNECT\n", False),
    "a port that is no number": (b"CONNECT agent\n", False),
}
"""What is said first on the vsock socket, and whether the VMM joins us with the guest or hangs up."""


def shake(path: str, data: bytes) -> bytes:
    """The first line of the answer; empty when the VMM hangs up."""
    with socket.socket(socket.AF_UNIX) as wire:
        wire.settimeout(30)
        wire.connect(path)
        wire.sendall(data)
        answer = b""
        while not answer.endswith(b"\n"):
            try:
                part = wire.recv(1)
            except ConnectionResetError:
                break
            if not part:
                break
            answer += part
        return answer


def play(vsock: str) -> dict[str, bool]:
    """By case: whether the VMM joined us with the guest."""
    return {name: bool(GREETS.match(shake(vsock, said))) for name, (said, _) in HANDSHAKES.items()}


def wait_for_agent(vsock: str, deadline_s: float) -> None:
    deadline = time.monotonic() + deadline_s
    while not GREETS.match(shake(vsock, b"CONNECT 1023\n")):
        if time.monotonic() > deadline:
            raise TimeoutError("the agent never answered")
        time.sleep(0.1)


def held_open(path: str, for_s: float) -> bool:
    """An idle connection to the API socket stays: its end is how the daemon learns of the VMM's."""
    with socket.socket(socket.AF_UNIX) as wire:
        wire.settimeout(for_s)
        wire.connect(path)
        try:
            wire.recv(1)
        except TimeoutError:
            return True
        return False


if __name__ == "__main__":
    vsock_path, api_path = sys.argv[1:]
    wait_for_agent(vsock_path, 90)
    print(json.dumps({"handshakes": play(vsock_path), "api_held_open": held_open(api_path, 2)}))
