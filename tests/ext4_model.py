# SPDX-License-Identifier: MIT
"""Random trees: what is done to a file system of ours is done to a plain model as well, to be compared."""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from hypothesis import strategies as st

from banger.images.mkfs.filesystem import Attributes, Filesystem

_KINDS: Final = (
    "file",
    "file",
    "file",
    "directory",
    "directory",
    "symlink",
    "node",
    "link",
    "remove",
    "change",
    "many",
)
_NODES: Final = (
    (stat.S_IFCHR, (1, 3)),
    (stat.S_IFBLK, (259, 70_000)),
    (stat.S_IFIFO, (0, 0)),
    (stat.S_IFSOCK, (0, 0)),
)
_MANY: Final = 300


def _acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NONE: Final = 0xFFFFFFFF
ACL: Final = _acl(
    (1, 6, NONE), (2, 7, 1000), (4, 4, NONE), (8, 5, 100_000), (0x10, 7, NONE), (0x20, 0, NONE)
)
CAPABILITY: Final = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
XATTRS: Final[dict[str, tuple[tuple[bytes, bytes], ...]]] = {
    "plain": (),
    "small": ((b"trusted.small", b"x"),),
    "empty": ((b"trusted.empty", b""),),
    "large": ((b"trusted.large", bytes(range(256)) * 8), (b"trusted.small", b"y")),
    "many": tuple((b"trusted.n%02d" % number, b"%d" % number * number) for number in range(40)),
}
FILE_XATTRS: Final[dict[str, tuple[tuple[bytes, bytes], ...]]] = XATTRS | {
    "capability": ((b"security.capability", CAPABILITY),),
    "acl": ((b"system.posix_acl_access", ACL), (b"user.comment", b"\0binary\xff")),
}
DIRECTORY_XATTRS: Final[dict[str, tuple[tuple[bytes, bytes], ...]]] = XATTRS | {
    "acl": ((b"system.posix_acl_access", ACL), (b"system.posix_acl_default", ACL)),
}


@dataclass(eq=False)
class Node:
    """A file of the model; two names of one file are one node."""

    attributes: Attributes
    content: bytes = b""
    """Of a link, its target."""
    children: dict[bytes, Node] = field(default_factory=dict)
    links: int = 1
    inode: int = 0

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.attributes.mode)

    def walk(self, path: bytes = b"") -> Iterator[tuple[bytes, Node]]:
        yield path or b"/", self
        for name, child in self.children.items():
            yield from child.walk(path + b"/" + name)


@dataclass(frozen=True)
class Step:
    """One thing to do, at a place that is counted out among those there are."""

    kind: str
    place: int
    other: int
    name: bytes
    permissions: int
    owner: tuple[int, int]
    mtime_ns: int
    content: bytes
    xattrs: str

    def attributes(self, kind: int, device: tuple[int, int] = (0, 0)) -> Attributes:
        table = {stat.S_IFREG: FILE_XATTRS, stat.S_IFDIR: DIRECTORY_XATTRS}.get(kind, XATTRS)
        xattrs = table.get(self.xattrs, ())
        return Attributes(kind | self.permissions, *self.owner, self.mtime_ns, device, xattrs)


_ids = st.sampled_from([0, 1, 65535, 65536, 4_294_967_294])
_contents = st.lists(
    st.tuples(
        st.sampled_from([b"\0", b"a", b"z"]),
        st.sampled_from([0, 1, 100, 4095, 4096, 4097, 12_288, 70_000]),
    ),
    max_size=6,
).map(lambda parts: b"".join(letter * count for letter, count in parts))
_names = st.binary(min_size=1, max_size=40).map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"_"))
_steps = st.builds(
    Step,
    kind=st.sampled_from(_KINDS),
    place=st.integers(0, 50),
    other=st.integers(0, 50),
    name=_names.filter(lambda name: name not in (b".", b"..", b"lost+found")),
    permissions=st.integers(0, 0o7777),
    owner=st.tuples(_ids, _ids),
    mtime_ns=st.integers(-(1 << 31) * 10**9, 10_737_418_239 * 10**9),
    content=_contents,
    xattrs=st.sampled_from(sorted(FILE_XATTRS)),
)
steps = st.lists(_steps, max_size=60)


def build(made: Filesystem, todo: list[Step]) -> Node:
    """Does it all, to the file system and to the model."""
    root = Node(Attributes(stat.S_IFDIR | 0o755), links=2, inode=made.ROOT)
    for step in todo:
        _Builder(made, root).do(step)
    return root


class _Builder:
    def __init__(self, made: Filesystem, root: Node) -> None:
        self.made = made
        self.root = root
        self.nodes = [node for _, node in root.walk()]
        self.directories = [node for node in self.nodes if node.is_directory]

    def do(self, step: Step) -> None:
        directory = self.directories[step.place % len(self.directories)]
        if step.kind == "change":
            self._change(self.nodes[step.place % len(self.nodes)], step)
        elif step.kind == "remove":
            if directory.children:
                self._remove(directory, sorted(directory.children)[step.other % len(directory.children)])
        elif step.kind == "many":
            for number in range(_MANY):
                self._add(directory, b"%s-%03d" % (step.name[:30], number), step, "file")
        else:
            self._add(directory, step.name, step, step.kind)

    def _add(self, directory: Node, name: bytes, step: Step, kind: str) -> None:
        if name in directory.children:
            self._remove(directory, name)
        node = {
            "file": self._file,
            "directory": self._directory,
            "symlink": self._symlink,
            "node": self._node,
            "link": self._link,
        }[kind](directory, name, step)
        if node is not None:
            directory.children[name] = node

    def _file(self, directory: Node, name: bytes, step: Step) -> Node:
        wanted = step.attributes(stat.S_IFREG)
        pieces = [step.content[at : at + 5000] for at in range(0, len(step.content), 5000)]
        inode = self.made.write(directory.inode, name, wanted, pieces, size=len(step.content))
        return Node(wanted, step.content, inode=inode)

    def _directory(self, directory: Node, name: bytes, step: Step) -> Node:
        wanted = step.attributes(stat.S_IFDIR)
        directory.links += 1
        return Node(wanted, links=2, inode=self.made.mkdir(directory.inode, name, wanted))

    def _symlink(self, directory: Node, name: bytes, step: Step) -> Node:
        wanted = step.attributes(stat.S_IFLNK)
        target = (step.content.replace(b"\0", b"n") or b"t")[: 1 + step.other * 80]
        inode = self.made.symlink(directory.inode, name, wanted, target[:4095])
        return Node(wanted, target[:4095], inode=inode)

    def _node(self, directory: Node, name: bytes, step: Step) -> Node:
        wanted = step.attributes(*_NODES[step.other % len(_NODES)])
        return Node(wanted, inode=self.made.mknod(directory.inode, name, wanted))

    def _link(self, directory: Node, name: bytes, step: Step) -> Node | None:
        living = {id(node) for _, node in self.root.walk()}
        others = [node for node in self.nodes if not node.is_directory and id(node) in living]
        if not others:
            return None
        node = others[step.other % len(others)]
        node.links += 1
        self.made.link(directory.inode, name, node.inode)
        return node

    def _change(self, node: Node, step: Step) -> None:
        node.attributes = step.attributes(stat.S_IFMT(node.attributes.mode), node.attributes.device)
        self.made.set_attributes(node.inode, node.attributes)

    def _remove(self, directory: Node, name: bytes) -> None:
        self.made.remove(directory.inode, name)
        node = directory.children.pop(name)
        directory.links -= node.is_directory
        for _, each in node.walk():
            each.links -= not each.is_directory
