# SPDX-License-Identifier: MIT
"""Just enough ELF to look into a kernel, and to take one out of a library without running any of its code.

Used by the kernel importer. It reads bytes of files that may be hostile: every offset is checked.
"""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Final

from banger.contract import errors
from banger.kernels import files

MACHINES: Final = {62: "x86_64", 183: "aarch64"}
MAGIC: Final = b"\x7fELF"
PT_LOAD: Final = 1
_32_BIT: Final = 1
_BIG_ENDIAN: Final = 2
_MAX_SEGMENTS: Final = 64
_MAX_SECTIONS: Final = 100_000
# Firecracker keeps what is below 1 MiB for itself, and its devices are above 3 GiB.
_LOWEST: Final = 1 << 20
_HIGHEST: Final = 3 << 30
_SHT_NOBITS: Final = 8
_SHT_DYNSYM: Final = 11
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_SHDR = struct.Struct("<IIQQQQIIQQ")
_SYM = struct.Struct("<IBBHQQ")
_IDENT: Final = b"\x7fELF\x02\x01\x01" + bytes(9)
_ET_REL: Final = 1
_ET_EXEC: Final = 2
_ET_DYN: Final = 3
_EM_X86_64: Final = 62
_PAGE: Final = 0x1000


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    kind: int
    offset: int
    virtual: int
    physical: int
    size: int
    """In the file; the rest of `memory` is zeros."""
    memory: int


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    kind: int
    address: int
    offset: int
    size: int
    link: int


@dataclasses.dataclass(frozen=True, slots=True)
class Elf:
    """A parsed 64-bit little-endian ELF file."""

    data: files.Data
    kind: int
    machine: str
    entry: int
    segments: tuple[Segment, ...]
    sections: tuple[Section, ...]

    def symbol(self, name: str) -> bytes:
        """The bytes of an object in the dynamic symbol table."""
        wanted = name.encode()
        for table in (section for section in self.sections if section.kind == _SHT_DYNSYM):
            names = self._bytes(self.sections[table.link]) if table.link < len(self.sections) else b""
            raw = self._bytes(table)
            for index, _, _, home, value, size in _SYM.iter_unpack(raw[: len(raw) // _SYM.size * _SYM.size]):
                if _c_string(names, index) == wanted and 0 < home < len(self.sections):
                    return self._object(self.sections[home], value, size)
        raise errors.BadRequestError(f"the library has no symbol {name!r}")

    def _object(self, section: Section, address: int, size: int) -> bytes:
        start = address - section.address
        if section.kind == _SHT_NOBITS or start < 0 or start + size > section.size:
            raise errors.BadRequestError("a symbol points outside its section")
        return self._bytes(section)[start : start + size]

    def _bytes(self, section: Section) -> bytes:
        if section.offset + section.size > len(self.data):
            raise errors.BadRequestError("a section ends after the file")
        return self.data[section.offset : section.offset + section.size]


def parse(data: files.Data) -> Elf:
    """Raises BadRequestError for anything but a whole 64-bit little-endian ELF file of a known machine."""
    if len(data) >= _EHDR.size and data[:4] == MAGIC and data[4] == _32_BIT:
        raise errors.BadRequestError("a 32-bit ELF file; Firecracker boots 64-bit kernels only")
    if len(data) >= _EHDR.size and data[:4] == MAGIC and data[5] == _BIG_ENDIAN:
        raise errors.BadRequestError("a big-endian ELF file; Firecracker boots little-endian kernels only")
    if len(data) < _EHDR.size or data[:6] != _IDENT[:6]:
        raise errors.BadRequestError("not a 64-bit little-endian ELF file")
    header = _EHDR.unpack_from(data)
    machine = MACHINES.get(header[2])
    if machine is None:
        raise errors.BadRequestError(f"ELF machine {header[2]} is not one that banger boots")
    entry, ph_offset, sh_offset = header[4:7]
    ph_size, ph_count, sh_size, sh_count = header[9:13]
    segments = [_segment(fields) for fields in _table(data, _PHDR, ph_offset, ph_size, ph_count)]
    sections = [_section(fields) for fields in _table(data, _SHDR, sh_offset, sh_size, sh_count)]
    return Elf(data, header[1], machine, entry, tuple(segments), tuple(sections))


def loaded_end(parsed: Elf) -> int:
    """The address after all that Firecracker loads; raises BadRequestError when it would refuse to."""
    if parsed.kind == _ET_REL:
        raise errors.BadRequestError("an object file, such as a kernel module: it is not a kernel")
    loads = [segment for segment in parsed.segments if segment.kind == PT_LOAD and segment.memory]
    if parsed.kind not in (_ET_EXEC, _ET_DYN) or not any(segment.size for segment in loads):
        raise errors.BadRequestError("the ELF file has nothing to load: it is not a kernel")
    if len(parsed.segments) > _MAX_SEGMENTS:
        raise errors.BadRequestError(f"the ELF file has {len(parsed.segments)} segments: it is not a kernel")
    for segment in loads:
        _check_segment(segment, len(parsed.data))
    if not any(each.physical <= parsed.entry < each.physical + each.memory for each in loads):
        raise errors.BadRequestError(
            f"the entry point {parsed.entry:#x} is at no physical address that is loaded: it is not a kernel"
        )
    return max(segment.physical + segment.memory for segment in loads)


def _check_segment(segment: Segment, file_bytes: int) -> None:
    if segment.offset + segment.size > file_bytes:
        raise errors.BadRequestError("a segment ends after the file: the kernel is cut short")
    if segment.memory < segment.size:
        raise errors.BadRequestError("a segment has more bytes in the file than in memory")
    if segment.physical < _LOWEST or segment.physical + segment.memory > _HIGHEST:
        raise errors.BadRequestError(
            f"a segment belongs at physical address {segment.physical:#x}, where Firecracker loads nothing"
        )


def strip(path: Path) -> None:
    """Drops symbols and debugging information from a kernel of ours, of which nothing is loaded."""
    with files.mapped(path) as data:
        parsed = parse(data)
        fields = list(_EHDR.unpack_from(data))
    fields[6], fields[12], fields[13] = 0, 0, 0
    ends = [each.offset + each.size for each in parsed.segments] + [fields[5] + fields[9] * fields[10]]
    with path.open("r+b") as file:
        file.write(_EHDR.pack(*fields))
        file.truncate(min(max(ends), path.stat().st_size))


def wrap(image: bytes, *, load_address: int, entry_address: int) -> bytes:
    """An executable with one segment: a flat kernel image at the physical address it is linked for."""
    if not load_address <= entry_address < load_address + len(image):
        raise errors.BadRequestError("the entry point lies outside the kernel image")
    header = _EHDR.pack(
        _IDENT, _ET_EXEC, _EM_X86_64, 1, entry_address, _EHDR.size, 0, 0, _EHDR.size, _PHDR.size, 1, 0, 0, 0
    )
    read_write_execute = 7
    segment = _PHDR.pack(
        PT_LOAD, read_write_execute, _PAGE, load_address, load_address, len(image), len(image), _PAGE
    )
    return (header + segment).ljust(_PAGE, b"\0") + image


def _table(
    data: files.Data, layout: struct.Struct, offset: int, size: int, count: int
) -> list[tuple[int, ...]]:
    if count == 0:
        return []
    if count > _MAX_SECTIONS or size != layout.size or offset + size * count > len(data):
        raise errors.BadRequestError("an ELF header table lies outside the file")
    return [layout.unpack_from(data, offset + size * number) for number in range(count)]


def _segment(fields: tuple[int, ...]) -> Segment:
    kind, _, offset, virtual, physical, size, memory, _ = fields
    return Segment(kind, offset, virtual, physical, size, memory)


def _section(fields: tuple[int, ...]) -> Section:
    _, kind, _, address, offset, size, link, _, _, _ = fields
    return Section(kind, address, offset, size, link)


def _c_string(table: bytes, start: int) -> bytes:
    end = table.find(b"\0", start)
    return table[start:end] if 0 <= start < len(table) and end >= 0 else b""
