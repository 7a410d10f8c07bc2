# SPDX-License-Identifier: MIT
"""One HTTP request over the daemon's unix socket. httptools reads the answer.

The standard library's client would load a parser of mail and all of TLS first, which a short command feels.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from typing import Final

import httptools

from banger.contract import errors

START_HINT: Final = "see `systemctl status bangerd`; on a new host run `sudo banger system install`"
_MAX_SOCKET_PATH: Final = 107
_READ_BYTES: Final = 64 * 1024
_TARGET: Final = "/[!-~]*"
"""Nothing that would end the line; `client.segment` and `client.query` quote the rest."""


def connect(path: str, timeout_s: float | None) -> socket.socket:
    """A connected stream socket, or the error that says why there is none."""
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise errors.BadRequestError(f"socket path {path} is longer than {_MAX_SOCKET_PATH} bytes")
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.settimeout(timeout_s)
        made.connect(path)
    except OSError as error:
        made.close()
        raise _unreachable(path, error) from error
    return made


def _unreachable(path: str, error: OSError) -> errors.BangerError:
    if isinstance(error, PermissionError):
        hint = "only the owner that `banger system install` recorded, and root, may use it"
        return errors.UnauthorizedError(f"you may not use {path}: permission denied", hint=hint)
    why = "no such socket" if isinstance(error, FileNotFoundError) else str(error.strerror or error)
    return errors.UnavailableError(f"bangerd does not answer on {path}: {why}", hint=START_HINT)


class Answer:
    """The answer to one request; the head is there, `pieces` and `lines` read the rest as it comes."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._head = _Head()
        self._parser = httptools.HttpResponseParser(self._head)
        self._ahead = b""
        while not self._head.is_whole:
            self._read()
        self.status: int = self._parser.get_status_code()
        self.reason = self._head.reason.decode("latin-1")
        self.headers = self._head.headers

    def whole(self) -> bytes:
        return b"".join(self.pieces())

    def pieces(self) -> Iterator[bytes]:
        """The body, as it comes."""
        while True:
            held, self._head.body = self._head.body, []
            yield from held
            if self._head.is_ended:
                return
            self._read()

    def lines(self, limit: int) -> Iterator[bytes]:
        """The body by lines, with their ends; one longer than `limit` bytes comes in parts."""
        held = b""
        for piece in self.pieces():
            *whole, held = (held + piece).split(b"\n")
            yield from (line + b"\n" for line in whole)
            if len(held) >= limit:
                yield held
                held = b""
        if held:
            yield held

    def wait_without_limit(self) -> None:
        """From now on the next piece may take as long as it likes."""
        self._socket.settimeout(None)

    def taken(self) -> tuple[socket.socket, bytes]:
        """After a switch of protocols: the socket, which is the caller's now, and what was read too far."""
        return socket.socket(fileno=self._socket.detach()), self._ahead

    def _read(self) -> None:
        data = self._socket.recv(_READ_BYTES)
        if not data:
            raise ConnectionResetError("it ended within an answer")
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as switch:
            self._ahead = data[switch.args[0] :]


class _Head:
    """What httptools calls as it reads: the head of an answer, and the pieces of its body not yet taken."""

    def __init__(self) -> None:
        self.reason = b""
        self.headers: dict[str, str] = {}
        self.body: list[bytes] = []
        self.is_whole = False
        self.is_ended = False

    def on_status(self, reason: bytes) -> None:
        self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.is_whole = True

    def on_body(self, data: bytes) -> None:
        self.body.append(data)

    def on_message_complete(self) -> None:
        self.is_ended = True


@contextlib.contextmanager
def asked(
    path: str,
    method: str,
    target: str,
    *,
    headers: dict[str, str],
    body: bytes = b"",
    timeout_s: float,
) -> Iterator[Answer]:
    """The answer to one request on a connection of its own, closed when the block ends unless it was taken.

    Raises OSError and httptools.HttpParserError for what goes wrong on the way.
    """
    if not re.fullmatch(_TARGET, target):
        raise errors.BadRequestError(f"{target!r} is not a path of the API")
    head = {"Host": "banger", "Content-Length": str(len(body)), **headers}
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
    with contextlib.closing(connect(path, timeout_s)) as connected:
        connected.sendall("\r\n".join(lines).encode() + body)
        yield Answer(connected)
