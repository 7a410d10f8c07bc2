# SPDX-License-Identifier: MIT
"""The daemon's API over its unix socket, typed: answers are decoded strictly, errors are BangerErrors.

Used by the commands; nothing here prints. The resources are loaded where they are decoded: completing a name
needs none of them.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import httptools
import msgspec

from banger.cli import connection
from banger.contract import decoding, errors

if TYPE_CHECKING:
    from banger.contract import resources

T = TypeVar("T")

ANSWER_S: Final = 60.0
CANCEL_S: Final = 600.0
"""A cancelled operation answers when it has been rolled back."""
SWITCHING_PROTOCOLS: Final = 101
_MAX_LINE: Final = 4 << 20


def failure(body: errors.ErrorBody) -> errors.BangerError:
    """The daemon's error, with the operation and step it names."""
    error = errors.from_body(body)
    error.fields |= {name: value for name, value in (("op_id", body.op_id), ("step", body.step)) if value}
    return error


@contextlib.contextmanager
def _text() -> Iterator[None]:
    """What a user types may be any bytes, and what the API is told is Unicode."""
    try:
        yield
    except UnicodeEncodeError as error:
        shown = error.object.encode(errors="surrogateescape").decode(errors="backslashreplace")
        raise errors.BadRequestError(
            f"{shown} is not UTF-8, and bangerd is told nothing else",
            hint="any bytes may come on stdin, and be names in a directory that is copied",
        ) from None


def require_text(*words: str) -> None:
    """Raises BadRequestError for a word that is not UTF-8, before anything is made that it is for."""
    with _text():
        for word in words:
            word.encode()


def encoded(body: resources.Body) -> bytes:
    """As JSON. Raises BadRequestError for a word that is not UTF-8."""
    with _text():
        return msgspec.json.encode(body)


def query(path: str, **parameters: str) -> str:
    from urllib import parse

    with _text():
        return f"{path}?{parse.urlencode(parameters)}" if parameters else path


def segment(ref: str) -> str:
    """A reference as one segment of a path, whatever it holds."""
    from urllib import parse

    with _text():
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
        return _operation(self._ask("POST", path, body, ANSWER_S))

    def ask(self, path: str, body: resources.Body, kind: type[T]) -> T:
        """A POST that answers at once."""
        return decode(self._ask("POST", path, body, ANSWER_S), kind)

    def patch(self, path: str, body: resources.Body, kind: type[T]) -> T:
        return decode(self._ask("PATCH", path, body, ANSWER_S), kind)

    def delete(self, path: str, *, timeout_s: float = ANSWER_S) -> resources.Operation | None:
        """None when there was nothing long to do."""
        data = self._ask("DELETE", path, None, timeout_s)
        return _operation(data) if data.strip() not in {b"", b"null"} else None

    def cancel(self, operation_id: str) -> resources.Operation:
        """Answers when the operation has ended and everything it made is taken back."""
        data = self._ask("DELETE", f"/v1/operations/{operation_id}", None, CANCEL_S)
        return _operation(data)

    def events(self, operation_id: str, *, cancel_on_disconnect: bool = False) -> Iterator[resources.Event]:
        """Every event of an operation from its first; ends after the one of kind `end`."""
        from banger.contract import resources

        path = f"/v1/operations/{operation_id}/events"
        if cancel_on_disconnect:
            path = query(path, cancel_on_disconnect="true")
        with self.stream(path) as answer:
            for data in _sse(answer):
                event = decode(data, resources.Event)
                yield event
                if event.kind == "end":
                    return

    @contextlib.contextmanager
    def stream(self, path: str) -> Iterator[connection.Answer]:
        """An answer of unknown length, read as it comes and without a deadline."""
        with contextlib.ExitStack() as held:
            with _spoken():
                answer = held.enter_context(self._answer("GET", path, {}, b"", ANSWER_S))
            answer.wait_without_limit()
            with _spoken(reading=True):
                yield answer

    def upgrade(self, path: str, headers: dict[str, str]) -> tuple[socket.socket, dict[str, str], bytes]:
        """The socket of an accepted protocol upgrade, the answer's headers, and what was read too far."""
        with _spoken(), self._answer("GET", path, headers, b"", ANSWER_S) as answer:
            if answer.status != SWITCHING_PROTOCOLS:
                raise errors.ProtocolError(f"bangerd answered {answer.status} instead of an upgrade")
            taken, ahead = answer.taken()
            taken.setblocking(False)
            return taken, answer.headers, ahead

    def _ask(self, method: str, path: str, body: resources.Body | None, timeout_s: float) -> bytes:
        headers = {} if body is None else {"Content-Type": "application/json"}
        data = b"" if body is None else encoded(body)
        with _spoken(), self._answer(method, path, headers, data, timeout_s) as answer:
            return answer.whole()

    @contextlib.contextmanager
    def _answer(
        self, method: str, path: str, headers: dict[str, str], body: bytes, timeout_s: float
    ) -> Iterator[connection.Answer]:
        """One that is no error."""
        asked = connection.asked(self.path, method, path, headers=headers, body=body, timeout_s=timeout_s)
        with asked as answer:
            if answer.status >= 400:
                raise _refusal(answer)
            yield answer


@contextlib.contextmanager
def _spoken(*, reading: bool = False) -> Iterator[None]:
    """What goes wrong with the connection, as errors of ours."""
    try:
        yield
    except TimeoutError as error:
        text = "bangerd took the request and did not answer in time"
        raise errors.DeadlineError(text, hint="see `journalctl -u bangerd`") from error
    except (httptools.HttpParserError, ConnectionError) as error:
        if reading and isinstance(error, BrokenPipeError):
            raise  # who reads does not write to the daemon: it is our own output that is gone
        text = f"the connection to bangerd was lost: {str(error) or type(error).__name__}"
        raise errors.UnavailableError(text, hint=connection.START_HINT) from error


def _refusal(answer: connection.Answer) -> errors.BangerError:
    try:
        return failure(decoding.json(answer.whole(), errors.ErrorBody))
    except msgspec.DecodeError:
        text = f"bangerd answered {answer.status} {answer.reason}"
        return errors.ProtocolError(text, hint="does something else listen on this socket?")


def decode(data: bytes, kind: type[T]) -> T:
    try:
        return decoding.json(data, kind)
    except msgspec.DecodeError as error:
        hint = "is bangerd of another version? `banger version` shows both"
        raise errors.ProtocolError(f"bangerd's answer makes no sense: {error}", hint=hint) from error


class _Listed(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...


_L = TypeVar("_L", bound=_Listed)


def named(found: Sequence[_L], names: Sequence[str], look_up: Callable[[str], _L]) -> Sequence[_L]:
    """Those of a list that are meant; all where no name is given. `look_up` raises for what is none."""
    if not names:
        return found
    known = {item.name for item in found}
    ids = {look_up(name).id for name in names if name not in known}
    return [item for item in found if item.name in names or item.id in ids]


def _operation(data: bytes) -> resources.Operation:
    from banger.contract import resources

    return decode(data, resources.Operation)


def _sse(answer: connection.Answer) -> Iterator[bytes]:
    """The `data` of each server-sent event; comments, ids and event names are not used."""
    data: list[bytes] = []
    for line in answer.lines(_MAX_LINE):
        text = line.rstrip(b"\r\n")
        if not text and data:
            yield b"\n".join(data)
            data = []
        elif text.startswith(b"data:"):
            data.append(text[5:].removeprefix(b" "))
