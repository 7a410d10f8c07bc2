# SPDX-License-Identifier: MIT
"""The daemon's API over its unix socket, typed: answers are decoded strictly, errors are BangerErrors.

Used by the commands; nothing here prints.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
from collections.abc import Iterator
from typing import Final, TypeVar
from urllib import parse

import msgspec

from banger.contract import errors, resources

T = TypeVar("T")

ANSWER_S: Final = 60.0
CANCEL_S: Final = 600.0
"""A cancelled operation answers when it has been rolled back."""
_MAX_SOCKET_PATH: Final = 107
_MAX_LINE: Final = 4 << 20
_START_HINT: Final = "see `systemctl status bangerd`; on a new host run `sudo banger system install`"


class _UnixConnection(http.client.HTTPConnection):
    """http.client needs only a connected socket; the host name is for the Host header."""

    def __init__(self, path: str, timeout_s: float | None) -> None:
        super().__init__("banger", timeout=timeout_s)
        self._path = path
        self._limit_s = timeout_s

    def connect(self) -> None:
        self.sock = connect(self._path, self._limit_s)


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
    return errors.UnavailableError(f"bangerd does not answer on {path}: {why}", hint=_START_HINT)


def failure(body: errors.ErrorBody) -> errors.BangerError:
    """The daemon's error, with the operation and step it names."""
    error = errors.from_body(body)
    error.fields |= {name: value for name, value in (("op_id", body.op_id), ("step", body.step)) if value}
    return error


def query(path: str, **parameters: str) -> str:
    return f"{path}?{parse.urlencode(parameters)}" if parameters else path


def segment(ref: str) -> str:
    """A reference as one segment of a path, whatever it holds."""
    quoted = parse.quote(ref, safe="")
    if quoted in {"", ".", ".."}:
        raise errors.BadRequestError(f"{ref!r} is not a name")
    return quoted


class _Named(msgspec.Struct, frozen=True):
    name: str


class Client:
    """One connection per request: the socket is local, and a watched operation holds one for minutes."""

    def __init__(self, path: str) -> None:
        self.path = path

    def get(self, path: str, kind: type[T], *, timeout_s: float = ANSWER_S) -> T:
        return decode(self._ask("GET", path, None, timeout_s), kind)

    def names(self, path: str, *, timeout_s: float) -> list[str]:
        """Of a collection's members, without the rest."""
        return [item.name for item in self.get(path, list[_Named], timeout_s=timeout_s)]

    def post(self, path: str, body: resources.Body | None = None) -> resources.Operation:
        return decode(self._ask("POST", path, body, ANSWER_S), resources.Operation)

    def ask(self, path: str, body: resources.Body, kind: type[T]) -> T:
        """A POST that answers at once."""
        return decode(self._ask("POST", path, body, ANSWER_S), kind)

    def patch(self, path: str, body: resources.Body, kind: type[T]) -> T:
        return decode(self._ask("PATCH", path, body, ANSWER_S), kind)

    def delete(self, path: str, *, timeout_s: float = ANSWER_S) -> resources.Operation | None:
        """None when there was nothing long to do."""
        data = self._ask("DELETE", path, None, timeout_s)
        return decode(data, resources.Operation) if data.strip() not in {b"", b"null"} else None

    def cancel(self, operation_id: str) -> resources.Operation:
        """Answers when the operation has ended and everything it made is taken back."""
        data = self._ask("DELETE", f"/v1/operations/{operation_id}", None, CANCEL_S)
        return decode(data, resources.Operation)

    def events(self, operation_id: str, *, cancel_on_disconnect: bool = False) -> Iterator[resources.Event]:
        """Every event of an operation from its first; ends after the one of kind `end`."""
        path = f"/v1/operations/{operation_id}/events"
        if cancel_on_disconnect:
            path = query(path, cancel_on_disconnect="true")
        with self.stream(path) as response:
            for data in _sse(response):
                event = decode(data, resources.Event)
                yield event
                if event.kind == "end":
                    return

    @contextlib.contextmanager
    def stream(self, path: str) -> Iterator[http.client.HTTPResponse]:
        """An answer of unknown length, read as it comes and without a deadline."""
        connection = _UnixConnection(self.path, ANSWER_S)
        with contextlib.closing(connection):
            with _spoken():
                response = _send(connection, "GET", path, None)
                _check(response)
            connection.sock.settimeout(None)
            with _spoken(reading=True):
                yield response

    def upgrade(self, path: str, headers: dict[str, str]) -> tuple[socket.socket, dict[str, str], bytes]:
        """The socket of an accepted protocol upgrade, the answer's headers, and what was read too far."""
        connection = _UnixConnection(self.path, ANSWER_S)
        with contextlib.ExitStack() as undo, _spoken():
            undo.callback(connection.close)
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            if response.status != http.client.SWITCHING_PROTOCOLS:
                _check(response)
                raise errors.ProtocolError(f"bangerd answered {response.status} instead of an upgrade")
            taken = connection.sock
            taken.setblocking(False)
            ahead = response.fp.peek()
            undo.pop_all()
        connection.sock = None  # http.client's own word for "not connected"
        return taken, {name.lower(): value for name, value in response.getheaders()}, ahead

    def _ask(self, method: str, path: str, body: resources.Body | None, timeout_s: float) -> bytes:
        with contextlib.closing(_UnixConnection(self.path, timeout_s)) as connection, _spoken():
            response = _send(connection, method, path, body)
            _check(response)
            return response.read()


def _send(
    connection: _UnixConnection, method: str, path: str, body: resources.Body | None
) -> http.client.HTTPResponse:
    data = None if body is None else msgspec.json.encode(body)
    headers = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(method, path, body=data, headers=headers)
    return connection.getresponse()


@contextlib.contextmanager
def _spoken(*, reading: bool = False) -> Iterator[None]:
    """What goes wrong with the connection, as errors of ours."""
    try:
        yield
    except TimeoutError as error:
        text = "bangerd took the request and did not answer in time"
        raise errors.DeadlineError(text, hint="see `journalctl -u bangerd`") from error
    except (http.client.HTTPException, ConnectionError) as error:
        if reading and isinstance(error, BrokenPipeError):
            raise  # who reads does not write to the daemon: it is our own output that is gone
        text = f"the connection to bangerd was lost: {str(error) or type(error).__name__}"
        raise errors.UnavailableError(text, hint=_START_HINT) from error


def _check(response: http.client.HTTPResponse) -> None:
    if response.status < 400:
        return
    data = response.read()
    try:
        body = msgspec.json.decode(data, type=errors.ErrorBody)
    except msgspec.DecodeError:
        text = f"bangerd answered {response.status} {response.reason}"
        raise errors.ProtocolError(text, hint="does something else listen on this socket?") from None
    raise failure(body)


def decode(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        hint = "is bangerd of another version? `banger version` shows both"
        raise errors.ProtocolError(f"bangerd's answer makes no sense: {error}", hint=hint) from error


def _sse(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The `data` of each server-sent event; comments, ids and event names are not used."""
    data: list[bytes] = []
    while line := response.readline(_MAX_LINE):
        text = line.rstrip(b"\r\n")
        if not text and data:
            yield b"\n".join(data)
            data = []
        elif text.startswith(b"data:"):
            data.append(text[5:].removeprefix(b" "))
