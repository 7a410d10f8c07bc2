# SPDX-License-Identifier: MIT
"""Files of this host as a tar stream, and a stranger's tar stream as files of this host.

Writing: names byte for byte, modes, times and extended attributes kept. Reading: whatever the stream says,
nothing appears outside the target, no link is followed, no device or privilege is made.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from banger.contract import errors

PIECE_BYTES: Final = 256 * 1024
_XATTR: Final = "SCHILY.xattr."
_END: Final = bytes(2 * tarfile.BLOCKSIZE)
_MAX_MEMBERS: Final = 50_000_000
Report = Callable[[int], None]


# --- writing ---


def walk(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """A path and all below it: the name in the archive, and the path here."""
    yield name, str(path)
    if path.is_symlink() or not path.is_dir():
        return
    for directory, subdirectories, files in os.walk(str(path), onerror=_raise):
        subdirectories.sort()
        for entry in sorted([*subdirectories, *files]):
            found = os.path.join(directory, entry)
            yield os.path.join(name, os.path.relpath(found, str(path))), found


def _raise(error: OSError) -> None:
    raise errors.OperationFailedError(f"cannot read {error.filename}: {error.strerror}") from error


def packed(members: Iterable[tuple[str, str]], report: Report = lambda _: None) -> Iterator[bytes]:
    """The archive of these files, in this order. Sockets are left out: they are of this moment only.

    Raises OperationFailedError for a file that cannot be read, or that shrinks while it is.
    """
    count, links = 0, dict[tuple[int, int], str]()
    for name, path in members:
        info = _member(name, path, links)
        if info is None:
            continue
        yield info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        if info.isreg():
            for piece in _content(path, info.size):
                count += len(piece)
                report(count)
                yield piece
            yield bytes(-info.size % tarfile.BLOCKSIZE)
    yield _END


def _member(name: str, path: str, links: dict[tuple[int, int], str]) -> tarfile.TarInfo | None:
    try:
        found = os.lstat(path)
        info = tarfile.TarInfo(name)
        info.mode, info.uid, info.gid = stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid
        info.mtime = found.st_mtime_ns // 10**9
        info.pax_headers = {"mtime": _decimal(found.st_mtime_ns)} | _attributes(path)
        if stat.S_ISLNK(found.st_mode):
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
        elif stat.S_ISDIR(found.st_mode):
            info.type = tarfile.DIRTYPE
        elif stat.S_ISFIFO(found.st_mode):
            info.type = tarfile.FIFOTYPE
        elif stat.S_ISREG(found.st_mode):
            _link_or_file(info, found, links)
        else:
            return None
    except OSError as error:
        raise errors.OperationFailedError(f"cannot read {path}: {error.strerror}") from error
    return info


def _link_or_file(info: tarfile.TarInfo, found: os.stat_result, links: dict[tuple[int, int], str]) -> None:
    key = (found.st_dev, found.st_ino)
    if key in links:
        info.type, info.linkname = tarfile.LNKTYPE, links[key]
        return
    info.size = found.st_size
    if found.st_nlink > 1:
        links[key] = info.name


def _decimal(nanoseconds: int) -> str:
    return f"{nanoseconds // 10**9}.{nanoseconds % 10**9:09d}"


def _attributes(path: str) -> dict[str, str]:
    """The user's own extended attributes; the kernel keeps the others to itself."""
    found = {}
    with contextlib.suppress(OSError):
        for name in os.listxattr(path, follow_symlinks=False):
            if name.startswith("user."):
                value = os.getxattr(path, name, follow_symlinks=False)
                found[_XATTR + name] = value.decode("utf-8", "surrogateescape")
    return found


def _content(path: str, size: int) -> Iterator[bytes]:
    left = size
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb", buffering=0) as file:
            while left and (piece := file.read(min(left, PIECE_BYTES))):
                left -= len(piece)
                yield piece
    except OSError as error:
        raise errors.OperationFailedError(f"cannot read {path}: {error.strerror}") from error
    if left:
        raise errors.OperationFailedError(f"{path} became shorter while it was read")


# --- reading ---


class _Stream(io.RawIOBase):
    """Pieces as a file that tarfile can read."""

    def __init__(self, pieces: Iterable[bytes], report: Report) -> None:
        self._pieces = iter(pieces)
        self._held = memoryview(b"")
        self._count = 0
        self._report = report

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object, /) -> int:
        target = memoryview(buffer)  # type: ignore[arg-type]  # io's own type has no name
        while not self._held:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._held = memoryview(piece)
        size = min(len(target), len(self._held))
        target[:size] = self._held[:size]
        self._held = self._held[size:]
        self._count += size
        self._report(self._count)
        return size

    def drain(self) -> None:
        """To the end of what is sent: only then is it known to be whole."""
        for _ in self._pieces:
            pass


@dataclass(slots=True)
class _Directory:
    """What is set once nothing more is written into it: children first."""

    parts: tuple[str, ...]
    mode: int
    mtime_ns: int


@dataclass(slots=True)
class Unpacked:
    """What came of an archive. `skipped` says what was left out, and why."""

    entries: int = 0
    skipped: list[str] = field(default_factory=list)


def unpack(pieces: Iterable[bytes], target: Path, *, rename: str | None, report: Report) -> Unpacked:
    """Unpacks into the directory `target`. All members lie under one name; `rename` replaces it.

    Existing files are replaced, existing directories filled. Raises ProtocolError for names that lead out.
    """
    stream = _Stream(pieces, report)
    done = Unpacked()
    top = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    directories: list[_Directory] = []
    try:
        buffered = io.BufferedReader(stream, PIECE_BYTES)
        with tarfile.open(fileobj=buffered, mode="r|", encoding="utf-8", errors="surrogateescape") as tar:
            for info in tar:
                done.entries += 1
                if done.entries > _MAX_MEMBERS:
                    raise errors.ProtocolError("the guest sent too many files")
                parts = _parts(info.name, rename)
                _place(top, parts, info, tar, done, rename)
                if info.isdir():
                    directories.append(_Directory(parts, info.mode, _mtime_ns(info)))
                tar.members = []  # type: ignore[attr-defined]  # a stream is read once; remembering every member would only grow
        stream.drain()
        for each in reversed(directories):
            _finish_directory(top, each)
    except tarfile.TarError as error:
        raise errors.ProtocolError(f"the guest sent a broken archive: {error}") from error
    except OSError as error:
        where = error.filename or target
        raise errors.OperationFailedError(f"cannot write {os.fsdecode(where)}: {error.strerror}") from error
    finally:
        os.close(top)
    return done


def _parts(name: str, rename: str | None) -> tuple[str, ...]:
    parts = tuple(part for part in name.split("/") if part not in {"", "."})
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise errors.ProtocolError(f"the guest sent the name {name!r}, which leads out of the target")
    if not parts:
        raise errors.ProtocolError("the guest sent a member without a name")
    return (rename, *parts[1:]) if rename else parts


def _place(
    top: int,
    parts: tuple[str, ...],
    info: tarfile.TarInfo,
    tar: tarfile.TarFile,
    done: Unpacked,
    rename: str | None,
) -> None:
    with _parent(top, parts) as parent:
        name = parts[-1]
        if info.isdir():
            _make_directory(parent, name)
            return
        if not (info.isreg() or info.issym() or info.islnk() or info.isfifo()):
            done.skipped.append(f"{'/'.join(parts)} is a device")
            return
        _clear(parent, name)
        if info.issym():
            os.symlink(info.linkname, name, dir_fd=parent)
        elif info.islnk():
            _link(top, _parts(info.linkname, rename), parent, name)
        elif info.isfifo():
            os.mkfifo(name, info.mode & 0o777, dir_fd=parent)
        else:
            _write(parent, name, info, tar.extractfile(info))


@contextlib.contextmanager
def _parent(top: int, parts: tuple[str, ...]) -> Iterator[int]:
    """The directory that a member goes into, reached without following a link; made when it is missing."""
    here = os.dup(top)
    try:
        for part in parts[:-1]:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=here)
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = below
        yield here
    finally:
        os.close(here)


def _make_directory(parent: int, name: str) -> None:
    try:
        os.mkdir(name, 0o755, dir_fd=parent)
    except FileExistsError:
        if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=parent)
            os.mkdir(name, 0o755, dir_fd=parent)


def _clear(parent: int, name: str) -> None:
    """What is there is replaced and never written through; a directory that holds something stays."""
    try:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(found.st_mode):
        os.rmdir(name, dir_fd=parent)
    else:
        os.unlink(name, dir_fd=parent)


def _link(top: int, target: tuple[str, ...], parent: int, name: str) -> None:
    with _parent(top, target) as source:
        os.link(target[-1], name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)


def _write(parent: int, name: str, info: tarfile.TarInfo, content: IO[bytes] | None) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(name, flags, 0o600, dir_fd=parent), "wb", buffering=0) as file:
        left = info.size
        while left and content is not None and (piece := content.read(min(left, PIECE_BYTES))):
            left -= len(piece)
            view = memoryview(piece)
            while view:
                view = view[file.write(view) :]
        if left:
            raise tarfile.ReadError("it ends in the middle of a file")
        # Never set-user-id: the file is ours now, and a guest chose its content.
        os.fchmod(file.fileno(), info.mode & 0o777)
        for key, value in info.pax_headers.items():
            if key.startswith(_XATTR + "user."):
                with contextlib.suppress(OSError):
                    data = value.encode("utf-8", "surrogateescape")
                    os.setxattr(file.fileno(), key.removeprefix(_XATTR), data)
        os.utime(file.fileno(), ns=(_mtime_ns(info), _mtime_ns(info)))


def _mtime_ns(info: tarfile.TarInfo) -> int:
    """From the decimal text where there is one: a float is too coarse."""
    seconds, _, rest = info.pax_headers.get("mtime", "").partition(".")
    if seconds.lstrip("-").isdigit() and len(seconds) < 12:
        return int(seconds) * 10**9 + int((rest + "0" * 9)[:9] if rest[:9].isdigit() else 0)
    return int(info.mtime) * 10**9


def _finish_directory(top: int, each: _Directory) -> None:
    with _parent(top, (*each.parts, "")) as here:
        os.fchmod(here, each.mode & 0o777)
        os.utime(here, ns=(each.mtime_ns, each.mtime_ns))
