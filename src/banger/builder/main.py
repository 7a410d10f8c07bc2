# SPDX-License-Identifier: MIT
"""`bangerd-build`: answers one request on the connection that is its standard input, and ends.

`bangerd-build@.service` starts it with the last of root's rights given up. It believes the daemon nothing:
who asks is judged before a byte is read, and the request by its types. A daemon that goes away, or says
another word, ends the build. The unit has a network of its own, with the way out that the daemon serves.

What it starts has its uid, and may stop or kill it but do no more to it: systemd ends the unit, with all
that runs in it, when this process ends or is silent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import os
import socket
import stat
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

import msgspec

from banger import artefacts, run, systemd
from banger.contract import building, decoding, errors, names, peer
from banger.images import base

_INSTALL: Final = Path("/etc/banger/install.toml")
_READ_DEADLINE_S: Final = 5.0
_LEVELS: Final = {"error": "<3>", "info": "<6>"}
_STDIN: Final = 0
_SCRATCH: Final = "banger-build-"
_SPACE_HINT: Final = "free some space on the disk of /var/tmp, where packages are unpacked"
_LOOK_S: Final = 0.5
_LEAST_NAMES: Final = 4096
_PR_SET_DUMPABLE: Final = 4
_SO_NETNS_COOKIE: Final = 71
"""asm-generic/socket.h, since Linux 5.14."""
_PROXIES: Final = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")


class _Installed(msgspec.Struct, frozen=True):
    """The keys of install.toml that are needed here."""

    owner_uid: int
    uid_base: int = names.UID_BASE
    uid_count: int = names.MAX_SLOTS


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bangerd-build", description=__doc__)
    parser.add_argument("--install", type=Path, default=_INSTALL, metavar="FILE")
    options = parser.parse_args(argv)
    if os.geteuid() not in names.BUILD_UIDS:
        _log("error", f"will not run packages' scripts as uid {os.geteuid()}, which is no build's")
        return 1
    installed = decoding.toml(options.install.read_bytes(), _Installed)
    if installed.uid_base < os.geteuid() <= installed.uid_base + installed.uid_count:
        _log(
            "error", f"will not run as uid {os.geteuid()}, which a VM has: see uid_base in {options.install}"
        )
        return 1
    _hide()
    with _standard_input() as connection:
        if _has_network_of(connection):
            _log("error", "will not run in the host's network: the unit says PrivateNetwork=yes")
            return 1
        asyncio.run(serve(connection, installed.owner_uid))
    return 0


def _hide() -> None:
    """No memory and no descriptor of ours is open to what has our uid; what is executed is as it was."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, *(ctypes.c_ulong(0) for _ in range(4))):
        raise OSError(ctypes.get_errno(), "prctl")


def _has_network_of(connection: socket.socket) -> bool:
    """Whether the peer's is ours too: systemd starts the unit all the same where it can make none."""
    with socket.socket(socket.AF_UNIX) as own:
        return _network(own) == _network(connection)


def _network(of: socket.socket) -> bytes:
    return of.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)


def _standard_input() -> socket.socket:
    """The connection, which no program that is started from here gets."""
    connection = socket.socket(fileno=os.dup(_STDIN))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), _STDIN)
    return connection


async def serve(connection: socket.socket, owner_uid: int) -> None:
    """Builds what is asked for, and says how it ended; nothing is said to a peer that went away."""
    frames = _Frames(connection)
    request: building.Request | None = None
    try:
        _require_peer(connection, owner_uid)
        request = _read(connection)
        os.environ.update(request.environment)
        _open_way_out(connection)
        await _until_it_goes(connection, request.base, frames)
        answer = building.Answer()
    except asyncio.CancelledError:
        _say(request, "cancelled")
        return
    except Exception as error:
        answer = building.Answer(errors.to_body(error))
    _say(request, "built" if answer.error is None else answer.error.message)
    with contextlib.suppress(OSError):
        frames.send(building.ANSWER, _fitting(answer))


def _open_way_out(connection: socket.socket) -> None:
    """Hands it over, and has all that is started from here use it."""
    for name in [each for each in os.environ if each.lower().endswith("_proxy")]:
        del os.environ[name]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        socket.send_fds(connection, [building.FRAME.pack(building.WAY_OUT, 0)], [listener.fileno()])
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    os.environ.update(dict.fromkeys(_PROXIES, address))


async def _until_it_goes(connection: socket.socket, wanted: building.Base, frames: _Frames) -> None:
    """Nothing more is awaited of the peer: what can be read is its end, or what nobody asked for."""
    work = asyncio.create_task(run.in_thread(_build, wanted, frames))
    beating = asyncio.create_task(systemd.beat_until(asyncio.Event()))
    full = asyncio.create_task(_until_full(tempfile.gettempdir()))
    loop = asyncio.get_running_loop()

    def end() -> None:
        loop.remove_reader(connection)
        beating.cancel()  # what hinders the end has the time of the watchdog, and no longer
        work.cancel()

    loop.add_reader(connection, end)
    full.add_done_callback(lambda task: None if task.cancelled() else end())
    try:
        await work
    except asyncio.CancelledError:
        if full.done():
            raise errors.NoSpaceError("no space left for what is unpacked", hint=_SPACE_HINT) from None
        raise
    finally:
        loop.remove_reader(connection)
        beating.cancel()
        full.cancel()


async def _until_full(place: str) -> None:
    """Others work on that disk, VMs among them. Nobody is told when one fills up: it has to be looked at."""
    while True:
        found = os.statvfs(place)
        has_names = not found.f_files or found.f_favail >= _LEAST_NAMES
        if found.f_bavail * found.f_frsize < artefacts.RESERVE_BYTES or not has_names:
            return
        await asyncio.sleep(_LOOK_S)


def _build(wanted: building.Base, frames: _Frames) -> None:
    room = artefacts.room_for("what is unpacked for a build", hint=_SPACE_HINT)
    with room, tempfile.TemporaryDirectory(prefix=_SCRATCH, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / "root.tar"
        try:
            base.make(wanted, made, frames.line)
        except errors.NoSpaceError as error:
            error.hint = _SPACE_HINT
            raise
        with _opened(made) as tar:
            while piece := tar.read(building.MAX_FRAME_BYTES):
                run.check_cancelled()
                frames.send(building.TAR, piece)


def _opened(made: Path) -> IO[bytes]:
    """Packages may have put anything there: a pipe would be waited for, a device read, without end."""
    try:
        descriptor = os.open(made, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise errors.OperationFailedError(f"what was built is no file: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise errors.OperationFailedError("what was built is no file")
    return open(descriptor, "rb")


class _Frames:
    """What goes to the daemon, from one thread at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def line(self, text: str) -> None:
        with contextlib.suppress(OSError):  # seen where the peer is watched
            self.send(building.LINE, text.encode()[: building.MAX_LINE_BYTES])

    def send(self, kind: bytes, content: bytes) -> None:
        self._connection.sendall(building.FRAME.pack(kind, len(content)) + content)


def _require_peer(connection: socket.socket, owner_uid: int) -> None:
    uid = peer.of(connection).uid
    if uid not in (0, owner_uid):
        raise errors.UnauthorizedError(f"uid {uid} may not build here")


def _read(connection: socket.socket) -> building.Request:
    connection.settimeout(_READ_DEADLINE_S)
    try:
        (size,) = building.LENGTH.unpack(_exactly(connection, building.LENGTH.size))
        if size > building.MAX_REQUEST_BYTES:
            raise errors.BadRequestError(f"a request of {size} bytes is too long")
        return decoding.json(_exactly(connection, size), building.Request)
    except TimeoutError:
        raise errors.DeadlineError("the request did not come") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise errors.BadRequestError(f"the request is not valid: {error}") from error
    finally:
        connection.settimeout(None)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise errors.BadRequestError("the request ended before its time")
        data += piece
    return bytes(data)


def _fitting(answer: building.Answer) -> bytes:
    """What mmdebstrap said last, when all of it is too long."""
    data = msgspec.json.encode(answer)
    if len(data) <= building.MAX_FRAME_BYTES or answer.error is None:
        return data
    short = msgspec.structs.replace(answer.error, message=answer.error.message[:4096], fields={}, also=())
    return msgspec.json.encode(building.Answer(short))


def _say(request: building.Request | None, how: str) -> None:
    what = {} if request is None else {"op_id": request.op_id, "suite": request.base.suite}
    _log("info", how, **what)


def _log(level: str, message: str, **fields: str) -> None:
    """One line of JSON for the journal, which takes the level from its head."""
    line = msgspec.json.encode({"level": level, "message": message, **fields}).decode()
    sys.stderr.write(f"{_LEVELS[level]}{line}\n")


if __name__ == "__main__":
    sys.exit(main())
