# SPDX-License-Identifier: MIT
"""What a kernel file is: what a VMM boots inside whatever it is packed in, its machine, its version.

Used by the importer before anything is published; reads files that may be hostile.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Iterator
from typing import Final

from banger.contract import errors
from banger.kernels import elf, files, payload

_VERSION = re.compile(rb"Linux version (\d+\.\d+\.\d+[!-~]{0,128})")
_SECTOR: Final = 512
_CHUNK: Final = 1 << 20

# x86: Documentation/arch/x86/boot.rst.
_SETUP_SECTORS: Final = 0x1F1
_BOOT_MAGIC: Final = 0x202
_LOAD_FLAGS: Final = 0x236
_PAYLOAD: Final = 0x248
_HAS_64_BIT_ENTRY: Final = 1

# arm64: Documentation/arch/arm64/booting.rst; and an image that unpacks itself under EFI.
_ARM64_MAGIC: Final = 56
_ARM64_HEADER: Final = struct.Struct("<8xQQQ")
_ARM64_BIG_ENDIAN: Final = 1
_ZBOOT = struct.Struct("<4s4sII8x32s")


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel in the form that Firecracker loads: an ELF for x86_64, a flat image for aarch64."""

    machine: str
    version: str
    end: int
    """The address after what is loaded: a VM with less memory cannot hold it."""


def boot_image(data: files.Data, limit_bytes: int = payload.LIMIT_BYTES) -> Iterator[bytes]:
    """What is to be booted, out of a vmlinuz (bzImage, EFI zboot), a compressed image, or as it is."""
    if is_bzimage(data):
        yield from _bzimage(data, limit_bytes)
    elif data[:2] == b"MZ" and data[4:8] == b"zimg":
        yield from _zboot(data, limit_bytes)
    elif payload.is_compressed(data[:8]):
        yield from payload.chunks(data, limit_bytes=limit_bytes)
    elif data[:4] == elf.MAGIC or _is_arm64(data):
        yield from (data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK))
    elif data[:2] == b"MZ":
        raise errors.BadRequestError(
            "an EFI program that is no kernel by itself",
            hint="take the kernel out of a unified kernel image: objcopy -O binary --only-section=.linux",
        )
    else:
        raise errors.BadRequestError(
            "neither a vmlinux nor a vmlinuz nor an arm64 Image",
            hint="import the kernel that a boot loader gets",
        )


def look(data: files.Data) -> Kernel:
    """Raises BadRequestError, with the reason, for what Firecracker cannot load."""
    is_arm64 = _is_arm64(data)
    if not is_arm64 and data[:4] != elf.MAGIC:
        raise errors.BadRequestError(
            "what is packed in it is no kernel: neither a vmlinux nor an arm64 Image"
        )
    parsed = None if is_arm64 else elf.parse(data)
    match = _VERSION.search(data)
    if match is None:
        raise errors.BadRequestError("the file says no Linux version: it is not a kernel")
    if parsed is None:
        machine, end = "aarch64", _arm64_end(data)
    else:
        if parsed.machine != "x86_64":
            raise errors.BadRequestError(
                f"an ELF kernel for {parsed.machine}, where Firecracker boots the flat Image",
                hint="import arch/arm64/boot/Image or the distribution's vmlinuz",
            )
        machine, end = parsed.machine, elf.loaded_end(parsed)
    return Kernel(machine, match[1].decode(), end)


def is_bzimage(data: files.Data) -> bool:
    return data[_BOOT_MAGIC : _BOOT_MAGIC + 4] == b"HdrS" and data[510:512] == b"\x55\xaa"


def _bzimage(data: files.Data, limit_bytes: int) -> Iterator[bytes]:
    """Boot protocol 2.08: payload_offset, payload_length; the payload's last word is its size unpacked."""
    if len(data) < _PAYLOAD + 8:
        raise errors.BadRequestError("the vmlinuz is cut short")
    (protocol,) = struct.unpack_from("<H", data, _BOOT_MAGIC + 4)
    if protocol < 0x0208:
        raise errors.BadRequestError(f"boot protocol {protocol >> 8}.{protocol & 255:02} is too old")
    (flags,) = struct.unpack_from("<H", data, _LOAD_FLAGS)
    if protocol >= 0x020C and not flags & _HAS_64_BIT_ENTRY:
        raise errors.BadRequestError("the vmlinuz is a 32-bit kernel; Firecracker boots 64-bit kernels only")
    start = ((data[_SETUP_SECTORS] or 4) + 1) * _SECTOR
    offset, length = struct.unpack_from("<II", data, _PAYLOAD)
    if length < 8 or start + offset + length > len(data):
        raise errors.BadRequestError("the vmlinuz is cut short: its payload ends after the file")
    with memoryview(data) as view, view[start + offset : start + offset + length] as packed:
        (promised,) = struct.unpack("<I", packed[-4:])
        yield from _of_size(payload.chunks(packed, limit_bytes=min(limit_bytes, promised)), promised)


def _zboot(data: files.Data, limit_bytes: int) -> Iterator[bytes]:
    if len(data) < _ZBOOT.size:
        raise errors.BadRequestError("the EFI zboot image is cut short")
    _, _, offset, length, _ = _ZBOOT.unpack_from(data)
    if not length or offset + length > len(data):
        raise errors.BadRequestError("the EFI zboot image is cut short: its payload ends after the file")
    with memoryview(data) as view, view[offset : offset + length] as packed:
        yield from payload.chunks(packed, limit_bytes=limit_bytes)


def _of_size(pieces: Iterator[bytes], promised: int) -> Iterator[bytes]:
    found = 0
    for piece in pieces:
        found += len(piece)
        yield piece
    if found != promised:
        raise errors.BadRequestError(
            f"the vmlinuz is damaged: it unpacks to {found} bytes and promises {promised}"
        )


def _is_arm64(data: files.Data) -> bool:
    return data[_ARM64_MAGIC : _ARM64_MAGIC + 4] == b"ARM\x64"


def _arm64_end(data: files.Data) -> int:
    if len(data) < _ARM64_MAGIC + 8:
        raise errors.BadRequestError("the arm64 Image is cut short")
    offset, size, flags = _ARM64_HEADER.unpack_from(data)
    if flags & _ARM64_BIG_ENDIAN:
        raise errors.BadRequestError(
            "a big-endian arm64 Image; Firecracker boots little-endian kernels only"
        )
    if size < len(data) or offset + size > files.MAX_IMAGE_BYTES:
        raise errors.BadRequestError(f"the arm64 Image says it takes {size} bytes, which cannot be")
    return int(offset + size)
