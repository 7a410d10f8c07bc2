# SPDX-License-Identifier: MIT
"""A file tree staged by an ordinary user, with the owners and modes it really has kept beside it.

An unprivileged unpack loses owners, set-uid bits and devices. So the files are staged readable for us, what
the archive says of each is remembered, and it is applied in the ext4 file system, where all of it is data.
Used by the image builder; a later pull from a registry fills the same tree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shutil
import stat
import tarfile
from pathlib import Path, PurePosixPath
from typing import IO, Final

from banger import run
from banger.contract import errors
from banger.images import ext4

_XATTR_PREFIX: Final = "SCHILY.xattr."
_CHUNK: Final = 1 << 20
_INODE_BYTES: Final = 256
_BYTES_PER_INODE: Final = 16384
_MAX_LINKS: Final = 40
_TYPES: Final = {
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Attributes:
    """What an inode shall have; `mode` has the type bits, `device` is for device nodes."""

    mode: int
    uid: int = 0
    gid: int = 0
    device: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[str, bytes], ...] = ()


class Tree:
    """Files below `root`; `attributes` by absolute path inside the tree, in the order they arrived."""

    def __init__(self, root: Path) -> None:
        root.mkdir(mode=0o700)
        self.root = root
        self.attributes: dict[str, Attributes] = {"/": Attributes(stat.S_IFDIR | 0o755)}
        self._times: dict[str, float] = {}

    def unpack(self, archive: IO[bytes]) -> None:
        """Adds a tar stream; refuses members that would leave the tree, by name or through a link."""
        stream = _Watched(archive)
        try:
            with tarfile.open(fileobj=stream, mode="r|") as members:
                for member in members:
                    run.check_cancelled()
                    self._add_member(members, member)
        except tarfile.TarError as error:
            raise errors.BadRequestError(f"the archive is damaged: {error}") from error
        stream.check_end()
        for path, mtime in reversed(self._times.items()):
            os.utime(self.staged(path), (mtime, mtime), follow_symlinks=False)

    def mkdir(self, path: str, attributes: Attributes | None = None) -> None:
        """Makes a directory; one that is there only gets the attributes."""
        if not self._is_directory(path):
            self.remove(path)
            self._place(path).mkdir(mode=0o700)
        self.attributes[path] = attributes or Attributes(stat.S_IFDIR | 0o755)

    def makedirs(self, path: str) -> None:
        """Makes a directory and its missing parents, owned by root."""
        for parent in [str(each) for each in reversed(PurePosixPath(path).parents)] + [path]:
            if parent not in self.attributes:
                self.mkdir(parent)

    def write(self, path: str, data: bytes, *, permissions: int = 0o644) -> None:
        """A regular file of root's, replacing what was there."""
        self.remove(path)
        self._place(path).write_bytes(data)
        self.attributes[path] = Attributes(stat.S_IFREG | permissions)

    def symlink(self, path: str, target: str) -> None:
        self.remove(path)
        self._place(path).symlink_to(target)
        self.attributes[path] = Attributes(stat.S_IFLNK | 0o777)

    def remove(self, path: str) -> None:
        """Removes a file, or a directory with all it holds; nothing there is fine."""
        if path not in self.attributes:
            return
        staged = self._place(path)
        below: list[str] = []
        if self._is_directory(path):
            shutil.rmtree(staged)
            below = [each for each in self.attributes if each.startswith(f"{path}/")]
        else:
            staged.unlink(missing_ok=True)  # a device has no staged file
        for each in (*below, path):
            del self.attributes[each]
            self._times.pop(each, None)

    def glob(self, pattern: str) -> list[str]:
        """Paths that match an absolute pattern, in which `*` stands for any part of one name."""
        wanted = re.compile("[^/]*".join(re.escape(part) for part in pattern.split("*")))
        return [path for path in self.attributes if wanted.fullmatch(path)]

    def exists(self, path: str) -> bool:
        return path in self.attributes

    def staged(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def resolve(self, path: str) -> str | None:
        """Follows links as the guest would: absolute targets start at the tree. None when one dangles."""
        left, here = path.strip("/").split("/"), ""
        for _ in range(_MAX_LINKS):
            while left:
                part = left.pop(0)
                here = (
                    here.rpartition("/")[0]
                    if part == ".."
                    else f"{here}/{part}"
                    if part not in ("", ".")
                    else here
                )
                found = self.attributes.get(here or "/")
                if found is None:
                    return None
                if stat.S_ISLNK(found.mode):
                    break
            else:
                return here or "/"
            target = os.readlink(self.staged(here))
            here = "" if target.startswith("/") else here.rpartition("/")[0]
            left = target.split("/") + left
        return None

    def pack(self, path: str, archive: Path) -> None:
        """Writes a directory into a tar, as `.`, with the owners and modes it shall have."""
        with tarfile.open(archive, "x", format=tarfile.PAX_FORMAT) as out:
            self._pack_member(out, path, ".", self.attributes[path])
            for each, wanted in self.attributes.items():
                if each.startswith(f"{path}/"):
                    self._pack_member(out, each, each[len(path) + 1 :], wanted)

    def _pack_member(self, out: tarfile.TarFile, path: str, name: str, wanted: Attributes) -> None:
        member = out.gettarinfo(self.staged(path), name)
        member.mode = stat.S_IMODE(wanted.mode)
        member.uid, member.gid, member.uname, member.gname = wanted.uid, wanted.gid, "", ""
        if member.isreg():
            with self.staged(path).open("rb") as content:
                out.addfile(member, content)
        else:
            out.addfile(member)

    def content_bytes(self) -> int:
        """What the tree takes in a file system with blocks of 4 KiB, without the file system's own needs."""
        total = 0
        for path in self.attributes:
            with contextlib.suppress(FileNotFoundError):
                found = self.staged(path).lstat()
                size = ext4.BLOCK_BYTES if stat.S_ISDIR(found.st_mode) else found.st_size
                total += -(-size // ext4.BLOCK_BYTES) * ext4.BLOCK_BYTES + _INODE_BYTES
        return total

    def make_ext4(
        self,
        image: Path,
        *,
        size_bytes: int,
        options: tuple[str, ...] = (),
        label: str = "",
        checked: bool = True,
    ) -> None:
        """The file system: the staged files, then in one batch everything staging could not hold."""
        inodes = max(size_bytes // _BYTES_PER_INODE, 2 * len(self.attributes))
        ext4.make(image, size_bytes=size_bytes, tree=self.root, options=options, label=label, inodes=inodes)
        try:
            ext4.apply(image, self._differences())
            if checked:
                ext4.check(image)
        except BaseException:
            image.unlink(missing_ok=True)
            raise

    def _differences(self) -> ext4.Script:
        script = ext4.Script()
        for path, wanted in self.attributes.items():
            if stat.S_IFMT(wanted.mode) in _TYPES.values():
                major, minor = wanted.device
                script.device(
                    path, mode=wanted.mode, major=major, minor=minor, uid=wanted.uid, gid=wanted.gid
                )
                continue
            found = self.staged(path).lstat()
            whole = path == "/"  # mkfs takes nothing of its root directory from the staged one
            script.set_attributes(
                path,
                mode=wanted.mode if whole or found.st_mode != wanted.mode else None,
                uid=wanted.uid if whole or found.st_uid != wanted.uid else None,
                gid=wanted.gid if whole or found.st_gid != wanted.gid else None,
            )
            for name, value in wanted.xattrs:
                script.set_xattr(path, name, value)
        return script

    def _add_member(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        path = _inside(member.name)
        self.makedirs(path.rpartition("/")[0] or "/")
        kind = _TYPES.get(member.type)
        if member.isdir():
            self.mkdir(path, _attributes(member, stat.S_IFDIR))
        elif member.islnk():
            self._link(path, _inside(member.linkname))
        elif member.issym():
            self.symlink(path, member.linkname)
            self.attributes[path] = _attributes(member, stat.S_IFLNK)
        elif member.isreg():
            self._write_member(path, archive, member)
        elif kind is not None:
            self.attributes[path] = _attributes(member, kind)
            return
        else:
            raise errors.BadRequestError(f"{member.name}: a tar member of unknown type {member.type!r}")
        self._times[path] = member.mtime

    def _write_member(self, path: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        self.remove(path)
        source = archive.extractfile(member)
        permissions = member.mode & 0o777 | stat.S_IRUSR | stat.S_IWUSR
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._place(path), flags, permissions)
        with os.fdopen(descriptor, "wb") as out:
            os.fchmod(out.fileno(), permissions)
            if source is not None:
                shutil.copyfileobj(source, out, _CHUNK)
        self.attributes[path] = _attributes(member, stat.S_IFREG)

    def _link(self, path: str, target: str) -> None:
        if target not in self.attributes or not self.staged(target).lstat():
            raise errors.BadRequestError(f"{path} is a hard link to {target}, which is not there")
        self.remove(path)
        os.link(self._place(target), self._place(path), follow_symlinks=False)
        self.attributes[path] = self.attributes[target]

    def _place(self, path: str) -> Path:
        """Where a path is staged. Its parent must be a directory made here, hence all above it are."""
        parent = path.rpartition("/")[0] or "/"
        if path == "/" or not self._is_directory(parent):
            raise errors.BadRequestError(f"{path}: {parent} is not a directory of the tree")
        return self.staged(path)

    def _is_directory(self, path: str) -> bool:
        found = self.attributes.get(path)
        return found is not None and stat.S_ISDIR(found.mode)


def _inside(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise errors.BadRequestError(f"{name!r} would leave the tree")
    return "/" + "/".join(parts)


def _attributes(member: tarfile.TarInfo, kind: int) -> Attributes:
    xattrs = tuple(
        (name.removeprefix(_XATTR_PREFIX), value.encode(errors="surrogateescape"))
        for name, value in member.pax_headers.items()
        if name.startswith(_XATTR_PREFIX)
    )
    permissions = 0o777 if kind == stat.S_IFLNK else member.mode & 0o7777
    device = (member.devmajor, member.devminor)
    return Attributes(kind | permissions, member.uid, member.gid, device, xattrs)


class _Watched(io.BufferedIOBase):
    """A stream that saw a tar's end mark, or not: tarfile takes a cut archive for a short one."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._tail = b""

    def read(self, size: int | None = -1, /) -> bytes:
        data = self._stream.read(-1 if size is None else size)
        self._tail = (self._tail + data)[-tarfile.BLOCKSIZE :]
        return data

    def check_end(self) -> None:
        while self.read(_CHUNK):
            run.check_cancelled()
        if self._tail != bytes(tarfile.BLOCKSIZE):
            raise errors.BadRequestError("the archive is cut short", hint="make or fetch it again")
