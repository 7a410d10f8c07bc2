# SPDX-License-Identifier: MIT
"""What the tests of the ext4 writer share: plain attributes, and a file system that e2fsck checked."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

from banger.images.mkfs.filesystem import Attributes, Filesystem
from tests import ext4_read

MIB = 1 << 20
BLOCK = 4096
FILE = Attributes(stat.S_IFREG | 0o644)
DIRECTORY = Attributes(stat.S_IFDIR | 0o755)
LINK = Attributes(stat.S_IFLNK | 0o777)


def make(image: Path, fill: Callable[[Filesystem], object], size_bytes: int | None = None) -> int:
    """A finished file system that e2fsck finds nothing in."""
    with Filesystem(image) as made:
        fill(made)
        size = made.finish(size_bytes=size_bytes, headroom_bytes=4 * MIB, label="test")
    assert image.stat().st_size == size
    ext4_read.check(image)
    return size
