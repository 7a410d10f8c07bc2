# SPDX-License-Identifier: MIT
"""From a recipe, or from a directory made elsewhere, to a published image.

Used by the daemon and by the lab; unprivileged.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from banger import artefacts, run
from banger.contract import decoding, errors, given_names, names
from banger.images import assemble, base, ext4, records
from banger.images import bundle as bundles
from banger.images import recipe as recipes

MIB: Final = 1 << 20
_COPY_BYTES: Final = 64 * MIB
_MAX_RECORD_BYTES: Final = MIB


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
    make: base.Make = base.make,
) -> records.Image:
    """Builds a recipe and publishes the result under its name. What mmdebstrap makes is cached."""
    archive = recipes.base_archive(
        recipe, arch=arch, cache_dir=cache_dir, mirror=mirror, on_line=on_line, make=make
    )
    for file in recipe.tree.file:
        if file.source is not None and on_line is not None:  # the recipe may be a stranger's
            on_line(f"taking {file.source} of this host as {file.path}")
    layer = bundles.Layer(archive, bundles.Compression.NONE, "", archive.stat().st_size)
    return assemble.assemble(
        images,
        bundles.Bundle(reference="", digest="", arch=arch, layers=(layer,)),
        name=name or recipe.name,
        source=f"recipe {recipe.name}",
        guest_binary=guest_binary,
        kernel=recipe.kernel,
        headroom_mib=recipe.headroom_mib,
        steps=recipe.tree.apply,
        on_line=on_line,
    )


def register(images: records.Images, directory: Path, *, name: str = "") -> records.Image:
    """Publishes a copy of an image directory made by another banger, after looking at what it is.

    What its record says and nothing here can confirm is not taken over: when it was made, where it came
    from, of which layers. An image that claimed a reference would be run for what a registry gives.
    """
    parts = (records.ROOTFS, records.WORK_SEED)
    for path in (directory / part for part in (records.RECORD, *parts)):
        if path.exists() and not path.is_file():  # a pipe would be waited for without end
            raise errors.BadRequestError(f"{directory} is not an image directory: {path.name} is not a file")
    try:
        record = decoding.json(_small(directory / records.RECORD), records.Image)
    except OSError as error:
        raise errors.BadRequestError(
            f"{directory} is not an image directory: cannot read {records.RECORD} there: {error.strerror}",
            hint=artefacts.unread(directory, error),
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise errors.BadRequestError(f"{directory} is not an image directory: {error}") from error
    wanted = given_names.parse_artefact_name(name or record.name, "an image")
    given_names.parse_id(record.id, "image id")
    with images.stage(record.id) as staged:
        for part in parts:
            copy_sparse(directory / part, staged / part)
        rootfs = staged / records.ROOTFS
        _verify(rootfs, record)
        stored = rootfs.stat().st_blocks * 512
        return images.publish(
            staged,
            msgspec.structs.replace(
                record,
                name=wanted,
                tags=(),
                stored_bytes=stored,
                source=f"registered {directory}",
                created_at=artefacts.now(),
                reference="",
                digest="",
                layers=(),
            ),
        )


def _small(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(_MAX_RECORD_BYTES + 1)
    if len(data) > _MAX_RECORD_BYTES:
        raise errors.BadRequestError(f"{path} is larger than {_MAX_RECORD_BYTES} bytes, which no record is")
    return data


def promote(images: records.Images, image: records.Image, *, name: str) -> records.Image:
    """Publishes a copy of an image under another name."""
    given_names.parse_artefact_name(name, "an image")
    image_id = names.new_id()
    with images.stage(image_id) as staged:
        try:
            for part in (records.ROOTFS, records.WORK_SEED):
                copy_sparse(images.path(image.id) / part, staged / part)
        except errors.NotFoundError:
            if images.path(image.id).exists():
                raise
            raise errors.NotFoundError(
                f"image {image.name} was deleted while it was copied",
                hint="`banger image list` shows what there is",
            ) from None
        return images.publish(
            staged,
            msgspec.structs.replace(
                image,
                id=image_id,
                name=name,
                tags=(),
                source=f"image {image.name}",
                created_at=artefacts.now(),
            ),
        )


def copy_sparse(source: Path, target: Path) -> None:
    """Copies only what is written: an image is mostly holes."""
    with artefacts.readable(source), source.open("rb") as read, target.open("xb") as write:
        size = os.fstat(read.fileno()).st_size
        write.truncate(size)
        for start, end in _extents(read.fileno(), size):
            for at in range(start, end, _COPY_BYTES):
                artefacts.keep_room(target.parent, f"the copy of {source}")
                _copy_range(read.fileno(), write.fileno(), at, min(at + _COPY_BYTES, end))


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
        copied = _copy_some(source, target, start, end - start)
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


def _verify(rootfs: Path, record: records.Image) -> None:
    if rootfs.stat().st_size != record.size_bytes:
        raise errors.BadRequestError(f"{records.ROOTFS} has another size than its record says")
    ext4.check(rootfs)
    if not ext4.exists(rootfs, names.GUEST_BINARY):
        raise errors.BadRequestError(f"the image lacks {names.GUEST_BINARY}", hint="build or pull it again")
