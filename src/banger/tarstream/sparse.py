# SPDX-License-Identifier: MIT
"""Sparse files in a tar: where the stored pieces lie. GNU's old form, and its three in pax headers.

Used by `tarstream` only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from banger.tarstream import header, hole, pax
from banger.tarstream.header import damaged

_MAX_SEGMENTS: Final = 1 << 17
_MAX_DIGITS: Final = 20
_OLD_MAP_AT: Final = 386
_OLD_SEGMENTS: Final = 4
_OLD_MORE_AT: Final = _OLD_MAP_AT + 24 * _OLD_SEGMENTS
_OLD_SIZE: Final = slice(483, 495)
_EXTENSION_SEGMENTS: Final = 21
_EXTENSION_MORE_AT: Final = 24 * _EXTENSION_SEGMENTS

Segments = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Map:
    """Offset and length of each stored piece, and how large the file is."""

    segments: Segments
    size: int

    def check(self, stored: int) -> Map:
        """Refuses pieces that overlap, go backwards, leave the file, or are not what is stored."""
        at = 0
        for offset, length in self.segments:
            if offset < at:
                raise damaged("the pieces of a sparse file overlap")
            at = offset + length
        if at > self.size or self.size > header.MAX_SIZE_BYTES:
            raise damaged("a sparse file has pieces behind its end")
        if sum(length for _, length in self.segments) != stored:
            raise damaged("a sparse file's pieces are not what the archive stores of it")
        return self

    def expand(
        self, take: Callable[[int], Iterator[memoryview]]
    ) -> Iterator[bytes | memoryview | hole.Hole]:
        """The whole content; `take` gives so many of the stored bytes."""
        at = 0
        for offset, length in self.segments:
            if offset > at:
                yield hole.Hole(offset - at)
            yield from take(length)
            at = offset + length
        if self.size > at:
            yield hole.Hole(self.size - at)


def old_gnu(block: bytes, next_block: Callable[[], bytes]) -> Map:
    """From the header, and from the blocks that follow it before the content."""
    try:
        size = header.number(block[_OLD_SIZE])
        segments = _old_segments(block[_OLD_MAP_AT:], _OLD_SEGMENTS)
        more = block[_OLD_MORE_AT]
        while more:
            block = next_block()
            segments += _old_segments(block, _EXTENSION_SEGMENTS)
            _check_count(len(segments))
            more = block[_EXTENSION_MORE_AT]
    except ValueError as error:
        raise damaged(f"a sparse file's map has a field that is no number: {error}") from error
    if size < 0 or any(number < 0 for pair in segments for number in pair):
        raise damaged("a sparse file's map has negative numbers")
    return Map(segments, size)


def from_pax(records: tuple[tuple[bytes, bytes], ...], next_block: Callable[[], bytes]) -> tuple[Map, bytes]:
    """The map, and the file's name where the header's is a made-up one. Version 1.0 begins the content."""
    said = dict(records)
    name = said.get(b"name", b"")
    version = (said.get(b"major", b"0"), said.get(b"minor", b"0"))
    if version == (b"1", b"0"):
        return Map(_leading_map(next_block), _number(said, b"realsize")), name
    if version not in ((b"0", b"0"), (b"0", b"1")):
        raise damaged("a sparse file is stored in an unknown form")
    if b"map" in said:
        numbers = [pax.number(word, b"GNU.sparse.map") for word in said[b"map"].split(b",") if word]
    else:
        numbers = [
            pax.number(value, key) for key, value in _pairs(records) if key in (b"offset", b"numbytes")
        ]
    return Map(_paired(numbers), _number(said, b"size")), name


def _old_segments(field: bytes, count: int) -> Segments:
    rows = (field[at : at + 24] for at in range(0, 24 * count, 24))
    return [(header.number(row[:12]), header.number(row[12:])) for row in rows if row[:1] != b"\0"]


def _pairs(records: tuple[tuple[bytes, bytes], ...]) -> Iterator[tuple[bytes, bytes]]:
    """Version 0.0 repeats two keys, one after the other."""
    wanted = b"offset"
    for key, value in records:
        if key in (b"offset", b"numbytes"):
            if key != wanted:
                raise damaged("a sparse file's map is out of order")
            wanted = b"numbytes" if wanted == b"offset" else b"offset"
        yield key, value


def _leading_map(next_block: Callable[[], bytes]) -> Segments:
    """Decimal lines at the start of the content, the first their count, filled up to a block."""
    lines = _lines(next_block)
    count = next(lines)
    _check_count(count)
    return _paired([next(lines) for _ in range(2 * count)])


def _lines(next_block: Callable[[], bytes]) -> Iterator[int]:
    text = b""
    while True:
        line, newline, rest = text.partition(b"\n")
        if newline:
            if not line.isdigit() or len(line) > _MAX_DIGITS:
                raise damaged("a sparse file's map is malformed")
            yield int(line)
            text = rest
        elif len(text) > _MAX_DIGITS:
            raise damaged("a sparse file's map is malformed")
        else:
            text += next_block()


def _paired(numbers: list[int]) -> Segments:
    if len(numbers) % 2:
        raise damaged("a sparse file's map has an odd number")
    _check_count(len(numbers) // 2)
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _check_count(count: int) -> None:
    if count > _MAX_SEGMENTS:
        raise damaged(f"a sparse file has more than {_MAX_SEGMENTS} pieces")


def _number(said: dict[bytes, bytes], key: bytes) -> int:
    if key not in said:
        raise damaged(f"a sparse file does not say its {key.decode()}")
    return pax.number(said[key], key)
