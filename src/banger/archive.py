# SPDX-License-Identifier: MIT
"""Files of this host as a tar stream, and a stranger's tar stream as files of this host.

Writing: names byte for byte, modes, times and extended attributes kept. Reading: whatever the stream says,
nothing appears outside the target, no link is followed, no device or privilege is made.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from banger.contract import errors
from banger.tarstream import hole, reader

PIECE_BYTES: Final = 256 * 1024
_XATTR: Final = "SCHILY.xattr."
_END: Final = bytes(2 * tarfile.BLOCKSIZE)
_MAX_MEMBERS: Final = 50_000_000
_MAX_SKIPPED: Final = 100
_MAX_CLOSED: Final = 10_000
_KEPT_BYTES: Final = 256 << 20
_KEPT_FILES: Final = 10_000
_SMALL: Final = 20
"""Of a disk that is small, only so small a part is kept free."""
Report = Callable[[int], None]


# --- writing ---


def walk(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """A path and all below it: the name in the archive, and the path here. Without a name: what is below."""
    if name:
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


def content_bytes(members: Iterable[tuple[str, str]]) -> int:
    """About how much `packed` will report of these: a file with many hard links is counted for each."""
    total = 0
    for _, path in members:
        with contextlib.suppress(OSError):
            found = os.lstat(path)
            total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


@dataclass(slots=True)
class LeftOut:
    """What an archive has not, or what of it was not made, and why: of so much, the first."""

    skipped: list[str] = field(default_factory=list)
    skipped_count: int = 0

    def skip(self, what: str) -> None:
        self.skipped_count += 1
        if self.skipped_count <= _MAX_SKIPPED:
            self.skipped.append(what)


def packed(
    members: Iterable[tuple[str, str]], report: Report = lambda _: None, left_out: LeftOut | None = None
) -> Iterator[bytes]:
    """The archive of these files, in this order; without sockets, which are of this moment, and devices.

    Raises OperationFailedError for a file that cannot be read, or that shrinks while it is.
    """
    count, links = 0, dict[tuple[int, int, int], str]()
    for name, path in members:
        with contextlib.closing(_Source(path)) as source:
            info = _member(name, source, links)
            if info is None:
                if left_out is not None:
                    kind = "a socket" if stat.S_ISSOCK(source.found.st_mode) else "a device"
                    left_out.skip(f"{name} is {kind}")
                continue
            yield info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
            if info.isreg():
                for piece in source.content(info.size):
                    count += len(piece)
                    report(count)
                    yield piece
                yield bytes(-info.size % tarfile.BLOCKSIZE)
    yield _END


class _Source:
    """What is at a path. A file is opened, so that what is said of it is of the very one that is read."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = -1
        with _readable(path):
            self.found = os.lstat(path)
            if stat.S_ISREG(self.found.st_mode):
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
                self._descriptor = os.open(path, flags)
                self.found = os.fstat(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def attributes(self) -> dict[str, str]:
        """The user's own extended attributes; the kernel keeps the others to itself. A name that no pax
        header can hold stays here with its value.
        """
        place, is_open = (self._descriptor, True) if self._descriptor >= 0 else (self.path, False)
        found = {}
        with contextlib.suppress(OSError):
            for name in os.listxattr(place, follow_symlinks=is_open):
                if name.startswith("user.") and "=" not in name and _is_text(name):
                    value = os.getxattr(place, name, follow_symlinks=is_open)
                    found[_XATTR + name] = value.decode("utf-8", "surrogateescape")
        return found

    def content(self, size: int) -> Iterator[bytes]:
        left = size
        with _readable(self.path):
            while left and (piece := os.read(self._descriptor, min(left, PIECE_BYTES))):
                left -= len(piece)
                yield piece
        if left:
            raise errors.OperationFailedError(f"{self.path} became shorter while it was read")


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise errors.OperationFailedError(f"cannot read {path}: {error.strerror}") from error


def _member(name: str, source: _Source, links: dict[tuple[int, int, int], str]) -> tarfile.TarInfo | None:
    found = source.found
    info = tarfile.TarInfo(name)
    info.mode, info.uid, info.gid = stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid
    info.mtime = found.st_mtime_ns // 10**9
    info.pax_headers = {"mtime": decimal(found.st_mtime_ns)} | source.attributes()
    if stat.S_ISLNK(found.st_mode):
        with _readable(source.path):
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink(source.path)
    elif stat.S_ISDIR(found.st_mode):
        info.type = tarfile.DIRTYPE
    elif stat.S_ISFIFO(found.st_mode):
        info.type = tarfile.FIFOTYPE
    elif stat.S_ISREG(found.st_mode):
        _link_or_file(info, found, links)
    else:
        return None
    return info


def _link_or_file(
    info: tarfile.TarInfo, found: os.stat_result, links: dict[tuple[int, int, int], str]
) -> None:
    """A number is soon another file's; no two that had it share the last change of their status."""
    key = (found.st_dev, found.st_ino, found.st_ctime_ns)
    if key in links:
        info.type, info.linkname = tarfile.LNKTYPE, links[key]
        return
    info.size = found.st_size
    if found.st_nlink > 1:
        links[key] = info.name


def decimal(ns: int) -> str:
    """A time as pax headers have it: before 1970 the fraction goes back as well."""
    seconds, rest = divmod(abs(ns), 10**9)
    return f"{'-' if ns < 0 else ''}{seconds}.{rest:09}"


def _is_text(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


# --- reading ---


@dataclass(slots=True)
class Unpacked(LeftOut):
    """What came of an archive."""

    entries: int = 0


def lacks_room(place: int | Path) -> bool:
    """Whether the disk has no more left than others need: who sends without end does not fill it."""
    found = os.statvfs(place)
    files = min(_KEPT_FILES, found.f_files // _SMALL)  # 0 on file systems that have no such number
    size = min(_KEPT_BYTES, found.f_blocks * found.f_frsize // _SMALL)
    return found.f_bavail * found.f_frsize < size or found.f_favail < files


def unpack(pieces: Iterable[bytes], target: Path, *, rename: str | None, report: Report) -> Unpacked:
    """Unpacks into the directory `target`. All members lie under one name; `rename` replaces it, and when it
    is empty, what lies under that name goes straight into `target`, which stays as it is.

    Existing files are replaced by files, existing directories filled, links replaced by either; a file never
    gives way to a directory. Raises ProtocolError for names that lead out, and for whatever else no agent of
    ours would send; NoSpaceError before the disk is full.
    """
    top = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _read(pieces, report) as entries:
            return _Unpacking(top, rename, target).all(entries)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(target) from error
        what = f"{os.fsdecode(error.filename)} in {target}" if error.filename else str(target)
        raise errors.OperationFailedError(f"cannot write {what}: {error.strerror}") from error
    finally:
        os.close(top)


def _full(target: Path) -> errors.NoSpaceError:
    hint = "free space there, or copy less at a time; what had been copied is there"
    return errors.NoSpaceError(f"no space left in {target} for what the guest sends", hint=hint)


def begins_with_directory(pieces: Iterable[bytes]) -> bool:
    """Whether the first member is one. Raises ProtocolError for what is no archive."""
    with _read(pieces) as entries:
        first = next(entries, None)
        return first is not None and stat.S_ISDIR(first.mode)


@contextlib.contextmanager
def _read(pieces: Iterable[bytes], report: Report = lambda _: None) -> Iterator[Iterator[reader.Entry]]:
    """Whatever is wrong with the archive, its guest is to blame; why it does not come is said by others."""
    lost: list[errors.BangerError] = []

    def counted() -> Iterator[bytes]:
        count = 0
        try:
            for piece in pieces:
                count += len(piece)
                report(count)
                yield piece
        except errors.BangerError as error:
            lost.append(error)
            raise

    try:
        yield reader.entries(counted())
    except errors.BadRequestError as error:
        if error in lost:
            raise
        raise errors.ProtocolError(f"the guest sent a broken archive: {error.message}") from error
    except (ValueError, OverflowError) as error:  # a value that no file can have, such as a time
        raise errors.ProtocolError(f"the guest sent a broken archive: {error}") from error


@dataclass(slots=True)
class _Directory:
    """What is set once nothing more is written into it."""

    name: str
    mode: int
    mtime_ns: int


class _Unpacking:
    """One archive on its way to disk. A directory is finished when the first member outside it comes: an
    agent packs what is in it right behind it, and nobody need remember all directories.

    One that its owner may not look into waits for the end of all, for a hard link may need its way.
    """

    def __init__(self, top: int, rename: str | None, target: Path) -> None:
        self._top = top
        self._rename = rename
        self._target = target
        self._open: list[_Directory] = []
        self._closed: list[_Directory] = []
        self._done = Unpacked()

    def all(self, entries: Iterator[reader.Entry]) -> Unpacked:
        for entry in entries:
            self._done.entries += 1
            self._keep_room()
            if self._done.entries > _MAX_MEMBERS:
                raise errors.ProtocolError("the guest sent too many files")
            name = os.fsdecode(entry.name)
            parts = _parts(name, self._rename)
            if not parts:
                if stat.S_ISDIR(entry.mode):
                    continue
                raise errors.OperationFailedError(f"{name} is not a directory in the guest")
            self._leave("/".join(parts))
            self._place(parts, entry)
        self._leave("")
        for each in self._closed:  # what lies within another is before it
            self._finish(each)
        return self._done

    def _keep_room(self) -> None:
        if lacks_room(self._top):
            raise _full(self._target)

    def _leave(self, name: str) -> None:
        while self._open and not name.startswith(self._open[-1].name + "/"):
            each = self._open.pop()
            if each.mode & 0o500 == 0o500:
                self._finish(each)
            elif len(self._closed) < _MAX_CLOSED:
                self._closed.append(each)
            else:
                raise errors.ProtocolError("the guest sent too many directories that nobody may look into")

    def _finish(self, each: _Directory) -> None:
        with _parent(self._top, (*each.name.split("/"), "")) as here:
            os.fchmod(here, each.mode & 0o777)
            os.utime(here, ns=(each.mtime_ns, each.mtime_ns))

    def _place(self, parts: tuple[str, ...], entry: reader.Entry) -> None:
        with _parent(self._top, parts) as parent:
            name, mode = parts[-1], entry.mode
            if stat.S_ISDIR(mode):
                _make_directory(parent, name)
                _set_attributes_of_directory(parent, name, entry)
                self._open.append(_Directory("/".join(parts), mode, entry.mtime_ns))
            elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                self._done.skip(f"{'/'.join(parts)} is a device")
            else:
                _clear(parent, name)
                self._make(parent, name, entry)

    def _make(self, parent: int, name: str, entry: reader.Entry) -> None:
        if entry.hard_link:
            target = _parts(os.fsdecode(entry.target), self._rename)
            if not target:
                raise errors.ProtocolError(f"the guest sent {name!r} as a link to the directory of all")
            _link(self._top, target, parent, name)
        elif stat.S_ISLNK(entry.mode):
            os.symlink(entry.target, os.fsencode(name), dir_fd=parent)
            with contextlib.suppress(OSError):  # not every file system has times of links
                os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)
        elif stat.S_ISFIFO(entry.mode):
            _make_pipe(parent, name, entry)
        else:
            _write(parent, name, entry, self._keep_room)


def _parts(name: str, rename: str | None) -> tuple[str, ...]:
    parts = tuple(part for part in name.split("/") if part not in {"", "."})
    if name.startswith("/") or ".." in parts:
        raise errors.ProtocolError(f"the guest sent the name {name!r}, which leads out of the target")
    if not parts:
        raise errors.ProtocolError("the guest sent a member without a name")
    if rename is None:
        return parts
    return (rename, *parts[1:]) if rename else parts[1:]


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
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        if stat.S_ISLNK(mode):
            os.unlink(name, dir_fd=parent)
            os.mkdir(name, 0o755, dir_fd=parent)
        elif not stat.S_ISDIR(mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name) from None


def _set_attributes_of_directory(parent: int, name: str, entry: reader.Entry) -> None:
    if entry.xattrs:
        here = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            _set_attributes(here, entry)
        finally:
            os.close(here)


def _set_attributes(here: int, entry: reader.Entry) -> None:
    for key, value in entry.xattrs:
        if key.startswith(b"user."):
            with contextlib.suppress(OSError):
                os.setxattr(here, key, value)


def _make_pipe(parent: int, name: str, entry: reader.Entry) -> None:
    """Opened for reading it waits for nobody."""
    os.mkfifo(name, 0o600, dir_fd=parent)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(name, flags, dir_fd=parent), "rb", buffering=0) as pipe:
        os.fchmod(pipe.fileno(), entry.mode & 0o777)
        os.utime(pipe.fileno(), ns=(entry.mtime_ns, entry.mtime_ns))


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


def _write(parent: int, name: str, entry: reader.Entry, keep_room: Callable[[], None]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(name, flags, 0o600, dir_fd=parent), "wb", buffering=0) as file:
        for piece in entry.content:
            if isinstance(piece, hole.Hole):
                # A few bytes would claim a whole disk; the agent sends every byte.
                raise errors.ProtocolError(f"the guest sent a sparse file, {name!r}")
            keep_room()
            view = memoryview(piece)
            while view:
                view = view[file.write(view) :]
        _set_attributes(file.fileno(), entry)  # while it may be written
        # Never set-user-id: the file is ours now, and a guest chose its content.
        os.fchmod(file.fileno(), entry.mode & 0o777)
        os.utime(file.fileno(), ns=(entry.mtime_ns, entry.mtime_ns))
