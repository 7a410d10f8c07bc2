# SPDX-License-Identifier: MIT
"""A server of the web on the loopback, which keeps the heads of what it was asked.

As a proxy it answers for everybody, and tunnels to itself.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Final

BODY: Final = b"what was there"
_ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"


class Origin:
    """Answers each connection's first request, or as a proxy the one in the tunnel too, and hangs up."""

    def __init__(self, tunnel: bytes = b"HTTP/1.1 200 Fine\r\n\r\n") -> None:
        self.heads: list[bytes] = []
        self._tunnel = tunnel
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(ConnectionError):  # it may be cut off
                connection.settimeout(10)
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        head = self._head(connection)
        if head.startswith(b"CONNECT "):
            connection.sendall(self._tunnel)
            if not self._tunnel.endswith(b"200 Fine\r\n\r\n"):
                return
            head = self._head(connection)
        if head:
            connection.sendall(_ANSWER % len(BODY) + (b"" if head.startswith(b"HEAD ") else BODY))

    def _head(self, connection: socket.socket) -> bytes:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            piece = connection.recv(1)
            if not piece:
                return b""
            head += piece
        self.heads.append(head)
        return head


class Scripted:
    """Each list is a connection's answers, to one request after the other; at its end it hangs up."""

    def __init__(self, *scripts: list[bytes]) -> None:
        self.heads: list[bytes] = []
        self.connections = 0
        self._scripts = scripts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(10)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def play(self) -> None:
        for script in self._scripts:
            with contextlib.suppress(OSError):  # a test may be over before its script is
                self._play(script)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _play(self, script: list[bytes]) -> None:
        connection, _ = self._listener.accept()
        self.connections += 1
        with connection, connection.makefile("rb") as asked:
            connection.settimeout(10)
            for answer in script:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    line = asked.readline()
                    if not line:
                        return
                    head += line
                self.heads.append(head)
                connection.sendall(answer)


@contextlib.contextmanager
def scripted(*scripts: list[bytes]) -> Iterator[Scripted]:
    made = Scripted(*scripts)
    thread = threading.Thread(target=made.play)
    thread.start()
    try:
        yield made
    finally:
        made.close()
        thread.join()
