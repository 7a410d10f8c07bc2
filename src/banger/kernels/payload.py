# SPDX-License-Identifier: MIT
"""The compressions that kernels and their modules come in, told apart by their first bytes.

Used by the kernel inspector and the initrd builder. Output is bounded: a small file cannot fill the memory.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Final, Protocol

import zstandard

from banger.contract import errors
from banger.kernels import lz4

LIMIT_BYTES: Final = 512 << 20
_CHUNK: Final = 1 << 20


class _Stream(Protocol):
    """What the decompressor objects of bz2 and lzma have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int = ...) -> bytes: ...


def decompress(data: bytes, *, limit_bytes: int = LIMIT_BYTES) -> bytes:
    """The unpacked bytes; data after the end of the compressed stream is ignored."""
    for magic, unpack in _BY_MAGIC:
        if data.startswith(magic):
            try:
                return unpack(data, limit_bytes)
            except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
                raise errors.BadRequestError(f"damaged compressed data: {error}") from error
    raise errors.BadRequestError(
        f"unknown compression (it starts with {data[:4].hex()})",
        hint="unpack the kernel and import its vmlinux",
    )


def _gzip(data: bytes, limit_bytes: int) -> bytes:
    stream = zlib.decompressobj(wbits=31)
    out = stream.decompress(data, limit_bytes)
    if not stream.eof:
        raise errors.BadRequestError("the gzip stream is cut short or larger than the limit")
    return out


def _bounded(stream: _Stream, data: bytes, limit_bytes: int) -> bytes:
    out = [stream.decompress(data, limit_bytes)]
    left = limit_bytes - len(out[0])
    while not stream.eof and not stream.needs_input and left > 0:
        out.append(stream.decompress(b"", left))
        left -= len(out[-1])
    if not stream.eof:
        raise errors.BadRequestError("the stream is cut short or larger than the limit")
    return b"".join(out)


def _zstd(data: bytes, limit_bytes: int) -> bytes:
    stream = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
    out: list[bytes] = []
    total = 0
    for start in range(0, len(data), _CHUNK):
        out.append(stream.decompress(data[start : start + _CHUNK]))
        total += len(out[-1])
        if total > limit_bytes:
            raise errors.BadRequestError("the zstd stream is larger than the limit")
        if stream.eof:
            return b"".join(out)
    raise errors.BadRequestError("the zstd stream is cut short")


def _lzma_alone(data: bytes, limit_bytes: int) -> bytes:
    return _bounded(lzma.LZMADecompressor(lzma.FORMAT_ALONE), data, limit_bytes)


_BY_MAGIC: Final[tuple[tuple[bytes, Callable[[bytes, int], bytes]], ...]] = (
    (b"\x1f\x8b", _gzip),
    (b"\xfd7zXZ\0", lambda data, limit: _bounded(lzma.LZMADecompressor(lzma.FORMAT_XZ), data, limit)),
    (b"\x28\xb5\x2f\xfd", _zstd),
    (b"BZh", lambda data, limit: _bounded(bz2.BZ2Decompressor(), data, limit)),
    (lz4.MAGIC, lambda data, limit: lz4.decompress(data, limit_bytes=limit)),
    (b"\x5d\x00\x00", _lzma_alone),
)
