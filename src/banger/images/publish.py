# SPDX-License-Identifier: MIT
"""From a staged tree, or from a directory made elsewhere, to a published image.

Every image gets the guest binary, a work seed packed from its `/root`, and a root disk with room to grow.
Used by the daemon and by the lab; unprivileged.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from banger import artefacts, pinned, run
from banger.contract import errors, names
from banger.images import ext4, records
from banger.images import recipe as recipes
from banger.images import tree as trees

MIB: Final = 1 << 20
_HOME: Final = "/root"
_INITS: Final = ("/sbin/init", "/lib/systemd/systemd", "/usr/lib/systemd/systemd", "/etc/init", "/bin/init")
# Zeroed now, which costs nothing in a sparse file, and not by every guest into its overlay.
_EXT4_OPTIONS: Final = ("lazy_itable_init=0", "lazy_journal_init=0")
_METADATA_SHARE: Final = 20
_COPY_BYTES: Final = 64 * MIB


def build(
    images: records.Images,
    recipe: recipes.Recipe,
    *,
    arch: str,
    cache_dir: Path,
    guest_binary: Path,
    name: str = "",
    mirror: str = "",
    on_line: Callable[[str], None] | None = None,
) -> records.Image:
    """Builds a recipe and publishes the result under its name. What mmdebstrap makes is cached."""
    say = on_line or _silent
    archive = recipes.base_archive(recipe, arch=arch, cache_dir=cache_dir, mirror=mirror, on_line=on_line)
    with artefacts.scratch_directory(cache_dir) as scratch:
        say("unpacking")
        tree = trees.Tree(scratch / "tree")
        with archive.open("rb") as stream:
            tree.unpack(stream)
        recipe.tree.apply(tree)
        say("making the file system")
        return publish(
            images,
            tree,
            name=name or recipe.name,
            arch=arch,
            source=f"recipe {recipe.name}",
            guest_binary=guest_binary,
            kernel=recipe.kernel,
            headroom_mib=recipe.headroom_mib,
        )


def publish(
    images: records.Images,
    tree: trees.Tree,
    *,
    name: str,
    arch: str,
    source: str,
    guest_binary: Path,
    kernel: str,
    headroom_mib: int,
) -> records.Image:
    """Makes an image of a tree. The tree is used up: its `/root` is emptied."""
    names.parse_artefact_name(name, "an image")
    image_id = names.new_id()
    tree.mkdir(names.GUEST_DIR)
    tree.write(names.GUEST_BINARY, guest_binary.read_bytes(), permissions=0o755)
    with images.stage(image_id) as staged:
        _pack_seed(tree, staged / records.WORK_SEED)
        size_bytes = _disk_size(tree.content_bytes(), headroom_mib)
        rootfs = staged / records.ROOTFS
        tree.make_ext4(rootfs, size_bytes=size_bytes, options=_EXT4_OPTIONS, label="banger-root")
        record = records.Image(
            id=image_id,
            name=name,
            arch=arch,
            size_bytes=size_bytes,
            stored_bytes=rootfs.stat().st_blocks * 512,
            source=source,
            guest_sha256=pinned.sha256_of_path(guest_binary),
            has_init=has_init(tree),
            kernel=kernel,
            created_at=artefacts.now(),
        )
        return images.publish(staged, record)


def register(images: records.Images, directory: Path, *, name: str = "") -> records.Image:
    """Publishes a copy of an image directory made by another banger, after looking at what it is."""
    try:
        record = msgspec.json.decode((directory / records.RECORD).read_bytes(), type=records.Image)
    except (OSError, msgspec.DecodeError) as error:
        raise errors.BadRequestError(f"{directory} is not an image directory: {error}") from error
    wanted = names.parse_artefact_name(name or record.name, "an image")
    names.parse_id(record.id, "image id")
    with images.stage(record.id) as staged:
        for part in (records.ROOTFS, records.WORK_SEED):
            copy_sparse(directory / part, staged / part)
        rootfs = staged / records.ROOTFS
        _verify(rootfs, record)
        stored = rootfs.stat().st_blocks * 512
        return images.publish(staged, msgspec.structs.replace(record, name=wanted, stored_bytes=stored))


def has_init(tree: trees.Tree) -> bool:
    """Whether the guest binary will find an init to hand over to."""
    for path in _INITS:
        found = tree.resolve(path)
        if (
            found is not None
            and stat.S_ISREG(tree.attributes[found].mode)
            and tree.attributes[found].mode & 0o111
        ):
            return True
    return False


def copy_sparse(source: Path, target: Path) -> None:
    """Copies only what is written: an image is mostly holes."""
    try:
        with source.open("rb") as read, target.open("xb") as write:
            size = os.fstat(read.fileno()).st_size
            write.truncate(size)
            for start, end in _extents(read.fileno(), size):
                _copy_range(read.fileno(), write.fileno(), start, end)
    except FileNotFoundError as error:
        raise errors.NotFoundError(f"there is no file {source}") from error


def _extents(descriptor: int, size: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    position = 0
    while position < size:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            break
        position = os.lseek(descriptor, start, os.SEEK_HOLE)
        found.append((start, position))
    return found


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        run.check_cancelled()
        copied = _copy_some(source, target, start, min(_COPY_BYTES, end - start))
        if copied == 0:
            raise errors.OperationFailedError("a file became shorter while it was copied")
        start += copied


def _copy_some(source: int, target: int, start: int, count: int) -> int:
    """Shares blocks where the file system can; between two file systems the bytes are copied."""
    try:
        return os.copy_file_range(source, target, count, start, start)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    os.lseek(target, start, os.SEEK_SET)
    return os.sendfile(target, source, start, count)


def _pack_seed(tree: trees.Tree, archive: Path) -> None:
    """The work disk is mounted over `/root`: what an image has there becomes the disk's first content."""
    if not tree.exists(_HOME):
        tree.mkdir(_HOME, trees.Attributes(stat.S_IFDIR | 0o700))
    home = tree.attributes[_HOME]
    if not stat.S_ISDIR(home.mode):
        raise errors.BadRequestError(f"{_HOME} of the image is not a directory")
    tree.pack(_HOME, archive)
    tree.remove(_HOME)
    tree.mkdir(_HOME, home)


def _disk_size(content_bytes: int, headroom_mib: int) -> int:
    wanted = content_bytes + content_bytes // _METADATA_SHARE + headroom_mib * MIB
    return -(-wanted // MIB) * MIB


def _verify(rootfs: Path, record: records.Image) -> None:
    if rootfs.stat().st_size != record.size_bytes:
        raise errors.BadRequestError(f"{records.ROOTFS} has another size than its record says")
    ext4.check(rootfs)
    if not ext4.exists(rootfs, names.GUEST_BINARY):
        raise errors.BadRequestError(f"the image lacks {names.GUEST_BINARY}", hint="build or pull it again")


def _silent(line: str) -> None:
    del line
