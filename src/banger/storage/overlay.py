# SPDX-License-Identifier: MIT
"""The overlay: a sparse file with what a VM changes of its root disk, as a device-mapper snapshot store.

The file is as large as the store could ever grow, so a guest that rewrites its whole disk cannot overflow
it; it takes only the blocks that were written. Used by the start pipeline; unprivileged.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from pathlib import Path
from typing import Final

from banger.contract import errors

CHUNK_SECTORS: Final = 8
CHUNK_BYTES: Final = CHUNK_SECTORS * 512
_EXCEPTION_BYTES: Final = 16
_PER_AREA: Final = CHUNK_BYTES // _EXCEPTION_BYTES
_MARGIN_BYTES: Final = 2 << 20
_HEADER = struct.Struct("<IIII")
_MAGIC: Final = 0x70416E53
_VERSION: Final = 1


def store_bytes(base_bytes: int) -> int:
    """The size at which a persistent store with 4 KiB chunks holds every chunk of the base.

    The kernel (drivers/md/dm-snap-persistent.c) puts a header chunk first, then areas: one chunk of
    exceptions and the 256 chunks they describe. It clears an area before it needs it, hence the margin.
    """
    chunks = -(-base_bytes // CHUNK_BYTES)
    areas = -(-chunks // _PER_AREA)
    return (1 + areas + chunks) * CHUNK_BYTES + _MARGIN_BYTES


def ensure(path: Path, *, base_bytes: int) -> bool:
    """Makes the overlay, or finds the one of an earlier start usable. True when this call made it."""
    wanted = store_bytes(base_bytes)
    try:
        found = path.lstat()
    except FileNotFoundError:
        _create(path, wanted)
        return True
    if not stat.S_ISREG(found.st_mode):
        raise errors.OperationFailedError(f"overlay {path} is not a regular file")
    if found.st_size < wanted:
        raise errors.OperationFailedError(
            f"overlay {path} has {found.st_size} bytes, not {wanted}: it is damaged or of another image",
            hint="its VM must be deleted; copy what is on its work disk first",
        )
    _check_header(path)
    return False


def _create(path: Path, size_bytes: int) -> None:
    staged = path.with_name(f".{path.name}.new")
    staged.unlink(missing_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(staged, flags, 0o600)
    try:
        os.ftruncate(descriptor, size_bytes)
        os.fsync(descriptor)  # with the power gone there would be one that is too short
        staged.rename(path)
    except OSError as error:
        with contextlib.suppress(FileNotFoundError):
            staged.unlink()
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise errors.NoSpaceError(f"no space for overlay {path}", hint="free some space") from error
        raise
    finally:
        os.close(descriptor)


def _check_header(path: Path) -> None:
    """All zero before the first use, then what the kernel wrote. It marks a store that failed invalid."""
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    magic, valid, version, chunk_sectors = _HEADER.unpack(header)
    if magic == 0:
        return
    if magic != _MAGIC or version != _VERSION or chunk_sectors != CHUNK_SECTORS:
        raise errors.OperationFailedError(
            f"overlay {path} is not a snapshot store with {CHUNK_BYTES}-byte chunks",
            hint="the file was written by something else; delete its VM",
        )
    if not valid:
        raise errors.OperationFailedError(
            f"overlay {path} was marked invalid by the kernel: a write to it failed",
            hint="the host's disk was probably full; delete its VM, or restore the file",
        )
