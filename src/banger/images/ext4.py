# SPDX-License-Identifier: MIT
"""Edits ext4 file systems in files without mounting them and without root, by e2fsprogs.

Edits are collected in a `Script` and given to debugfs in one batch. debugfs reads a line per command and
ends with status 0 whatever happened: names it cannot read back are refused, and any complaint is an error.
Used by `images` and `storage`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from banger import run
from banger.contract import errors

BLOCK_BYTES: Final = 4096
_PACKAGE: Final = "e2fsprogs"
_DEADLINE_S: Final = 300.0
_MAX_LINE_BYTES: Final = 4000
_BANNER = re.compile(rb"^debugfs \d")
_STAT = re.compile(
    r"Inode: (?P<inode>\d+)\s+Type: (?P<kind>[A-Za-z ]+?)\s+Mode:\s+(?P<mode>[0-7]+).*?"
    r"User:\s+(?P<uid>\d+)\s+Group:\s+(?P<gid>\d+).*?Size: (?P<size>\d+)",
    re.DOTALL,
)
_FORMATS: Final = {
    "regular": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "character special": stat.S_IFCHR,
    "block special": stat.S_IFBLK,
    "FIFO": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Stat:
    """What an inode says; `mode` has the type bits."""

    inode: int
    mode: int
    uid: int
    gid: int
    size: int


class Script:
    """A batch of edits. Paths are absolute inside the file system; modes have their type bits."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._contents: list[bytes] = []

    def __bool__(self) -> bool:
        return bool(self._lines)

    def mkdir(self, path: str, *, permissions: int = 0o755, uid: int = 0, gid: int = 0) -> None:
        self._add("mkdir", quote(path))
        self.set_attributes(path, mode=stat.S_IFDIR | permissions, uid=uid, gid=gid)

    def write(self, path: str, data: bytes, *, permissions: int = 0o644, uid: int = 0, gid: int = 0) -> None:
        """A new regular file; use `remove` before it to replace one."""
        self._contents.append(data)
        content = _quoted(self._content_name(len(self._contents) - 1))
        self._in_parent(path, "write", content, _quoted(PurePosixPath(path).name))
        self.set_attributes(path, mode=stat.S_IFREG | permissions, uid=uid, gid=gid)

    def symlink(self, path: str, target: str) -> None:
        self._in_parent(path, "symlink", _quoted(PurePosixPath(path).name), _quoted(target))

    def device(self, path: str, *, mode: int, major: int, minor: int, uid: int = 0, gid: int = 0) -> None:
        name = _quoted(PurePosixPath(path).name)
        if stat.S_ISFIFO(mode):
            self._in_parent(path, "mknod", name, "p")
        else:
            self._in_parent(path, "mknod", name, "c" if stat.S_ISCHR(mode) else "b", str(major), str(minor))
        self.set_attributes(path, mode=mode, uid=uid, gid=gid)

    def remove(self, path: str) -> None:
        self._add("rm", quote(path))

    def set_attributes(
        self, path: str, *, mode: int | None = None, uid: int | None = None, gid: int | None = None
    ) -> None:
        quoted = quote(path)
        if mode is not None:
            if stat.S_IFMT(mode) == 0:
                raise ValueError(f"mode {mode:o} of {path} lacks its type bits")
            self._add("set_inode_field", quoted, "mode", f"0{mode:o}")
        if uid is not None:
            self._id(quoted, "uid", uid)
        if gid is not None:
            self._id(quoted, "gid", gid)

    def set_xattr(self, path: str, name: str, value: bytes) -> None:
        self._contents.append(value)
        content = _quoted(self._content_name(len(self._contents) - 1))
        self._add("ea_set", "-f", content, quote(path), _quoted(name))

    def lines(self, directory: Path) -> str:
        """Writes the contents into a directory and gives the commands that read them from there."""
        for number, data in enumerate(self._contents):
            (directory / str(number)).write_bytes(data)
        return "".join(line.replace(_CONTENT_MARK, str(directory)) + "\n" for line in self._lines)

    @staticmethod
    def _content_name(number: int) -> str:
        return f"{_CONTENT_MARK}/{number}"

    def _id(self, quoted: str, field: str, number: int) -> None:
        if not 0 <= number < 1 << 32:
            raise errors.BadRequestError(f"{field} {number} does not fit into 32 bits")
        self._add("set_inode_field", quoted, field, str(number))

    def _in_parent(self, path: str, *words: str) -> None:
        self._add("cd", quote(str(PurePosixPath(path).parent)))
        self._add(*words)
        self._add("cd", "/")

    def _add(self, *words: str) -> None:
        line = " ".join(words)
        if len(line.encode(errors="surrogateescape")) > _MAX_LINE_BYTES:
            raise errors.BadRequestError("a name is too long for an ext4 edit")
        self._lines.append(line)


_CONTENT_MARK: Final = "//contents"


def quote(path: str) -> str:
    """A path in the form in which debugfs reads back exactly that path; refuses what has none."""
    if not path.startswith("/"):
        raise errors.BadRequestError(f"{path!r} is not an absolute path")
    if any(part in ("..", ".") for part in path.split("/")):
        raise errors.BadRequestError(f"{path!r} is not a plain path")
    return _quoted(path)


def _quoted(text: str) -> str:
    if any(character in text for character in "\n\r\0") or not text:
        raise errors.BadRequestError(f"the name {text!r} cannot be used in an ext4 edit")
    return '"' + text.replace('"', '""') + '"'


def apply(image: Path, script: Script) -> None:
    """Runs the whole batch in one debugfs; the first thing it complains about is raised."""
    if not script:
        return
    with tempfile.TemporaryDirectory(prefix="banger-ext4-") as scratch:
        commands = Path(scratch) / "commands"
        text = script.lines(Path(scratch))
        commands.write_bytes(text.encode(errors="surrogateescape"))
        run.require("debugfs", _PACKAGE)
        result = run.run(["debugfs", "-w", "-f", str(commands), str(image)], deadline_s=_DEADLINE_S)
    complaints = _complaints(result)
    if complaints:
        raise errors.OperationFailedError(
            f"debugfs on {image}: {complaints[0]}", complaints="\n".join(complaints)
        )


def find(image: Path, path: str) -> Stat | None:
    """The inode at a path, links not followed; None when there is nothing."""
    match = _STAT.search(_ask(image, f"stat {quote(path)}"))
    if match is None:
        return None
    kind = _FORMATS.get(match["kind"].strip(), 0)
    return Stat(
        int(match["inode"]),
        kind | int(match["mode"], 8),
        int(match["uid"]),
        int(match["gid"]),
        int(match["size"]),
    )


def exists(image: Path, path: str) -> bool:
    return find(image, path) is not None


def read(image: Path, path: str) -> bytes:
    """The content of a regular file."""
    with tempfile.TemporaryDirectory(prefix="banger-ext4-") as scratch:
        return dump(image, path, Path(scratch) / "content").read_bytes()


def dump(image: Path, path: str, target: Path) -> Path:
    """Copies a regular file out of the file system."""
    found = find(image, path)
    if found is None:
        raise errors.NotFoundError(f"{image.name} has no {path}")
    if not stat.S_ISREG(found.mode):
        raise errors.BadRequestError(f"{path} in {image.name} is not a regular file")
    _ask(image, f"dump {quote(path)} {_quoted(str(target))}", strict=True)
    return target


def chmod(image: Path, path: str, permissions: int) -> None:
    """Changes the permission bits and keeps the type bits: without them an inode is destroyed."""
    found = find(image, path)
    if found is None:
        raise errors.NotFoundError(f"{image.name} has no {path}")
    script = Script()
    script.set_attributes(path, mode=stat.S_IFMT(found.mode) | (permissions & 0o7777))
    apply(image, script)


def chown(image: Path, path: str, *, uid: int, gid: int) -> None:
    script = Script()
    script.set_attributes(path, uid=uid, gid=gid)
    apply(image, script)


def check(image: Path) -> None:
    """A full read-only check; anything to repair is an error."""
    run.require("e2fsck", _PACKAGE)
    run.run(["e2fsck", "-f", "-n", str(image)], deadline_s=_DEADLINE_S)


def make(
    image: Path,
    *,
    size_bytes: int,
    tree: Path | None = None,
    options: tuple[str, ...] = (),
    label: str = "",
    inodes: int = 0,
) -> None:
    """A new file system in a sparse file, filled from a directory. Its root directory belongs to root."""
    if size_bytes % BLOCK_BYTES:
        raise ValueError(f"{size_bytes} is not a multiple of the block size")
    run.require("mkfs.ext4", _PACKAGE)
    with image.open("xb") as file:
        file.truncate(size_bytes)
    fill = ["-d", str(tree)] if tree is not None else []
    extended = ",".join(("root_owner=0:0", *options))
    naming = ["-L", label] if label else []
    if inodes:
        naming += ["-N", str(inodes)]
    try:
        # The size is in blocks of -b and comes from the file: a bare number would be read as KiB.
        run.run(
            [
                "mkfs.ext4",
                "-q",
                "-F",
                "-b",
                str(BLOCK_BYTES),
                "-m",
                "0",
                "-E",
                extended,
                *naming,
                *fill,
                str(image),
            ],
            deadline_s=_DEADLINE_S,
        )
    except BaseException:
        image.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def editing(image: Path) -> Iterator[Script]:
    """Collects edits in the block and applies them at its end, unless the block fails."""
    script = Script()
    yield script
    apply(image, script)


def _ask(image: Path, request: str, *, strict: bool = False) -> str:
    run.require("debugfs", _PACKAGE)
    result = run.run(["debugfs", "-R", request, str(image)], deadline_s=_DEADLINE_S)
    complaints = _complaints(result)
    not_found = any("File not found" in line for line in complaints)
    if complaints and (strict or not not_found):
        raise errors.OperationFailedError(f"debugfs on {image}: {complaints[0]}")
    return result.text


def _complaints(result: run.Result) -> list[str]:
    lines = (line.strip() for line in result.stderr.splitlines())
    return [line.decode(errors="replace") for line in lines if line and not _BANNER.match(line)]
