# SPDX-License-Identifier: MIT
"""The daemon's door to the builder: one build per connection, and whatever comes back is a stranger's.

What packages bring runs there and not here. So all that it says is bounded, in time and size and kind; the
tar is read by who reads strangers' tars. It has no network: `way_out` serves the one way that there is, from
here. Closing the connection ends the build.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

import msgspec

from banger import artefacts, run
from banger.contract import building, decoding, errors
from banger.images import base
from banger.net import forward

Serve = Callable[[socket.socket], None]

DEADLINE_S: Final = base.DEADLINE_S + 120
"""Longer than the builder gives mmdebstrap."""
_SEND_S: Final = 10.0
_KINDS: Final = (building.TAR, building.LINE, building.ANSWER, building.WAY_OUT)
_LOOKED_AT: Final = 64 << 20
"""How many bytes come between two looks at the room that is left."""
_HINT: Final = "see `systemctl status bangerd-build.socket` and `journalctl -u 'bangerd-build@*'`"
_ABSENT: Final = (
    "`sudo banger system install` sets it up, also after an upgrade from a version without it; "
    "see `systemctl status bangerd-build.socket`"
)


def _no_op_id() -> str:
    return ""


class Builder:
    """Is a `base.Make`. `op_id` says on whose behalf; it greps in the journal of both."""

    def __init__(
        self,
        socket_path: Path,
        op_id: Callable[[], str] = _no_op_id,
        *,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._path = socket_path
        self._op_id = op_id
        self._deadline_s = deadline_s

    def is_there(self) -> bool:
        return self._path.is_socket()

    def __call__(self, wanted: building.Base, target: Path, on_line: base.OnLine | None) -> None:
        from banger.owner import way_out

        sources = _sources(wanted)
        data = msgspec.json.encode(
            building.Request(base=wanted, environment=_environment(), op_id=self._op_id())
        )
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_SEND_S)
            try:
                connection.connect(str(self._path))
            except OSError as error:
                raise errors.UnavailableError(
                    f"the builder does not answer at {self._path}: {error.strerror or error}", hint=_ABSENT
                ) from error
            try:
                connection.sendall(building.LENGTH.pack(len(data)) + data)
            except OSError as error:
                raise errors.UnavailableError(
                    f"the builder hears no request: {error.strerror or error}", hint=_HINT
                ) from error
            with (
                artefacts.room_for("what is built"),
                target.open("xb") as tar,
                contextlib.ExitStack() as stack,
            ):

                def serve(listener: socket.socket) -> None:
                    stack.enter_context(way_out.serving(listener, sources))

                receive(connection, tar, on_line, within_s=self._deadline_s, serve=serve)


def receive(
    connection: socket.socket,
    tar: IO[bytes],
    on_line: base.OnLine | None,
    *,
    within_s: float,
    serve: Serve,
) -> None:
    """All that the builder sends until its answer; raises what that says, and for what is no answer.

    `serve` gets the way out, once at the most, and owns it.
    """
    with contextlib.closing(_Frames(connection, within_s)) as frames:
        _receive(frames, tar, on_line, serve)


def _receive(frames: _Frames, tar: IO[bytes], on_line: base.OnLine | None, serve: Serve) -> None:
    growing, said, lines, served = _Tar(tar), 0, 0, False
    while True:
        kind, content = frames.next()
        match kind:
            case building.WAY_OUT if not served:
                serve(frames.take())
                served = True
            case building.WAY_OUT:
                raise errors.ProtocolError("the builder wants a second way out", hint=_HINT)
            case building.TAR:
                growing.add(content)
            case building.LINE:
                said, lines = said + len(content), lines + 1
                too_much = said > building.MAX_LINES_BYTES or lines > building.MAX_LINES
                if too_much or len(content) > building.MAX_LINE_BYTES:
                    raise errors.ProtocolError("the builder says too much", hint=_HINT)
                if on_line is not None:
                    on_line(bytes(content).decode(errors="replace"))
            case _:
                return _judge(content)


def _judge(content: memoryview) -> None:
    try:
        answer = decoding.json(bytes(content), building.Answer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise errors.ProtocolError(f"the builder's answer is not valid: {error}", hint=_HINT) from error
    if answer.error is not None:
        raise errors.from_body(answer.error)


def _sources(wanted: building.Base) -> set[forward.Place]:
    """Where packages come from, wherever that is: the host's root, or whoever named the mirror, chose it.

    Raises BadRequestError where the way there is a proxy that is not used: a build would say less of it.
    """
    from banger import debian
    from banger.images import connections

    try:
        entries = debian.sources(wanted.suite, mirror=wanted.mirror)
    except errors.BangerError:  # the builder asks the same, and says what is wrong
        return set()
    found: set[forward.Place] = set()
    for uri in (urllib.parse.urlsplit(entry.split(" ")[2]) for entry in entries):
        if uri.hostname and uri.scheme in forward.PORTS:
            connections.proxy_for(
                uri.scheme, uri.hostname, uri.port, urllib.request.getproxies_environment()
            )
            found.add((uri.hostname, uri.port or forward.PORTS[uri.scheme]))
    return found


def _environment() -> dict[str, str]:
    """Of ours what the builder takes, and may be told."""
    from banger import debian

    found: dict[str, str] = {}
    for name, value in run.environment(*debian.APT_ENVIRONMENT).items():
        try:
            found |= decoding.convert({name: value}, dict[building.Variable, building.Value])
        except msgspec.ValidationError:  # such as HOME, which is not the builder's
            continue
    return found


class _Tar:
    """Grows as long as others have room too."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._unlooked = 0

    def add(self, piece: memoryview) -> None:
        self._unlooked += len(piece)
        if self._unlooked > _LOOKED_AT:
            self._unlooked = 0
            place = os.path.dirname(self._file.name)
            if shutil.disk_usage(place).free < artefacts.RESERVE_BYTES:
                raise errors.NoSpaceError(
                    f"no space left in {place} for what is built", hint="free some space"
                )
        self._file.write(piece)


class _Frames:
    """What the builder sends. Raises for what is none, for its end, and when the time is over."""

    def __init__(self, connection: socket.socket, within_s: float) -> None:
        self._connection = connection
        self._within_s = within_s
        self._deadline = time.monotonic() + within_s
        self._handed: list[int] = []

    def close(self) -> None:
        for descriptor in self._handed:
            os.close(descriptor)
        self._handed.clear()

    def take(self) -> socket.socket:
        """What came with a way out. Raises ProtocolError when that is no TCP socket that listens."""
        if len(self._handed) != 1:
            raise errors.ProtocolError("the builder's way out is not there", hint=_HINT)
        try:
            found = socket.socket(fileno=self._handed[0])
        except OSError:
            raise errors.ProtocolError("the builder's way out is no socket", hint=_HINT) from None
        self._handed.clear()
        kind = (found.family, found.type, found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        if kind != (socket.AF_INET, socket.SOCK_STREAM, 1):
            found.close()
            raise errors.ProtocolError("the builder's way out does not listen", hint=_HINT)
        return found

    def next(self) -> tuple[bytes, memoryview]:
        kind, size = building.FRAME.unpack(self._exactly(building.FRAME.size, self._head))
        if (
            kind not in _KINDS
            or size > building.MAX_FRAME_BYTES
            or (kind == building.WAY_OUT) != bool(self._handed)
        ):
            raise errors.ProtocolError(f"the builder sends what is no answer: {kind!r}, {size}", hint=_HINT)
        return kind, self._exactly(size, self._connection.recv_into)

    def _exactly(self, size: int, receive: Callable[[memoryview], int]) -> memoryview:
        content = memoryview(bytearray(size))
        have = 0
        while have < size:
            if not run.await_readable(self._connection.fileno(), self._deadline):
                raise errors.DeadlineError(
                    f"the builder was not done after {self._within_s:g} s", hint=_HINT
                )
            try:
                got = receive(content[have:])
            except OSError as error:
                raise self._ended(error.strerror or str(error)) from error
            if not got:
                raise self._ended("it said nothing")
            have += got
        return content

    def _head(self, into: memoryview) -> int:
        piece, handed, *_ = socket.recv_fds(self._connection, len(into), 1, socket.MSG_CMSG_CLOEXEC)
        self._handed += handed
        into[: len(piece)] = piece
        return len(piece)

    def _ended(self, why: str) -> errors.UnavailableError:
        return errors.UnavailableError(f"the builder ended before its work did: {why}", hint=_HINT)
