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
from banger.images import tree as trees

LABEL: Final = "banger-work"
MIB: Final = 1 << 20
# A sparse file reads as zeros, so nothing needs to be written but the used part.
_OPTIONS: Final = ("lazy_itable_init=1", "lazy_journal_init=1")
_PRIVATE: Final = trees.Attributes(stat.S_IFDIR | 0o700)
_SSH: Final = "/.ssh"
_AUTHORIZED_KEYS: Final = "/.ssh/authorized_keys"


def create(path: Path, *, size_mib: int, seed: Path | None = None, authorized_key: str = "") -> None:
    """Makes the disk; the seed is a tar of what `/root` shall hold, an absent one leaves it empty.

    `authorized_key` is a line for the guest's ssh server; it comes after those of the seed.
    """
    if path.exists():
        raise errors.AlreadyExistsError(f"work disk {path} is already there", hint="it is the user's data")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".work-") as scratch:
        tree = trees.Tree(Path(scratch) / "tree")
        tree.attributes["/"] = _PRIVATE
        if seed is not None and seed.exists():
            with seed.open("rb") as archive:
                tree.unpack(archive)
        if authorized_key:
            _authorize(tree, authorized_key)
        _check_fits(tree, size_mib)
        staged = Path(scratch) / path.name
        tree.make_ext4(staged, size_bytes=size_mib * MIB, options=_OPTIONS, label=LABEL, checked=False)
        os.chmod(staged, 0o600)
        os.link(staged, path)  # unlike a rename, never onto a disk that appeared meanwhile


def _authorize(tree: trees.Tree, key: str) -> None:
    """sshd trusts the file only when root alone can write it and what holds it."""
    before = b""
    found = tree.attributes.get(_AUTHORIZED_KEYS)
    if found is not None and stat.S_ISREG(found.mode):
        before = tree.staged(_AUTHORIZED_KEYS).read_bytes().rstrip(b"\n")
    tree.mkdir(_SSH, _PRIVATE)
    lines = [line for line in (before, key.encode()) if line]
    tree.write(_AUTHORIZED_KEYS, b"\n".join(lines) + b"\n", permissions=0o600)


def _check_fits(tree: trees.Tree, size_mib: int) -> None:
    content = tree.content_bytes()
    if content > size_mib * MIB * 9 // 10:
        raise errors.BadRequestError(
            f"a work disk of {size_mib} MiB is too small for the image's seed of {content // MIB + 1} MiB",
            hint="choose a larger --disk-size",
        )
