# SPDX-License-Identifier: MIT
"""Layers onto one another by the rules of OCI images: case by case, and against a model of the rules."""

from __future__ import annotations

import dataclasses
import itertools
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies

from banger.contract import errors
from banger.images import bundle, flatten
from banger.images.mkfs import filesystem
from banger.tarstream import reader
from tests.unit import tars
from tests.unit.tars import directory, file, hard_link, opaque, pax, symlink, tar, whiteout


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[filesystem.Filesystem]:
    with filesystem.Filesystem(tmp_path / "image.ext4") as made:
        yield made


LOWER = tar(
    directory(b"./"),
    directory(b"./etc", 0o750, uid=3),
    file(b"./etc/a", b"lower a"),
    file(b"./etc/b", b"lower b"),
    directory(b"./etc/deep/er"),
    file(b"./etc/deep/er/c", b"lower c"),
    directory(b"./usr/lib"),
    symlink(b"./lib", b"usr/lib"),
    symlink(b"./absolute", b"/usr/lib"),
)
LOWER_NAMES = {
    *(b"etc", b"etc/a", b"etc/b", b"etc/deep", b"etc/deep/er", b"etc/deep/er/c"),
    *(b"usr", b"usr/lib", b"lib", b"absolute"),
}


def names(fs: filesystem.Filesystem) -> set[bytes]:
    return set(tars.listing(fs))


def test_a_whiteout_hides_a_file_and_a_directory(fs: filesystem.Filesystem) -> None:
    tars.put(fs, [LOWER, tar(whiteout(b"etc/a"), whiteout(b"etc/deep"), whiteout(b"nothing/here"))])
    assert names(fs) == LOWER_NAMES - {b"etc/a", b"etc/deep", b"etc/deep/er", b"etc/deep/er/c"}


@pytest.mark.parametrize("first", [True, False], ids=["mark first", "mark last"])
@pytest.mark.parametrize("mark", [opaque(b"etc"), whiteout(b"etc")], ids=["opaque", "whiteout"])
def test_what_the_same_layer_brings_stays(first: bool, mark: bytes, fs: filesystem.Filesystem) -> None:
    own = [directory(b"etc", 0o700), file(b"etc/b", b"new"), file(b"etc/deep/new", b"n")]
    tars.put(fs, [LOWER, tar(mark, *own) if first else tar(*own, mark)])
    found = tars.listing(fs)
    assert {name: found[name] for name in found if name.startswith(b"etc")} == {
        b"etc": "drwx------ 0",
        b"etc/b": "-rw-r--r-- 0 x1 new",
        b"etc/deep": "drwxr-xr-x 0",
        b"etc/deep/new": "-rw-r--r-- 0 x1 n",
    }


def test_an_opaque_root_hides_all_that_is_lower(fs: filesystem.Filesystem) -> None:
    tars.put(fs, [LOWER, tar(file(b"new", b"x"), file(b".wh..wh..opq"))])
    assert names(fs) == {b"new"}


def test_a_whiteout_hides_nothing_of_its_own_layer(fs: filesystem.Filesystem) -> None:
    tars.put(fs, [tar(file(b"x", b"1"), whiteout(b"x"), file(b"y", b"2"), whiteout(b"y"))])
    assert names(fs) == {b"x", b"y"}


class Listed(filesystem.Filesystem):
    """Counts what it lists."""

    count = 0

    def children(self, directory: int) -> Iterator[tuple[bytes, int]]:
        for child in super().children(directory):
            self.count += 1
            yield child


@pytest.mark.parametrize("of_lower", [True, False], ids=["lower", "own"])
@pytest.mark.parametrize(
    "mark",
    [opaque(b"d"), opaque(b"link"), opaque(b"."), whiteout(b"d"), whiteout(b"d/deep")],
    ids=["opaque", "through a link", "above", "whiteout", "whiteout of a part"],
)
def test_marks_without_end_are_one_walk(mark: bytes, of_lower: bool, tmp_path: Path) -> None:
    """5,000 files and 5,000 marks were 25,000,000 looks; megabytes of them were years."""
    files = tar(symlink(b"link", b"d"), *(file(b"d/deep/%d" % number) for number in range(5_000)))
    own, marks = file(b"d/deep/own"), [mark] * 5_000
    layers = [files, tar(own, *marks)] if of_lower else [files.removesuffix(tars.END) + tar(own, *marks)]
    with Listed(tmp_path / "image.ext4") as fs:
        tars.put(fs, layers)
        assert fs.count < 20_000
        assert fs.lookup(fs.lookup(fs.lookup(fs.ROOT, b"d") or 0, b"deep") or 0, b"own")


def test_a_directory_that_a_mark_emptied_can_be_hidden_itself(fs: filesystem.Filesystem) -> None:
    layer = tar(
        file(b"new"), opaque(b"etc"), whiteout(b"etc"), opaque(b"usr"), file(b"usr/own"), whiteout(b"usr")
    )
    tars.put(fs, [LOWER, layer])
    assert names(fs) == {b"new", b"usr", b"usr/own", b"lib", b"absolute"}


def test_a_file_replaces_a_directory_and_the_reverse(fs: filesystem.Filesystem) -> None:
    tars.put(
        fs, [LOWER, tar(file(b"etc/deep", b"file"), directory(b"etc/a", 0o711), file(b"etc/a/in", b"x"))]
    )
    found = tars.listing(fs)
    assert found[b"etc/deep"] == "-rw-r--r-- 0 x1 file"
    assert found[b"etc/a"] == "drwx--x--x 0"
    assert b"etc/deep/er" not in found


def test_a_whiteout_below_what_became_a_file_hides_nothing(fs: filesystem.Filesystem) -> None:
    tars.put(fs, [LOWER, tar(file(b"etc", b"x"), whiteout(b"etc/a"), opaque(b"etc/deep"))])
    assert tars.listing(fs)[b"etc"] == "-rw-r--r-- 0 x1 x"


def test_a_directory_said_again_keeps_what_is_in_it(fs: filesystem.Filesystem) -> None:
    tars.put(fs, [LOWER, tar(directory(b"etc/", 0o1777, uid=9))])
    assert names(fs) == LOWER_NAMES
    assert tars.listing(fs)[b"etc"] == "drwxrwxrwt 9"


def test_the_root_is_described_like_any_directory(fs: filesystem.Filesystem) -> None:
    tars.put(fs, [LOWER, tar(pax((b"mtime", b"7.25")), directory(b"./", 0o711, uid=4))])
    about = fs.attributes(fs.ROOT)
    assert (about.mode, about.uid, about.mtime_ns) == (stat.S_IFDIR | 0o711, 4, 7_250_000_000)
    tars.put(fs, [tar(directory(b"/", 0o755))])
    assert fs.attributes(fs.ROOT).mode == stat.S_IFDIR | 0o755


@pytest.mark.parametrize("way", [b"lib", b"./lib/", b"absolute", b"usr//lib"])
def test_members_go_through_links_of_lower_layers(way: bytes, fs: filesystem.Filesystem) -> None:
    tars.put(fs, [LOWER, tar(file(way + b"/x.so", b"x")), tar(hard_link(b"hard", way + b"/x.so"))])
    assert names(fs) == LOWER_NAMES | {b"usr/lib/x.so", b"hard"}
    tars.put(fs, [tar(), tar(whiteout(way.rstrip(b"/") + b"/x.so"))])
    assert names(fs) == LOWER_NAMES | {b"hard"}


def test_a_link_that_dangles_is_completed_inside(fs: filesystem.Filesystem) -> None:
    tars.put(fs, [tar(symlink(b"data", b"/var/lib/data"), file(b"data/x", b"x"))])
    assert names(fs) == {b"data", b"var", b"var/lib", b"var/lib/data", b"var/lib/data/x"}


def test_a_link_replaced_by_a_directory_is_not_followed_any_more(fs: filesystem.Filesystem) -> None:
    layers = [LOWER, tar(file(b"lib/x", b"1"), directory(b"lib"), file(b"lib/y", b"2"))]
    tars.put(fs, layers)
    assert names(fs) == LOWER_NAMES | {b"usr/lib/x", b"lib/y"}


def test_hard_links_across_layers(fs: filesystem.Filesystem) -> None:
    tars.put(fs, [LOWER, tar(hard_link(b"other", b"./etc/a")), tar(hard_link(b"third", b"/other"))])
    assert tars.listing(fs)[b"other"] == "-rw-r--r-- 0 x3 lower a"
    tars.put(fs, [tar(), tar(file(b"etc/a", b"new"), whiteout(b"third"))])
    found = tars.listing(fs)
    assert (found[b"etc/a"], found[b"other"]) == ("-rw-r--r-- 0 x1 new", "-rw-r--r-- 0 x1 lower a")


def test_a_new_name_of_an_old_file_is_of_its_layer(fs: filesystem.Filesystem) -> None:
    tars.put(fs, [LOWER, tar(hard_link(b"etc/new", b"etc/a"), opaque(b"etc"))])
    assert {name for name in names(fs) if name.startswith(b"etc")} == {b"etc", b"etc/new"}


def test_nodes_are_data(fs: filesystem.Filesystem) -> None:
    nodes = tar(
        tars.header(b"dev/null", b"3", mode=0o666, device=(1, 3)),
        tars.header(b"dev/sda", b"4", mode=0o660, device=(8, 0)),
        tars.header(b"dev/pipe", b"6", mode=0o600),
    )
    tars.put(fs, [nodes])
    found = tars.listing(fs)
    assert found[b"dev/null"] == "crw-rw-rw- 0 1:3"
    assert found[b"dev/sda"] == "brw-rw---- 0 8:0"
    assert found[b"dev/pipe"] == "prw------- 0 0:0"


def test_everything_a_member_says_arrives(fs: filesystem.Filesystem) -> None:
    said = pax(
        (b"mtime", b"1700000000.123456789"),
        (b"SCHILY.xattr.security.capability", b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        (b"SCHILY.xattr.user.note", b"\xff\0="),
    )
    tars.put(fs, [tar(said, file(b"su\xff", b"x", mode=0o4755, uid=70000, gid=5))])
    inode = fs.lookup(fs.ROOT, b"su\xff")
    assert inode is not None
    assert fs.attributes(inode) == filesystem.Attributes(
        stat.S_IFREG | 0o4755,
        70000,
        5,
        1_700_000_000_123_456_789,
        xattrs=(
            (b"security.capability", b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
            (b"user.note", b"\xff\0="),
        ),
    )


def test_attributes_that_no_linux_has_are_left_out(fs: filesystem.Filesystem) -> None:
    records = (
        (b"SCHILY.xattr.com.apple.provenance", b"\x01\x02"),
        (b"SCHILY.xattr.user.note", b"kept"),
        (b"SCHILY.xattr.btrfs.compression", b"zstd"),
    )
    tars.put(fs, [tar(pax(*records), file(b"f"))])
    found = fs.lookup(fs.ROOT, b"f")
    assert found is not None
    assert fs.attributes(found).xattrs == ((b"user.note", b"kept"),)


def test_layers_of_every_compression(fs: filesystem.Filesystem, tmp_path: Path) -> None:
    said: list[str] = []
    layers = [
        tars.layer(tmp_path / "one", LOWER, bundle.Compression.GZIP),
        tars.layer(tmp_path / "two", tar(file(b"top", b"t"))),
    ]
    flatten.flatten(fs, layers, on_line=said.append)
    assert names(fs) == LOWER_NAMES | {b"top"}
    assert [line.split(",")[0] for line in said] == ["unpacking layer 1 of 2", "unpacking layer 2 of 2"]


def test_a_layer_that_is_not_what_was_announced(fs: filesystem.Filesystem, tmp_path: Path) -> None:
    layer = dataclasses.replace(tars.layer(tmp_path / "one", LOWER), diff_id=f"sha256:{'1' * 64}")
    with pytest.raises(errors.BadRequestError, match=r"layer 1 of 1 .* and not sha256:111"):
        flatten.flatten(fs, [layer])


# --- against a model of the rules ---

Path_ = tuple[bytes, ...]


@dataclasses.dataclass(eq=False)
class Node:
    """A file, link or directory; hard links are the same node under two paths."""

    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class Member:
    kind: str
    path: Path_
    target: Path_ = ()
    mode: int = 0o755
    text: str = ""


Tree = dict[Path_, Node]
_IMPLIED = "drwxr-xr-x 0"


def below(path: Path_, parent: Path_) -> bool:
    return path[: len(parent)] == parent and path != parent


def parents(path: Path_) -> Iterator[Path_]:
    return (path[:end] for end in range(1, len(path)))


def model(lower: Tree, layer: list[Member]) -> Tree:
    """First everything that the layer hides is gone, then what it brings is put in place."""
    tree = dict(lower)
    for member in layer:
        if member.kind == "whiteout":
            gone = [path for path in tree if path == member.path or below(path, member.path)]
        elif member.kind == "opaque":
            gone = [path for path in tree if below(path, member.path)]
        else:
            continue
        for path in gone:
            del tree[path]
    for member in layer:
        bring(tree, member)
    return tree


def bring(tree: Tree, member: Member) -> None:
    if member.kind in ("whiteout", "opaque"):
        return
    for parent in parents(member.path):
        tree.setdefault(parent, Node("dir", _IMPLIED))
    node = tree[member.target] if member.kind == "hard" else Node(member.kind, described(member))
    old = tree.get(member.path)
    if not (old is not None and old.kind == node.kind == "dir"):
        for path in [path for path in tree if below(path, member.path)]:
            del tree[path]
    tree[member.path] = node


def described(member: Member) -> str:
    if member.kind == "dir":
        return f"{stat.filemode(stat.S_IFDIR | member.mode)} 0"
    if member.kind == "link":
        return f"lrwxrwxrwx 0 > {member.text}"
    return member.text


def makes_sense(lower: Tree, so_far: Tree, member: Member) -> bool:
    """Whether no reader would refuse the member, or go through a link with it, wherever whiteouts stand."""
    for tree in (lower, so_far):
        if any(tree[parent].kind != "dir" for parent in parents(member.path) if parent in tree):
            return False
    if member.kind != "hard":
        return True
    return (
        member.target in so_far
        and so_far[member.target].kind == "file"
        and member.target != member.path
        and not below(member.target, member.path)
    )


PARTS = strategies.sampled_from([b"a", b"b", b"c"])
PATHS = strategies.lists(PARTS, min_size=1, max_size=3).map(tuple)
MEMBERS = strategies.builds(
    Member,
    kind=strategies.sampled_from(["file", "file", "dir", "link", "hard"]),
    path=PATHS,
    target=PATHS,
    mode=strategies.sampled_from([0o700, 0o755, 0o1777]),
    text=strategies.text("xyz", min_size=1, max_size=3),
)
MARKS = strategies.builds(Member, kind=strategies.sampled_from(["whiteout", "opaque"]), path=PATHS)


@strategies.composite
def stacks(draw: strategies.DrawFn) -> list[tuple[list[Member], Tree]]:
    """Layers with what the image is after each."""
    found: list[tuple[list[Member], Tree]] = []
    lower: Tree = {}
    for _ in range(draw(strategies.integers(1, 4))):
        marks = draw(strategies.lists(MARKS, max_size=3))
        so_far = model(lower, marks)
        own: list[Member] = []
        for member in draw(strategies.lists(MEMBERS, max_size=8)):
            if makes_sense(lower, so_far, member):
                own.append(member)
                bring(so_far, member)
        layer = list(own)
        for mark in marks:
            layer.insert(draw(strategies.integers(0, len(layer))), mark)
        lower = model(lower, layer)
        found.append((layer, lower))
    return found


def encode(member: Member) -> bytes:
    name = b"/".join(member.path)
    match member.kind:
        case "whiteout":
            return whiteout(name)
        case "opaque":
            return opaque(name)
        case "dir":
            return directory(name, member.mode)
        case "link":
            return symlink(name, member.text.encode())
        case "hard":
            return hard_link(name, b"/".join(member.target))
        case _:
            return file(name, member.text.encode())


def shown(tree: Tree) -> dict[bytes, str]:
    found: dict[bytes, str] = {}
    for path, node in tree.items():
        links = sum(other is node for other in tree.values())
        text = f"-rw-r--r-- 0 x{links} {node.text}" if node.kind == "file" else node.text
        found[b"/".join(path)] = text
    return found


@hypothesis.given(stack=stacks())
@hypothesis.settings(
    deadline=None, max_examples=400, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
def test_any_stack_of_layers_is_what_the_rules_say(stack: list[tuple[list[Member], Tree]]) -> None:
    with (
        tempfile.TemporaryDirectory() as scratch,
        filesystem.Filesystem(Path(scratch) / "image") as fs,
    ):
        tree = flatten.Tree(fs)
        for number, (layer, expected) in enumerate(stack):
            data = tar(*map(encode, layer))
            tree.add(reader.entries(tars.pieces(data)), str(number))
            assert tars.listing(fs) == shown(expected)


@hypothesis.given(stack=stacks())
@hypothesis.settings(deadline=None, max_examples=50)
def test_where_whiteouts_stand_makes_no_difference(stack: list[tuple[list[Member], Tree]]) -> None:
    lower, (last, _) = [layer for layer, _ in stack[:-1]], stack[-1]
    marks = [member for member in last if member.kind in ("whiteout", "opaque")]
    own = [member for member in last if member not in marks]
    seen = []
    for order in ([*marks, *own], [*own, *marks]):
        with (
            tempfile.TemporaryDirectory() as scratch,
            filesystem.Filesystem(Path(scratch) / "image") as fs,
        ):
            tars.put(fs, [tar(*map(encode, layer)) for layer in itertools.chain(lower, [order])])
            seen.append(tars.listing(fs))
    assert seen[0] == seen[1]
