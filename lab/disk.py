# SPDX-License-Identifier: MIT
"""Makes a read-only disk of a directory, the quick way to hand files to a lab. Used by session."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from lab import cache, command

log = logging.getLogger("lab")

KEPT_DISKS = 4
MIB = 1 << 20
DISK = "artefacts.ext4"


def ensure(root: Path, directory: Path) -> cache.Entry:
    """Open the disk with this directory's content, making it when the cache has none."""
    store = cache.Cache(root, "artefacts", KEPT_DISKS)
    return store.ensure(cache.key_of(_content(directory)), lambda stage: _build(directory, stage))


def _content(directory: Path) -> Iterator[str]:
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        yield f"{path.relative_to(directory)} {status.st_mode:o} {status.st_uid} {status.st_gid}"
        if stat.S_ISLNK(status.st_mode):
            yield os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            with path.open("rb") as file:
                yield hashlib.file_digest(file, "blake2b").hexdigest()


def _build(directory: Path, stage: Path) -> None:
    paths = [path.lstat() for path in directory.rglob("*")]
    content_bytes = sum(status.st_blocks * 512 for status in paths) + len(paths) * 4096
    log.info("making a disk of %s (%d MiB)", directory, content_bytes // MIB)
    disk = stage / DISK
    with disk.open("wb") as file:
        file.truncate(content_bytes + content_bytes // 10 + 16 * MIB)
    options = ["-O", "^has_journal,^resize_inode", "-m", "0", "-N", str(len(paths) + 64)]
    command.run(["mkfs.ext4", "-q", *options, "-E", "root_owner=0:0", "-d", directory, disk], timeout_s=300)
