# SPDX-License-Identifier: MIT
"""The kernel's side of device-mapper's ioctls, for machines whose kernel has none; the lab has the real one.

It is strict about the form of a request and the order of commands. A device's number is that of its second
loop device, so that what is written "to the snapshot" can be read back.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from banger.helper.linux import devmapper, libc

HEADER = struct.Struct("=3I 2I I i 3I Q 128s 129s 7x")
TARGET = struct.Struct("=QQiI16s")
LIST, CREATE, REMOVE, SUSPEND, STATUS, LOAD, TABLE = 2, 3, 4, 6, 7, 9, 12
DEFERRED = 1 << 17
BUFFER_FULL = 1 << 8
STATUS_TABLE = 1 << 4
UDEV_LEAVE_ALONE = 0x2F << 16


@dataclass
class Device:
    uuid: str
    parameters: str = ""
    active: bool = False
    open_count: int = 0
    leaving: bool = False

    @property
    def number(self) -> int:
        store = self.parameters.split()[1] if self.parameters else "254:0"
        return os.makedev(*map(int, store.split(":")))


@dataclass
class Kernel:
    """`said` is what a snapshot says of itself; `refuse` makes one command fail."""

    devices: dict[str, Device] = field(default_factory=dict)
    said: str = "16/204800 16"
    refuse: dict[int, int] = field(default_factory=dict)
    full: bool = False
    loaded: Callable[[list[int]], object] = list
    """Called with the numbers of the devices beneath a new one, which the real kernel now holds open."""

    def ioctl(self, _fd: int, request: int, argument: bytearray, what: str) -> int:
        assert request & ~0xFF == 0xC138FD00
        head = HEADER.unpack_from(argument)
        assert head[:3] == (4, 0, 0)
        assert (head[3], head[4]) == (len(argument), HEADER.size)
        name, uuid = (text.split(b"\0")[0].decode() for text in head[11:])
        command = request & 0xFF
        if command in self.refuse:
            raise OSError(self.refuse[command], os.strerror(self.refuse[command]), what)
        if command == LIST:
            self._list(argument)
            return 0
        if command == CREATE:
            if name in self.devices:
                raise OSError(errno.EBUSY, "it is there", what)
            self.devices[name] = Device(uuid)
            return 0
        if name not in self.devices:
            raise OSError(errno.ENXIO, "no such device", what)
        self._on(command, name, head, argument)
        return 0

    def _on(self, command: int, name: str, head: tuple[int, ...], argument: bytearray) -> None:
        device = self.devices[name]
        if command in (REMOVE, SUSPEND):
            assert head[8] == UDEV_LEAVE_ALONE, "udev would hold the device open"
        if command == LOAD:
            assert head[5] == 1
            start, sectors, _, following, target = TARGET.unpack_from(argument, HEADER.size)
            assert (start, target.rstrip(b"\0"), sectors > 0, following % 8) == (0, b"snapshot", True, 0)
            text = argument[HEADER.size + TARGET.size : HEADER.size + following]
            device.parameters = bytes(text).split(b"\0")[0].decode()
            beneath = (each.split(":") for each in device.parameters.split()[:2])
            self.loaded([os.makedev(int(major), int(minor)) for major, minor in beneath])
        elif command == SUSPEND:
            assert device.parameters, "resumed before it had a table"
            device.active = True
        elif command == REMOVE:
            if device.open_count and not head[7] & DEFERRED:
                raise OSError(errno.EBUSY, "in use")
            device.leaving = True
            if not device.open_count:
                del self.devices[name]
        elif command == STATUS:
            answer = (
                *head[:6],
                device.open_count,
                *head[7:10],
                device.number,
                head[11],
                device.uuid.encode(),
            )
            HEADER.pack_into(argument, 0, *answer)
        else:
            assert command == TABLE
            at = HEADER.size + TARGET.size
            said = device.parameters if head[7] & STATUS_TABLE else self.said
            argument[at : at + len(said) + 1] = said.encode() + b"\0"

    def _list(self, argument: bytearray) -> None:
        """Of each its number, the way to the next, its name, and room for the event and uuid behind that."""
        head = list(HEADER.unpack_from(argument))
        at, made = HEADER.size, list(self.devices.items())
        sizes = [(12 + len(name) + 1 + 7) // 8 * 8 + 32 for name, _ in made]
        head[7] = BUFFER_FULL if self.full or at + sum(sizes) > len(argument) else 0
        HEADER.pack_into(argument, 0, *head)
        if head[7]:
            return
        for index, ((name, device), size) in enumerate(zip(made, sizes, strict=True)):
            step = size if index + 1 < len(made) else 0
            struct.pack_into(f"=QI{len(name) + 1}s", argument, at, device.number, step, name.encode())
            at += size


def install(monkeypatch: pytest.MonkeyPatch, directory: Path) -> Kernel:
    """From here on, devices are made here. Other ioctls go to the real kernel."""
    made, real = Kernel(), libc.ioctl
    control = directory / "control"
    control.write_bytes(b"")

    def ioctl(fd: int, request: int, argument: int | bytearray, what: str) -> int:
        if request & ~0xFF == 0xC138FD00:
            assert isinstance(argument, bytearray)
            return made.ioctl(fd, request, argument, what)
        return real(fd, request, argument, what)

    monkeypatch.setattr(libc, "ioctl", ioctl)
    monkeypatch.setattr(devmapper, "_CONTROL", str(control))
    return made
