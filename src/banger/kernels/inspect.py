# SPDX-License-Identifier: MIT
"""What a kernel file is: the ELF inside a bzImage, its machine, its version, its build configuration.

Used by the importer before anything is published; reads files that may be hostile.
"""

from __future__ import annotations

import dataclasses
import re
import struct
import zlib
from typing import Final

from banger.contract import errors
from banger.kernels import elf, payload

_SETUP_SECTORS: Final = 0x1F1
_BOOT_MAGIC: Final = 0x202
_PAYLOAD: Final = 0x248
_SECTOR: Final = 512
_VERSION = re.compile(rb"Linux version (\d+\.\d+\.\d+[^ \0]*)")
_CONFIG_START: Final = b"IKCFG_ST"
_CONFIG_LIMIT: Final = 4 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that can be booted: an ELF with loadable segments."""

    vmlinux: bytes
    machine: str
    version: str
    config: dict[str, str]

    def builds_in(self, option: str) -> bool | None:
        """Whether an option is built in; None when the kernel does not carry its configuration."""
        return self.config.get(option) == "y" if self.config else None


def inspect(data: bytes) -> Kernel:
    """Accepts a vmlinux or a bzImage ("vmlinuz"); raises BadRequestError for anything else."""
    vmlinux = unpack_bzimage(data) if is_bzimage(data) else data
    parsed = elf.parse(vmlinux)
    if not any(segment.kind == elf.PT_LOAD and segment.size for segment in parsed.segments):
        raise errors.BadRequestError("the ELF file has nothing to load: it is not a kernel")
    match = _VERSION.search(vmlinux)
    if match is None:
        raise errors.BadRequestError("the ELF file says no Linux version: it is not a kernel")
    return Kernel(vmlinux, parsed.machine, match[1].decode(errors="replace"), read_config(vmlinux))


def is_bzimage(data: bytes) -> bool:
    return data[_BOOT_MAGIC : _BOOT_MAGIC + 4] == b"HdrS" and data[510:512] == b"\x55\xaa"


def unpack_bzimage(data: bytes) -> bytes:
    """The ELF that a bzImage unpacks at boot (boot protocol 2.08: payload_offset, payload_length)."""
    (protocol,) = struct.unpack_from("<H", data, _BOOT_MAGIC + 4)
    if protocol < 0x0208:
        raise errors.BadRequestError(f"boot protocol {protocol >> 8}.{protocol & 255:02} is too old")
    setup = (data[_SETUP_SECTORS] or 4) + 1
    offset, length = struct.unpack_from("<II", data, _PAYLOAD)
    start = setup * _SECTOR + offset
    if length == 0 or start + length > len(data):
        raise errors.BadRequestError("the vmlinuz is cut short")
    return payload.decompress(data[start : start + length])


def read_config(vmlinux: bytes) -> dict[str, str]:
    """CONFIG_IKCONFIG's copy of the build configuration, empty when the kernel has none."""
    start = vmlinux.find(_CONFIG_START + b"\x1f\x8b")
    if start < 0:
        return {}
    try:
        text = zlib.decompressobj(wbits=31).decompress(vmlinux[start + len(_CONFIG_START) :], _CONFIG_LIMIT)
    except zlib.error:
        return {}
    lines = (
        line.partition("=")
        for line in text.decode(errors="replace").splitlines()
        if line.startswith("CONFIG_")
    )
    return {name: value for name, _, value in lines}
