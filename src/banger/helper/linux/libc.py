# SPDX-License-Identifier: MIT
"""System calls that the standard library lacks, and ioctl with errors that name their object."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct
from collections.abc import Generator
from typing import Final

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
IN_CREATE: Final = 0x100
IN_MODIFY: Final = 0x2
IN_MOVED_TO: Final = 0x80
IN_CLOEXEC: Final = os.O_CLOEXEC
PR_CAPBSET_READ: Final = 23
PR_CAPBSET_DROP: Final = 24
PR_SET_NO_NEW_PRIVS: Final = 38


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


@contextlib.contextmanager
def closing(fd: int) -> Generator[int]:
    """The descriptor, closed at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)


def ioctl(fd: int, request: int, argument: int | bytearray, what: str) -> int:
    """`fcntl.ioctl`, changing a bytearray in place."""
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise OSError(error.errno, error.strerror, what) from None


def inotify(path: str, mask: int) -> int:
    """A descriptor that becomes readable when `mask` happens to `path`."""
    fd = _checked(_LIBC.inotify_init1(IN_CLOEXEC), path)
    try:
        _checked(_LIBC.inotify_add_watch(fd, os.fsencode(path), mask), path)
    except OSError:
        os.close(fd)
        raise
    return fd


def prctl(option: int, value: int) -> int:
    return _checked(
        _LIBC.prctl(option, *(ctypes.c_ulong(word) for word in (value, 0, 0, 0))), f"prctl {option}"
    )


def capset(mask: int) -> None:
    """Effective and permitted become `mask`, inheritable becomes empty; of the calling thread."""
    header = struct.pack("=Ii", 0x20080522, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    _checked(_LIBC.capset(header, struct.pack("=6I", low, low, 0, high, high, 0)), "capset")
