# SPDX-License-Identifier: MIT
"""Device-mapper by ioctl (linux/dm-ioctl.h): create, inspect and remove one device of one target."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import time
from typing import Final, NamedTuple

from banger.helper.linux import libc

DM_LIST_DEVICES: Final = 2
DM_DEV_CREATE: Final = 3
DM_DEV_REMOVE: Final = 4
DM_DEV_SUSPEND: Final = 6
DM_DEV_STATUS: Final = 7
DM_TABLE_LOAD: Final = 9
DM_TABLE_STATUS: Final = 12
DM_DEFERRED_REMOVE: Final = 1 << 17
DM_BUFFER_FULL_FLAG: Final = 1 << 8
DM_STATUS_TABLE_FLAG: Final = 1 << 4

# All DM_UDEV_DISABLE_* flags: udev neither probes the device (blkid would hold it open) nor links to it.
_UDEV_LEAVE_ALONE: Final = 0x2F << 16
_IOCTL: Final = struct.Struct("=3I 2I I i 3I Q 128s 129s 7x")
_TARGET: Final = struct.Struct("=QQiI16s")
_REPLY_BYTES: Final = 64 * 1024
_LIST_BYTES: Final = 1 << 20
"""For some 13,000 devices of ours."""
_CONTROL: Final = "/dev/mapper/control"


class Device(NamedTuple):
    number: int
    """As st_rdev."""
    uuid: str


class _Answer(NamedTuple):
    flags: int
    device: Device
    data: bytes


def create(name: str, uuid: str, *, sectors: int, target: str, parameters: str) -> None:
    """An active device, or none: a failure removes what was made."""
    _call(DM_DEV_CREATE, name, uuid=uuid)
    try:
        _call(DM_TABLE_LOAD, name, payload=_table(sectors, target, parameters), targets=1)
        _call(DM_DEV_SUSPEND, name, event=_UDEV_LEAVE_ALONE)  # without DM_SUSPEND_FLAG this resumes
    except BaseException:
        with contextlib.suppress(OSError):
            _call(DM_DEV_REMOVE, name, event=_UDEV_LEAVE_ALONE)
        raise


def find(name: str) -> Device | None:
    """None too where the kernel has no device-mapper: then it has no device either."""
    try:
        return _call(DM_DEV_STATUS, name).device
    except OSError as error:
        if error.errno in {errno.ENXIO, errno.ENOENT}:
            return None
        raise


def status(name: str) -> str:
    """What the device's only target says of itself, such as `16/204800 16` or `Invalid` of a snapshot."""
    return _said(name, 0)


def parameters(name: str) -> str:
    """What the device's only target works by, such as `7:1 7:2 P 8`: not always what it was made with."""
    return _said(name, DM_STATUS_TABLE_FLAG)


def _said(name: str, flags: int) -> str:
    return _call(DM_TABLE_STATUS, name, flags=flags).data[_TARGET.size :].split(b"\0")[0].decode()


def names(prefix: str) -> list[str]:
    try:
        flags, _, data = _call(DM_LIST_DEVICES, "", payload=bytes(_LIST_BYTES))
    except FileNotFoundError:
        return []
    if flags & DM_BUFFER_FULL_FLAG:
        raise OSError(errno.ENOBUFS, "too many devices to list", "device-mapper")
    found: list[str] = []
    offset = 0
    while len(data) > offset + 12 and struct.unpack_from("=Q", data, offset)[0]:
        (step,) = struct.unpack_from("=I", data, offset + 8)
        found.append(data[offset + 12 :].split(b"\0", 1)[0].decode())
        if not step:
            break
        offset += step
    return [name for name in found if name.startswith(prefix)]


def remove(name: str, *, deadline: float) -> bool:
    """Removes the device; False when it is still in use at the deadline, it then goes with its last user."""
    delay_s = 0.002
    while True:
        try:
            _call(DM_DEV_REMOVE, name, flags=DM_DEFERRED_REMOVE, event=_UDEV_LEAVE_ALONE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return True
            raise
        if find(name) is None:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(delay_s)  # the kernel tells nobody when the last opener lets go
        delay_s = min(delay_s * 2, 0.1)


def _table(sectors: int, target: str, parameters: str) -> bytes:
    text = parameters.encode() + b"\0"
    text += bytes(-len(text) % 8)
    return _TARGET.pack(0, sectors, 0, _TARGET.size + len(text), target.encode()) + text


def _call(
    command: int,
    name: str,
    *,
    uuid: str = "",
    flags: int = 0,
    event: int = 0,
    payload: bytes = b"",
    targets: int = 0,
) -> _Answer:
    request = bytearray(max(_IOCTL.size + len(payload), _REPLY_BYTES))
    sizes = (len(request), _IOCTL.size, targets, 0)
    _IOCTL.pack_into(request, 0, 4, 0, 0, *sizes, flags, event, 0, 0, name.encode(), uuid.encode())
    request[_IOCTL.size : _IOCTL.size + len(payload)] = payload
    with libc.closing(_open()) as control:
        libc.ioctl(control, 0xC138FD00 | command, request, name)
    _, _, _, end, start, _, _, flags, _, _, number, _, found = _IOCTL.unpack_from(request)
    device = Device(number, found.split(b"\0")[0].decode())
    return _Answer(flags, device, bytes(request[start:end]))


def _open() -> int:
    """Raises FileNotFoundError where the kernel has no device-mapper.

    Its node outlives a driver that was taken away, and whoever looks for a driver that never was makes one.
    """
    try:
        return os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), _CONTROL) from error
        raise
