# SPDX-License-Identifier: MIT
"""Loop devices by ioctl (linux/loop.h). `lo_file_name` carries our label, by which one is found again."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import time
from typing import Final, NamedTuple

from banger.helper.linux import libc

LOOP_CLR_FD: Final = 0x4C01
LOOP_GET_STATUS64: Final = 0x4C05
LOOP_CONFIGURE: Final = 0x4C0A
LOOP_CTL_GET_FREE: Final = 0x4C82
LO_FLAGS_READ_ONLY: Final = 1
LO_FLAGS_AUTOCLEAR: Final = 4
_LOOP_INFO64: Final = struct.Struct("=5Q4I64s64s32s2Q")
_LOOP_CONFIG: Final = struct.Struct(f"=II{_LOOP_INFO64.size}s8Q")
_ATTEMPTS: Final = 64


class Loop(NamedTuple):
    number: int
    label: str

    @property
    def path(self) -> str:
        return f"/dev/loop{self.number}"


def attach(backing_fd: int, label: str, *, flags: int) -> int:
    """A descriptor of a new loop device over an open file. With AUTOCLEAR it lives as long as it is open."""
    info = _LOOP_INFO64.pack(*[0] * 8, flags, label.encode(), b"", b"", 0, 0)
    config = bytearray(_LOOP_CONFIG.pack(backing_fd, 0, info, *[0] * 8))
    mode = os.O_RDONLY if flags & LO_FLAGS_READ_ONLY else os.O_RDWR
    with libc.closing(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)) as control:
        for _ in range(_ATTEMPTS):
            path = f"/dev/loop{libc.ioctl(control, LOOP_CTL_GET_FREE, 0, 'loop-control')}"
            device = os.open(path, mode | os.O_CLOEXEC)
            try:
                libc.ioctl(device, LOOP_CONFIGURE, config, path)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # somebody else was quicker to take the free one
                    raise
            else:
                return device
    raise OSError(errno.EBUSY, "no loop device stays free", label)


def scan(prefix: str) -> list[Loop]:
    """Every bound loop device whose label starts with `prefix`."""
    found: list[Loop] = []
    for entry in os.listdir("/sys/block"):
        if entry.startswith("loop") and os.path.isdir(f"/sys/block/{entry}/loop"):
            with contextlib.suppress(OSError), _opened(f"/dev/{entry}") as fd:  # gone meanwhile
                loop = Loop(int(entry[4:]), _label(fd, entry))
                if loop.label.startswith(prefix):
                    found.append(loop)
    return found


def detach(label: str, *, deadline: float) -> bool:
    """Frees each loop device of that label; False when one is still in use at the deadline."""
    delay_s = 0.002
    while loops := [loop for loop in scan(label) if loop.label == label]:
        for loop in loops:
            _clear(loop)
        if time.monotonic() >= deadline:
            return False
        if any(os.path.isdir(f"/sys/block/loop{loop.number}/loop") for loop in loops):
            time.sleep(delay_s)  # the kernel tells nobody when the last opener lets go
            delay_s = min(delay_s * 2, 0.1)
    return True


def _clear(loop: Loop) -> None:
    try:
        with _opened(loop.path) as fd:
            if _label(fd, loop.path) == loop.label:
                libc.ioctl(fd, LOOP_CLR_FD, 0, loop.path)
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ENXIO, errno.EBUSY}:
            raise


def _opened(path: str) -> contextlib.AbstractContextManager[int]:
    return libc.closing(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _label(fd: int, path: str) -> str:
    info = bytearray(_LOOP_INFO64.size)
    libc.ioctl(fd, LOOP_GET_STATUS64, info, path)
    name: bytes = _LOOP_INFO64.unpack(info)[9]
    return name.split(b"\0")[0].decode(errors="replace")
