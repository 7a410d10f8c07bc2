# SPDX-License-Identifier: MIT
"""Layers onto one file system, by the rules of OCI images, in one pass from the lowest up.

A layer's whiteouts hide what lower layers have, wherever in the layer they stand; its own entries stay. So
what the current layer made is remembered. Whatever a layer claims is bounded, nothing in it can name a place
outside the image, and a refusal says which layer and which member. Used by `assemble`.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from banger import run
from banger.contract import errors
from banger.images import bundle, decompress, paths
from banger.images.mkfs import filesystem
from banger.tarstream import header, reader

WHITEOUT: Final = b".wh."
OPAQUE: Final = b".wh..wh..opq"
_MAX_OLD_LINKS: Final = 1 << 16
_NAMESPACES: Final = (b"user.", b"trusted.", b"security.", b"system.")
"""Of extended attributes, on any file system that a guest's kernel would have."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one image: the bytes of all its layers' tars, and the members in them."""

    max_bytes: int = 1 << 36
    max_members: int = 4_000_000


def flatten(
    fs: filesystem.Filesystem,
    layers: Sequence[bundle.Layer],
    *,
    limits: Limits = Limits(),
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Puts all layers on an empty file system."""
    tree = Tree(fs, limits)
    for number, layer in enumerate(layers, 1):
        if on_line is not None:
            on_line(f"unpacking layer {number} of {len(layers)}, {layer.size_bytes >> 20} MiB")
        tree.add_layer(layer, f"layer {number} of {len(layers)} ({layer.digest[:19] or layer.path.name})")


class Tree:
    """The image so far."""

    def __init__(self, fs: filesystem.Filesystem, limits: Limits = Limits()) -> None:
        self._fs = fs
        self._paths = paths.Paths(fs)
        self._bytes_left = limits.max_bytes
        self._members_left = limits.max_members
        self._upper = _Upper()
        self._cleared = _Inodes()

    def add_layer(self, layer: bundle.Layer, called: str) -> None:
        with decompress.opened(layer, max_bytes=self._bytes_left) as pieces:
            entries = reader.entries(self._counted(pieces), end_is_known=bool(layer.diff_id))
            self.add(entries, called)

    def add(self, entries: Iterable[reader.Entry], called: str) -> None:
        """Puts one layer on what lower ones made."""
        self._upper = _Upper()
        self._cleared = _Inodes()
        entry: reader.Entry | None = None
        where = "after"
        try:
            for entry in entries:
                where = ""
                run.check_cancelled()
                self._count_member()
                self._add(entry)
                where = "after "
        except filesystem.DiskTooSmallError:
            raise  # it is not the layer's fault
        except errors.BadRequestError as error:
            member = f", {where}{header.shown(entry.name)}" if entry is not None else ""
            raise errors.BadRequestError(
                f"{called}{member}: {error.message}", hint=error.hint or _HINT, layer=called
            ) from error

    def _counted(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            self._bytes_left -= len(piece)
            yield piece

    def _count_member(self) -> None:
        self._members_left -= 1
        if self._members_left < 0:
            raise errors.BadRequestError("the image has more members than any image needs")

    # --- members ---

    def _add(self, entry: reader.Entry) -> None:
        parent, name = _divided(entry.name)
        if name.startswith(WHITEOUT):
            self._hide(entry, parent, name)
        elif entry.hard_link:
            self._link(entry, parent, name)
        elif not name:
            self._describe_root(entry)
        else:
            directory = self._paths.make_directory(parent)
            if len(name) > 255:
                raise errors.BadRequestError("its name is longer than 255 bytes")
            self._put(entry, directory[-1], name)

    def _describe_root(self, entry: reader.Entry) -> None:
        if not stat.S_ISDIR(entry.mode):
            raise errors.BadRequestError("it would replace the image's root directory")
        self._fs.set_attributes(self._fs.ROOT, _attributes(entry))

    def _put(self, entry: reader.Entry, directory: int, name: bytes) -> None:
        fs, wanted = self._fs, _attributes(entry)
        kind = stat.S_IFMT(entry.mode)
        found = fs.lookup(directory, name)
        if found is not None:
            if kind == stat.S_IFDIR and self._paths.is_directory(found):
                fs.set_attributes(found, wanted)
                self._upper.add(found)
                return
            self._remove(directory, name, found)
        if kind == stat.S_IFREG:
            made = fs.write(directory, name, wanted, entry.content, size=entry.size)
        elif kind == stat.S_IFDIR:
            made = fs.mkdir(directory, name, wanted)
        elif kind == stat.S_IFLNK:
            made = fs.symlink(directory, name, wanted, entry.target)
        else:
            made = fs.mknod(directory, name, wanted)
        self._upper.add(made)

    def _link(self, entry: reader.Entry, parent: bytes, name: bytes) -> None:
        """One more name for a file of this layer or a lower one. What the header says besides is ignored."""
        if not name:
            raise errors.BadRequestError("it would replace the image's root directory")
        target_parent, target_name = _divided(entry.target, is_link=True)
        holders = self._paths.find_directory(target_parent) if target_name else None
        target = self._fs.lookup(holders[-1], target_name) if holders else None
        if holders is None or target is None:
            raise errors.BadRequestError(
                f"it is a hard link to {header.shown(entry.target)}, which is not there"
            )
        if self._paths.is_directory(target):
            raise errors.BadRequestError("it is a hard link to a directory")
        directory = self._paths.make_directory(parent)[-1]
        if (directory, name) == (holders[-1], target_name):
            raise errors.BadRequestError("it is a hard link to itself")
        found = self._fs.lookup(directory, name)
        if found in holders:
            raise errors.BadRequestError("it is a hard link that would replace the directory of its target")
        if found != target:
            if found is not None:
                self._remove(directory, name, found)
            self._fs.link(directory, name, target)
        self._upper.add_link(directory, name, target)

    def _remove(self, directory: int, name: bytes, found: int) -> None:
        if stat.S_IFMT(self._fs.attributes(found).mode) in (stat.S_IFDIR, stat.S_IFLNK):
            self._paths.forget()
        self._fs.remove(directory, name)

    # --- whiteouts ---

    def _hide(self, entry: reader.Entry, parent: bytes, name: bytes) -> None:
        hidden = name[len(WHITEOUT) :]
        if not stat.S_ISREG(entry.mode) or entry.hard_link or entry.size:
            raise errors.BadRequestError("a whiteout is an empty file and nothing else")
        if name != OPAQUE and (hidden in (b"", b".", b"..") or hidden.startswith(WHITEOUT)):
            raise errors.BadRequestError("it is a whiteout of what no file can be called")
        try:
            directory = self._paths.find_directory(parent)
        except paths.BlockedError:
            return  # umoci hides one by one what was in a directory that the same layer makes a file
        if directory is None:
            return
        if name == OPAQUE:
            self._clear(directory[-1])
        else:
            found = self._fs.lookup(directory[-1], hidden)
            if found is not None:
                self._hide_lower(directory[-1], hidden, found)

    def _clear(self, directory: int) -> bool:
        """Removes what lower layers made in a directory; True when something of this layer is there.

        Once in a layer: what is there after that can only be the layer's own. So marks without end cost a
        look each, however much lies below.
        """
        if directory not in self._cleared:
            for child, below in self._fs.children(directory):
                run.check_cancelled()
                self._hide_lower(directory, child, below)
            self._cleared.add(directory)
        return not self._fs.is_empty(directory)

    def _hide_lower(self, directory: int, name: bytes, inode: int) -> None:
        """Removes what lower layers made, but for the way to what is of this layer.

        Recursion is bounded by `paths.MAX_DEPTH`.
        """
        if self._paths.is_directory(inode):
            stays = self._clear(inode) if self._upper else False
            if inode in self._upper:
                return
            if stays:  # a way to what is new; what the lower layer said of it is hidden
                self._fs.set_attributes(inode, paths.IMPLIED)
                return
        elif inode in self._upper or self._upper.has_link(directory, name):
            return
        self._remove(directory, name, inode)


class _Inodes:
    """A set of inodes, a byte for each there is."""

    def __init__(self) -> None:
        self._marks = bytearray()

    def __contains__(self, inode: int) -> bool:
        return inode < len(self._marks) and self._marks[inode] == 1

    def add(self, inode: int) -> None:
        if inode >= len(self._marks):
            self._marks.extend(bytes(inode + 1024 - len(self._marks)))
        self._marks[inode] = 1


class _Upper:
    """What the current layer made or described: inodes, and new names of old files."""

    def __init__(self) -> None:
        self._inodes = _Inodes()
        self._links: set[tuple[int, bytes]] = set()
        self._some = False

    def __bool__(self) -> bool:
        return self._some

    def __contains__(self, inode: int) -> bool:
        return inode in self._inodes

    def add(self, inode: int) -> None:
        self._inodes.add(inode)
        self._some = True

    def add_link(self, directory: int, name: bytes, inode: int) -> None:
        if inode in self:
            return
        if len(self._links) >= _MAX_OLD_LINKS:
            raise errors.BadRequestError("it is one hard link too many to files of lower layers")
        self._links.add((directory, name))
        self._some = True

    def has_link(self, directory: int, name: bytes) -> bool:
        return (directory, name) in self._links


_HINT: Final = "the image is damaged or hostile; nothing of it was kept"


def _divided(name: bytes, *, is_link: bool = False) -> tuple[bytes, bytes]:
    """Parent and last part of a member's name; of the root the last part is empty.

    Only the root itself may be given as `/`, which some builders do, and hard links, as symbolic links may.
    """
    parent, _, last = name.rpartition(b"/")
    if last in (b"", b".", b".."):
        parts = paths.split(name)
        parent, last = b"/".join(parts[:-1]), parts[-1] if parts else b""
    if name.startswith(b"/") and last and not is_link:
        raise errors.BadRequestError("its name is absolute", hint=_ABSOLUTE_HINT)
    if b".wh." in parent and any(part.startswith(WHITEOUT) for part in parent.split(b"/")):
        raise errors.BadRequestError("it lies in a whiteout")
    return parent, last


_ABSOLUTE_HINT: Final = (
    "make the archive with names relative to its root, as `tar -C ROOT .` does; "
    "of an image, `docker export` or `podman export` a container and import that"
)


def _attributes(entry: reader.Entry) -> filesystem.Attributes:
    mode = entry.mode
    if stat.S_ISLNK(mode):
        mode |= 0o777  # Linux knows no others
    xattrs = entry.xattrs
    if xattrs:  # others are of a Mac's file system, or of btrfs itself
        xattrs = tuple(each for each in xattrs if each[0].startswith(_NAMESPACES))
    return filesystem.Attributes(mode, entry.uid, entry.gid, entry.mtime_ns, entry.device, xattrs)
