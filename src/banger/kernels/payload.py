# SPDX-License-Identifier: MIT
"""The compressions that kernels and their modules come in, told apart by their first bytes.

Used by the kernel inspector and the module index. Input may be hostile: the output comes in pieces and is
bounded, and no decompressor may ask for more memory than a kernel's needs.
"""

from __future__ import annotations

import bz2
import lzma
import mmap
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import lz4.block
import zstandard

from banger import run
from banger.contract import errors

LIMIT_BYTES: Final = 1 << 30
LZ4_MAGIC: Final = b"\x02\x21\x4c\x18"
_PIECE: Final = 1 << 20
_LZ4_BLOCK_BYTES: Final = 8 << 20
# xz and zstd at their strongest, as kernels are packed, need 65 and 128 MiB.
_MEMORY_BYTES: Final = 192 << 20
_ZSTD_WINDOW_BYTES: Final = 1 << 27
# The library gives no bound on one call's output; 64 blocks of four bytes each become 8 MiB at the most.
_ZSTD_PIECE: Final = 256

Unpacker = Callable[[memoryview], Iterator[bytes]]


class _Stream(Protocol):
    """What the decompressor objects of bz2 and lzma have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes | memoryview, max_length: int = ...) -> bytes: ...


def is_compressed(head: bytes) -> bool:
    return any(head.startswith(magic) for magic, _ in _BY_MAGIC)


def chunks(data: bytes | mmap.mmap | memoryview, *, limit_bytes: int = LIMIT_BYTES) -> Iterator[bytes]:
    """The unpacked bytes, piece by piece; what follows the end of the compressed stream is ignored."""
    left = limit_bytes
    try:
        with memoryview(data) as view:
            for piece in _unpacker(bytes(view[:8]))(view):
                run.check_cancelled()
                left -= len(piece)
                if left < 0:
                    raise errors.BadRequestError(f"the data unpacks to more than {limit_bytes} bytes")
                yield piece
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise errors.BadRequestError(f"damaged compressed data: {error}") from error


def decompress(data: bytes | memoryview, *, limit_bytes: int = LIMIT_BYTES) -> bytes:
    return b"".join(chunks(data, limit_bytes=limit_bytes))


def _unpacker(head: bytes) -> Unpacker:
    for magic, unpack in _BY_MAGIC:
        if head.startswith(magic):
            return unpack
    name = (
        "LZO, which is not supported" if head.startswith(b"\x89LZO") else f"it starts with {head[:4].hex()}"
    )
    raise errors.BadRequestError(
        f"unknown compression ({name})", hint="unpack the kernel and import its vmlinux"
    )


def _gzip(data: memoryview) -> Iterator[bytes]:
    stream = zlib.decompressobj(wbits=31)
    for start in range(0, len(data), _PIECE):
        yield stream.decompress(data[start : start + _PIECE], _PIECE)
        while stream.unconsumed_tail:
            yield stream.decompress(stream.unconsumed_tail, _PIECE)
        if stream.eof:
            return
    while piece := stream.decompress(b"", _PIECE):
        yield piece
    if not stream.eof:
        raise EOFError("the stream is cut short")


def _bounded(stream: _Stream, data: memoryview) -> Iterator[bytes]:
    for start in range(0, len(data), _PIECE):
        yield stream.decompress(data[start : start + _PIECE], _PIECE)
        while not stream.eof and not stream.needs_input:
            yield stream.decompress(b"", _PIECE)
        if stream.eof:
            return
    raise EOFError("the stream is cut short")


def _xz(data: memoryview) -> Iterator[bytes]:
    return _bounded(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY_BYTES), data)


def _lzma_alone(data: memoryview) -> Iterator[bytes]:
    return _bounded(lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_MEMORY_BYTES), data)


def _bzip2(data: memoryview) -> Iterator[bytes]:
    return _bounded(bz2.BZ2Decompressor(), data)


def _zstd(data: memoryview) -> Iterator[bytes]:
    stream = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()
    for start in range(0, len(data), _ZSTD_PIECE):
        yield stream.decompress(data[start : start + _ZSTD_PIECE])
        if stream.eof:
            return
    raise EOFError("the stream is cut short")


def _lz4(data: memoryview) -> Iterator[bytes]:
    """The legacy frame: blocks behind their lengths and no end mark, so a frame may end after any block."""
    position = len(LZ4_MAGIC)
    while position + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, position)
        position += 4
        if bytes(data[position - 4 : position]) == LZ4_MAGIC:
            continue
        if size == 0 or position + size > len(data):
            return
        try:
            yield lz4.block.decompress(data[position : position + size], uncompressed_size=_LZ4_BLOCK_BYTES)
        except lz4.block.LZ4BlockError as error:
            raise errors.BadRequestError(f"damaged compressed data: {error}") from error
        position += size


_BY_MAGIC: Final[tuple[tuple[bytes, Unpacker], ...]] = (
    (b"\x1f\x8b", _gzip),
    (b"\xfd7zXZ\0", _xz),
    (b"\x28\xb5\x2f\xfd", _zstd),
    (b"BZh", _bzip2),
    (LZ4_MAGIC, _lz4),
    (b"\x5d\x00\x00", _lzma_alone),
)
