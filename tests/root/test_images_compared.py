# SPDX-License-Identifier: MIT
"""Images made with GNU tar and umoci: our ext4, mounted, beside the tree that these tools unpack as root.

Type, content, owner, mode, time, links, targets and extended attributes: no difference.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger.images import bundle, ext4, flatten
from banger.images.mkfs import filesystem
from tests.root import compared

COMMAND_S = 120
STRANGER = 61_234
"""Has no name on any host: GNU tar would write that into an archive instead of the number."""
CAPABILITY = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0"


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory on a file system that can hold any attribute."""
    with tempfile.TemporaryDirectory(prefix="banger-compared-", dir="/var/tmp") as name:
        yield Path(name)


@pytest.fixture
def place_in_memory(tmp_path: Path) -> Iterator[Path]:
    """For many files without attributes: a disk is slow to make and remove them."""
    call("mount", "-t", "tmpfs", "-o", "size=3g,nr_inodes=400000", "tmpfs", tmp_path)
    try:
        yield tmp_path
    finally:
        call("umount", "-l", tmp_path)  # one who looks through /tmp may be in it


def call(*argv: str | Path, cwd: Path | None = None) -> None:
    subprocess.run(argv, check=True, cwd=cwd, timeout=COMMAND_S, capture_output=True)


def tar(tree: Path, archive: Path, *options: str) -> Path:
    call(
        *("tar", "-C", tree, "-cf", archive, "--format=pax", "--xattrs", "--xattrs-include=*", "--sparse"),
        *("--numeric-owner", "--sort=name", *options, "."),
    )
    return archive


class Layout:
    """An OCI layout that umoci keeps."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._layout = place / "layout"
        self.image = f"{self._layout}:test"
        call("umoci", "init", "--layout", self._layout)
        call("umoci", "new", "--image", self.image)

    def add(self, archive: Path) -> None:
        call("umoci", "raw", "add-layer", "--image", self.image, archive)

    def add_changes(self, change: Callable[[Path], None]) -> None:
        """A layer as umoci makes it of what was changed in an unpacked tree."""
        with tempfile.TemporaryDirectory(dir=self._place) as name:
            unpacked = Path(name) / "bundle"
            call("umoci", "unpack", "--image", self.image, unpacked)
            change(unpacked / "rootfs")
            call("umoci", "repack", "--refresh-bundle", "--image", self.image, unpacked)

    def unpack(self) -> Path:
        call("umoci", "unpack", "--image", self.image, self._place / "theirs")
        return self._place / "theirs/rootfs"

    def layers(self) -> list[bundle.Layer]:
        index = json.loads((self._layout / "index.json").read_text())
        manifest = json.loads(self._blob(index["manifests"][0]["digest"]).read_text())
        config = json.loads(self._blob(manifest["config"]["digest"]).read_text())
        return [
            bundle.Layer(
                self._blob(layer["digest"]), bundle.Compression.GZIP, layer["digest"], layer["size"], diff_id
            )
            for layer, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True)
        ]

    def _blob(self, digest: str) -> Path:
        return self._layout / "blobs" / digest.replace(":", "/")


def flattened(place: Path, layers: list[bundle.Layer]) -> Path:
    image = place / "ours.ext4"
    with filesystem.Filesystem(image) as fs:
        flatten.flatten(fs, layers)
        fs.finish(headroom_bytes=1 << 20)
    ext4.check(image)
    return image


def assert_same(place: Path, image: Path, theirs: Path) -> None:
    with compared.mounted(image, place / "mounted") as ours:
        assert compared.differences(ours, theirs) == []


def whole(archive: Path) -> bundle.Layer:
    return bundle.Layer(archive, bundle.Compression.NONE, "", archive.stat().st_size)


def untarred(place: Path, archive: Path, *options: str) -> Path:
    theirs = place / "theirs"
    theirs.mkdir()
    call(
        *("tar", "-C", theirs, "-xpf", archive, "--xattrs", "--xattrs-include=*"),
        *("--numeric-owner", "--same-owner", *options),
    )
    return theirs


# --- trees to make archives of ---


def write(path: Path, content: bytes = b"", mode: int = 0o644, uid: int = 0, gid: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.chown(path, uid, gid)
    path.chmod(mode)
    os.utime(path, ns=(0, 1_600_000_000_123_456_789 + len(content)))
    return path


def everything(root: Path) -> None:
    """What a root file system can hold."""
    write(root / "usr/bin/su", b"\x7fELF" * 3000, 0o4755)
    write(root / "usr/bin/mail", b"mail" * 9, 0o2755, gid=8)
    os.link(root / "usr/bin/mail", root / "usr/bin/other")
    write(root / "srv/large-owner", b"x", uid=3_000_000_000, gid=70_000)
    write(root / "etc/old", b"before 1970")
    os.utime(root / "etc/old", ns=(0, -86_400_500_000_000))
    write(root / "empty")
    (root / "lib").symlink_to("usr/lib")
    (root / "usr/lib").mkdir()
    (root / "absolute").symlink_to("/etc/old")
    (root / "long").symlink_to("x" * 900)
    os.symlink("dangling", os.path.join(os.fsencode(root), b"caf\xe9-link"))
    write(root / ("n" * 255), b"long name")
    write(root / "/".join(["deep" * 8] * 12) / "file", b"deep")
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9\nname")).write_bytes(b"no text")
    for name, mode, major, minor in (("null", 0o20666, 1, 3), ("disk", 0o60660, 259, 1000)):
        os.mknod(root / name, mode, os.makedev(major, minor))
    os.mkfifo(root / "pipe", 0o600)
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    (root / "setgid").mkdir()
    os.chown(root / "setgid", 5, 50)
    (root / "setgid").chmod(0o2775)
    with (root / "sparse").open("wb") as file:
        file.truncate(64 << 20)
        for position in (4 << 20, 33 << 20):
            file.seek(position)
            file.write(b"data" * 5000)
    os.utime(root, ns=(0, 1_500_000_000_000_000_000))


def attributes(root: Path) -> None:
    """Capabilities, ACLs and attributes of every class, few and many, small and large."""
    os.setxattr(write(root / "usr/bin/ping", b"ping", 0o755), "security.capability", CAPABILITY)
    os.setxattr(write(root / "note"), "user.note", b"\xff\0=\n")
    os.setxattr(root / "note", "user.empty", b"")
    os.setxattr(root / "note", "trusted.overlay.thing", b"y")
    for number in range(1, 20):
        os.setxattr(root / "note", f"user.number{number}", b"v" * number)
    os.setxattr(write(root / "large"), "user.large", b"x" * 3000)
    call("setfacl", "-m", f"u:{STRANGER}:rwx,g:{STRANGER}:r-x,m::rwx", write(root / "acl", b"x", 0o640))
    (root / "shared").mkdir()
    call("setfacl", "-m", f"u:{STRANGER}:rwx,d:u:{STRANGER}:rwx,d:g::r-x,d:o::---", root / "shared")
    os.setxattr(root / "shared", "user.dir", b"on a directory")
    os.setxattr(root, "user.root", b"on the root")


# --- the comparisons ---


def test_everything_that_a_tree_can_hold(place: Path) -> None:
    (place / "tree").mkdir()
    everything(place / "tree")
    attributes(place / "tree")
    archive = tar(place / "tree", place / "whole.tar")
    assert_same(place, flattened(place, [whole(archive)]), untarred(place, archive))


def test_access_lists_in_words(place: Path) -> None:
    (place / "tree").mkdir()
    attributes(place / "tree")
    archive = tar(place / "tree", place / "whole.tar", "--acls")
    assert_same(place, flattened(place, [whole(archive)]), untarred(place, archive, "--acls"))


def test_an_image_of_one_layer(place: Path) -> None:
    (place / "tree").mkdir()
    everything(place / "tree")
    (place / "tree/sparse").unlink()  # umoci does not know sparse files
    attributes(place / "tree")
    os.removexattr(place / "tree/note", "user.empty")  # to Go's tar an empty value is none
    layout = Layout(place)
    layout.add(tar(place / "tree", place / "whole.tar", "--hole-detection=raw"))
    assert_same(place, flattened(place, layout.layers()), layout.unpack())


def lower(root: Path) -> None:
    for name in (
        "keep/a",
        "keep/b",
        "gone/deep/c",
        "opaque/old",
        "opaque/sub/old",
        "again/old",
        "again/both",
    ):
        write(root / name, name.encode(), uid=7)
    for name in ("file-to-directory", "directory-to-file/x", "link-to-file", "hard/one"):
        write(root / name, b"lower")
    os.link(root / "hard/one", root / "hard/two")
    (root / "usr/lib").mkdir(parents=True, exist_ok=True)
    if not (root / "lib").is_symlink():
        (root / "lib").symlink_to("usr/lib")
    (root / "link-to-directory").symlink_to("keep")
    (root / "keep").chmod(0o750)


def hide(root: Path) -> None:
    """Whiteouts of each form, as they stand in a layer's archive."""
    for name in ("keep/.wh.a", ".wh.gone", ".wh.missing", "opaque/.wh..wh..opq", "again/.wh.old"):
        write(root / name)
    write(root / "opaque/new", b"new in opaque")
    write(root / "again/both", b"upper")
    (root / "again").chmod(0o700)
    write(root / "file-to-directory/inside", b"inside")
    write(root / "directory-to-file", b"a file now")
    write(root / "link-to-file", b"replaced")
    (root / "link-to-directory").mkdir()
    write(root / "link-to-directory/x", b"x")


def test_whiteouts_of_every_form(place: Path) -> None:
    for name, make in (("one", lower), ("two", hide)):
        (place / name).mkdir()
        make(place / name)
    layout = Layout(place)
    for name in ("one", "two"):
        layout.add(tar(place / name, place / f"{name}.tar"))
    # Members below a link, and marks behind and before what they leave alone.
    through = place / "through"
    write(through / "lib/x.so", b"through the link")
    write(through / "again/.wh..wh..opq")
    write(through / "again/later", b"stays")
    write(through / "opaque/.wh.new")
    call(
        *("tar", "-C", through, "-cf", place / "three.tar", "--format=pax", "--no-recursion"),
        *("lib/x.so", "again/later", "again/.wh..wh..opq", "opaque/.wh.new"),
    )
    layout.add(place / "three.tar")
    assert_same(place, flattened(place, layout.layers()), layout.unpack())


def test_layers_that_umoci_makes_of_changes(place: Path) -> None:
    (place / "one").mkdir()
    everything(place / "one")
    (place / "one/sparse").unlink()
    lower(place / "one")
    layout = Layout(place)
    layout.add(tar(place / "one", place / "one.tar", "--hole-detection=raw"))

    def first(root: Path) -> None:
        call("rm", "-r", root / "gone", root / "keep/a", root / "directory-to-file")
        write(root / "directory-to-file", b"file")
        (root / "file-to-directory").unlink()
        write(root / "file-to-directory/inside", b"x")
        (root / "keep").chmod(0o711)
        os.setxattr(write(root / "new/ping", b"ping"), "security.capability", CAPABILITY)

    def second(root: Path) -> None:
        write(root / "gone/back", b"again")
        call("rm", "-r", root / "file-to-directory")
        (root / "usr/bin/su").chmod(0o755)
        os.link(root / "new/ping", root / "new/pong")

    layout.add_changes(first)
    layout.add_changes(second)
    assert_same(place, flattened(place, layout.layers()), layout.unpack())


@pytest.mark.timeout(180)
def test_a_hundred_thousand_small_files(place_in_memory: Path) -> None:
    place = place_in_memory
    root = place / "tree"
    for number in range(400):
        directory = root / f"{number % 20}" / f"{number}"
        directory.mkdir(parents=True)
        for each in range(250):
            descriptor = os.open(directory / f"file-{each}", os.O_CREAT | os.O_WRONLY, 0o644)
            os.write(descriptor, b"%d" % each * (each % 7))
            os.close(descriptor)
    archive = tar(root, place / "whole.tar")
    assert_same(place, flattened(place, [whole(archive)]), untarred(place, archive))
