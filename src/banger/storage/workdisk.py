# SPDX-License-Identifier: MIT
"""The work disk: a file system made at its final size from the image's seed, the guest's `/root`.

It appears under its name only when it is whole, and is user data from then on: nothing here replaces one.
Used by the work disk capability; unprivileged.
"""

from __future__ import annotations

import functools
import os
import stat
import time
from pathlib import Path
from typing import BinaryIO, Final

from banger import artefacts
from banger.contract import errors
from banger.images import flatten
from banger.images.mkfs import filesystem
from banger.tarstream import reader

LABEL: Final = "banger-work"
MIB: Final = 1 << 20
_CHUNK: Final = 1 << 20
_SSH: Final = b".ssh"
_AUTHORIZED_KEYS: Final = b"authorized_keys"
_GIT_CONFIG: Final = (b".config", b"git", b"config")
_MAX_KEYS_BYTES: Final = 1 << 20


def create(
    path: Path,
    *,
    size_mib: int,
    seed: Path | None = None,
    authorized_key: str = "",
    git_config: bytes = b"",
) -> None:
    """Makes the disk; the seed is a tar of what `/root` shall hold. Raises NotFoundError when it is gone.

    `authorized_key` is a line for the guest's ssh server; it comes after those of the seed.
    `git_config` goes where git looks before `~/.gitconfig`, which counts more; a seed's own there stays.
    The caller holds the VM's lifecycle lock: two makers of one disk would meet.
    """
    if path.exists():
        raise errors.AlreadyExistsError(f"work disk {path} is already there", hint="it is the user's data")
    staged = path.with_name(f".{path.name}.new")
    staged.unlink(missing_ok=True)  # what a crash left
    try:
        _make(staged, size_mib * MIB, seed, authorized_key, git_config)
        artefacts.sync(staged)  # its row is on the disk: with the power gone there would be half of one
        os.link(staged, path)  # unlike a rename, never onto a disk that appeared meanwhile
        artefacts.sync(path.parent)
    except errors.BadRequestError as error:
        if not any(isinstance(each, filesystem.DiskTooSmallError) for each in (error, error.__cause__)):
            raise
        raise errors.BadRequestError(
            f"a work disk of {size_mib} MiB is too small for the image's seed",
            hint="choose a larger --disk-size",
        ) from error
    finally:
        staged.unlink(missing_ok=True)


def _opened(seed: Path) -> BinaryIO:
    try:
        return seed.open("rb")
    except FileNotFoundError:
        raise errors.NotFoundError(
            f"the image is damaged: there is no {seed}",
            hint="put the file back, or delete the image with its VMs and make it again",
        ) from None


def _make(staged: Path, size_bytes: int, seed: Path | None, authorized_key: str, git_config: bytes) -> None:
    limits = filesystem.Limits(max_bytes=size_bytes)
    with filesystem.Filesystem(staged, limits=limits) as made:
        made.set_attributes(made.ROOT, _private(stat.S_IFDIR | 0o700))
        if seed is not None:
            with _opened(seed) as archive:
                pieces = iter(functools.partial(archive.read, _CHUNK), b"")
                flatten.Tree(made).add(reader.entries(pieces), "the work seed")
        if authorized_key:
            _authorize(made, authorized_key.encode())
        if git_config:
            _configure_git(made, git_config)
        made.finish(size_bytes=size_bytes, label=LABEL)


def _authorize(made: filesystem.Filesystem, key: bytes) -> None:
    """sshd trusts the file only when root alone can write it and what holds it."""
    directory = made.lookup(made.ROOT, _SSH)
    if directory is not None and not _is(made, directory, stat.S_IFDIR):
        made.remove(made.ROOT, _SSH)
        directory = None
    if directory is None:
        directory = made.mkdir(made.ROOT, _SSH, _private(stat.S_IFDIR | 0o700))
    else:
        made.set_attributes(directory, _private(stat.S_IFDIR | 0o700))
    lines = [*_take_keys(made, directory), key]
    wanted = _private(stat.S_IFREG | 0o600)
    made.write(directory, _AUTHORIZED_KEYS, wanted, [b"\n".join(lines) + b"\n"])


def _configure_git(made: filesystem.Filesystem, text: bytes) -> None:
    directory = made.ROOT
    for name in _GIT_CONFIG[:-1]:
        below = made.lookup(directory, name)
        if below is None:
            below = made.mkdir(directory, name, _private(stat.S_IFDIR | 0o755))
        elif not _is(made, below, stat.S_IFDIR):
            return
        directory = below
    if made.lookup(directory, _GIT_CONFIG[-1]) is None:
        made.write(directory, _GIT_CONFIG[-1], _private(stat.S_IFREG | 0o644), [text])


def _take_keys(made: filesystem.Filesystem, directory: int) -> list[bytes]:
    """What the seed has of keys, as at most one piece; the file is removed."""
    found = made.lookup(directory, _AUTHORIZED_KEYS)
    if found is None:
        return []
    before = b""
    if _is(made, found, stat.S_IFREG):
        if made.size(found) > _MAX_KEYS_BYTES:
            raise errors.BadRequestError(f"the image's {_AUTHORIZED_KEYS.decode()} is too large to be one")
        before = b"".join(made.read(found)).rstrip(b"\n")
    made.remove(directory, _AUTHORIZED_KEYS)
    return [before] if before else []


def _is(made: filesystem.Filesystem, inode: int, kind: int) -> bool:
    return stat.S_IFMT(made.attributes(inode).mode) == kind


def _private(mode: int) -> filesystem.Attributes:
    return filesystem.Attributes(mode, mtime_ns=time.time_ns())
