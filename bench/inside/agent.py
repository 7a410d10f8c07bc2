# SPDX-License-Identifier: MIT
"""The guest protocol with blocking sockets: what a bare VMM's user needs of it, and the guest's clocks."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Final

from banger.contract import guest, names

KNOCK_S: Final = 0.005
REPLY_S: Final = 30.0
F = guest.FrameType
T = guest.Tag


@dataclass(frozen=True, slots=True)
class Agent:
    """The agent behind one Firecracker's vsock socket; every request has its own connection."""

    vsock: str

    def wait(self, deadline_s: float) -> None:
        """Knocks until the agent reports its health, as banger does. Raises TimeoutError."""
        until = time.monotonic() + deadline_s
        while time.monotonic() < until:
            try:
                self.ask(F.HEALTH)
                return
            except OSError:
                time.sleep(KNOCK_S)
        raise TimeoutError(f"no agent behind {self.vsock} within {deadline_s:g} s")

    def ask(self, kind: guest.FrameType) -> guest.Fields:
        with self._connected() as link:
            link.sendall(guest.frame(kind))
            answer, payload = _receive(link)
            if answer != F.REPLY:
                raise RuntimeError(f"the agent answered {kind.name} with frame {answer:#x}")
            return guest.Fields(payload)

    def run(self, *argv: str) -> bytes:
        """Its stdout; raises RuntimeError unless it ends with 0."""
        output = b""
        with self._connected() as link:
            link.sendall(guest.request(F.EXEC, guest.exec_payload(guest.ExecSpec(argv), stdin=False)))
            while True:
                kind, payload = _receive(link)
                if kind == F.STDOUT:
                    output += payload
                elif kind == F.EXIT:
                    fields = guest.Fields(payload)
                    if fields.number(T.EXIT_KIND) or fields.number(T.EXIT_CODE):
                        raise RuntimeError(f"{argv}: status {fields.number(T.EXIT_CODE)}")
                    return output
                elif kind == F.ERROR:
                    raise RuntimeError(guest.Fields(payload).text(T.MESSAGE))

    def init_began(self) -> float:
        """When init mounted /run, which ends the first thing it does: seconds on this host's clock."""
        asked = time.time()
        there = self.ask(F.TIME).number(T.REALTIME_NS) / 1e9
        ahead_s = there - (asked + time.time()) / 2
        return float(self.run("stat", "--format=%.W", "/run")) - ahead_s

    def _connected(self) -> socket.socket:
        """After both hellos. Raises OSError while nobody listens in the guest."""
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            link.settimeout(REPLY_S)
            link.connect(self.vsock)
            link.sendall(f"CONNECT {names.AGENT_PORT}\n".encode() + guest.hello())
            while (byte := link.recv(1)) != b"\n":
                if not byte:
                    raise ConnectionError("nobody listens in the guest")
            if _receive(link)[0] != F.HELLO:
                raise RuntimeError("the agent did not say hello")
        except BaseException:
            link.close()
            raise
        return link


def _receive(link: socket.socket) -> tuple[int, bytes]:
    kind, size = guest.parse_header(_exactly(link, guest.HEADER.size))
    return kind, _exactly(link, size)


def _exactly(link: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = link.recv(size - len(data))
        if not part:
            raise ConnectionError("the agent closed the connection")
        data += part
    return bytes(data)
