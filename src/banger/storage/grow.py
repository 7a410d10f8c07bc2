# SPDX-License-Identifier: MIT
"""A disk's file made larger; apart from what makes disks, as every start asks for it. Unprivileged."""

from __future__ import annotations

import os
from pathlib import Path


def grow(path: Path, *, size_mib: int) -> None:
    """The file has at least this size, sparse; the file system in it grows when it is attached. Never less:
    what a guest wrote stays.
    """
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size < size_mib << 20:
            os.ftruncate(fd, size_mib << 20)
            os.fsync(fd)
    finally:
        os.close(fd)
