# SPDX-License-Identifier: MIT
"""From verified layers to a published image: root disk, work seed, record; all of it or nothing.

Every image gets the guest binary, whatever it had in that place, and room to grow. Nothing here needs
privileges, and nothing of an image is ever a file of its own on the host. Used by the daemon and the lab.
"""

from __future__ import annotations

import contextlib
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from banger import artefacts, pinned
from banger.contract import errors, names
from banger.images import bundle, edit, flatten, paths, records, seed
from banger.images.mkfs import filesystem

MIB: Final = 1 << 20
LABEL: Final = "banger-root"
_HOME: Final = b"root"
_HOME_ATTRIBUTES: Final = filesystem.Attributes(stat.S_IFDIR | 0o700)
_INITS: Final = (
    *(b"sbin/init", b"lib/systemd/systemd", b"usr/lib/systemd/systemd"),
    *(b"etc/init", b"bin/init"),
)
_SHELL: Final = b"bin/sh"
_PIECE: Final = 1 << 20
_SPACE_HINT: Final = "delete images or VMs that are no longer needed, or give the file system more room"

Steps = Callable[[edit.Edits], None]


def assemble(
    images: records.Images,
    bundle: bundle.Bundle,
    *,
    name: str,
    guest_binary: Path,
    kernel: str,
    headroom_mib: int,
    size_bytes: int | None = None,
    source: str = "",
    tags: tuple[str, ...] = (),
    steps: Steps | None = None,
    on_line: Callable[[str], None] | None = None,
) -> records.Image:
    """Makes the image and gives it its name; the root disk is `size_bytes`, or its content with headroom.

    Raises BadRequestError for layers that are refused, NoSpaceError where the disk cannot hold them.
    """
    records.parse_name(name)
    image_id = names.new_id()
    with images.stage(image_id) as staged:
        room = _room(staged, bundle, size_bytes)
        rootfs = staged / records.ROOTFS
        limits = filesystem.Limits(max_bytes=min(room, size_bytes or room))
        try:
            with filesystem.Filesystem(rootfs, limits=limits) as fs:
                flatten.flatten(fs, bundle.layers, on_line=on_line)
                edits = edit.Edits(fs)
                if steps is not None:
                    steps(edits)
                _inject(edits, guest_binary)
                _make_working_dir(fs, bundle.run.working_dir)
                found_init, found_shell = has_init(fs), _has_program(fs, _SHELL)
                _take_home(fs, staged / records.WORK_SEED)
                if on_line is not None:
                    on_line("making the file system")
                size = fs.finish(size_bytes=size_bytes, headroom_bytes=headroom_mib * MIB, label=LABEL)
        except filesystem.DiskTooSmallError as error:
            raise _too_small(error, size_bytes, room) from error
        record = records.Image(
            id=image_id,
            name=name,
            tags=tags,
            arch=bundle.arch,
            size_bytes=size,
            stored_bytes=rootfs.stat().st_blocks * 512,
            source=source or bundle.reference,
            guest_sha256=pinned.sha256_of_path(guest_binary),
            has_init=found_init,
            has_shell=found_shell,
            kernel=kernel,
            created_at=artefacts.now(),
            reference=bundle.reference,
            digest=bundle.digest,
            layers=tuple(
                records.Layer(layer.digest, layer.size_bytes, layer.diff_id)
                for layer in bundle.layers
                if layer.digest
            ),
            run=bundle.run,
        )
        return images.publish(staged, record)


def has_init(fs: filesystem.Filesystem) -> bool:
    """Whether the guest binary will find an init to hand over to."""
    return any(_has_program(fs, path) for path in _INITS)


def _has_program(fs: filesystem.Filesystem, path: bytes) -> bool:
    found = paths.Paths(fs).find(path)
    mode = fs.attributes(found).mode if found is not None else 0
    return stat.S_ISREG(mode) and bool(mode & 0o111)


def _room(staged: Path, bundle: bundle.Bundle, size_bytes: int | None) -> int:
    """What may be written; refuses at once what cannot fit even if nothing is compressed."""
    free = shutil.disk_usage(staged).free - artefacts.RESERVE_BYTES
    needed = sum(layer.size_bytes for layer in bundle.layers)
    if needed > max(free, 0):
        raise errors.NoSpaceError(
            f"{needed // MIB} MiB of layers do not fit on the disk of {staged.parent}", hint=_SPACE_HINT
        )
    if size_bytes is not None and size_bytes % MIB:
        raise errors.BadRequestError(f"a disk of {size_bytes} bytes is not a whole number of MiB")
    return free


def _too_small(
    error: errors.BangerError, size_bytes: int | None, room: int
) -> errors.BadRequestError | errors.NoSpaceError:
    if size_bytes is not None and size_bytes <= room:
        return errors.BadRequestError(
            f"the image does not fit on a disk of {size_bytes // MIB} MiB", hint="choose a larger --size"
        )
    return errors.NoSpaceError(f"the image does not fit on this host's disk: {error}", hint=_SPACE_HINT)


def _inject(edits: edit.Edits, guest_binary: Path) -> None:
    edits.mkdir(names.GUEST_DIR)
    edits.write(names.GUEST_BINARY, _pieces(guest_binary), permissions=0o755)


def _make_working_dir(fs: filesystem.Filesystem, path: str) -> None:
    """What runs an image makes it when it is missing. An image that names nonsense boots all the same."""
    wanted = path.strip("/").encode(errors="surrogateescape")
    if path.startswith("/") and wanted:
        with contextlib.suppress(errors.BadRequestError):
            paths.Paths(fs).make_directory(wanted)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def _take_home(fs: filesystem.Filesystem, archive: Path) -> None:
    """Moves what is in `/root` into the seed; where that is a link, what it leads to."""
    if fs.lookup(fs.ROOT, _HOME) is None:
        fs.mkdir(fs.ROOT, _HOME, _HOME_ATTRIBUTES)
    try:
        home = paths.Paths(fs).make_directory(_HOME)[-1]
    except errors.BadRequestError as error:
        raise errors.BadRequestError(f"/root of the image cannot be used: {error}") from error
    room = shutil.disk_usage(archive.parent).free - artefacts.RESERVE_BYTES
    seed.pack(fs, home, archive, max_bytes=room)
    for name, _ in fs.children(home):
        fs.remove(home, name)
