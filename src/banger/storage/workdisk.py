# SPDX-License-Identifier: MIT
"""The work disk: a file system made at its final size from the image's seed, the guest's `/root`.

It appears under its name only when it is whole, and is user data from then on: nothing here replaces one.
Used by the work disk capability; unprivileged.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from banger.contract import errors
from banger.images.mkfs import filesystem
from banger.storage import seed as seeds

LABEL: Final = "banger-work"
MIB: Final = 1 << 20
_HOME: Final = filesystem.Attributes(stat.S_IFDIR | 0o700)


def create(path: Path, *, size_mib: int, seed: Path | None = None) -> None:
    """Makes the disk; the seed is a tar of what `/root` shall hold, an absent one leaves it empty."""
    if path.exists():
        raise errors.AlreadyExistsError(f"work disk {path} is already there", hint="it is the user's data")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".work-") as scratch:
        staged = Path(scratch) / path.name
        try:
            _make(staged, size_mib * MIB, seed)
        except filesystem.DiskTooSmallError as error:
            raise errors.BadRequestError(
                f"a work disk of {size_mib} MiB is too small for the image's seed",
                hint="choose a larger --disk-size",
            ) from error
        os.link(staged, path)  # unlike a rename, never onto a disk that appeared meanwhile


def _make(staged: Path, size_bytes: int, seed: Path | None) -> None:
    limits = filesystem.Limits(max_bytes=size_bytes)
    with filesystem.Filesystem(staged, limits=limits) as made:
        made.set_attributes(made.ROOT, _HOME)
        if seed is not None and seed.exists():
            seeds.unpack(made, seed)
        made.finish(size_bytes=size_bytes, label=LABEL)
