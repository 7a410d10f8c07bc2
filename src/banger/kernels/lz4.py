# SPDX-License-Identifier: MIT
"""LZ4's legacy frame, as kernels are packed with it: a magic number, then blocks behind their lengths.

Pure Python because this is needed once per imported kernel (a few seconds), which is not worth a dependency.
"""

from __future__ import annotations

import struct
from typing import Final

from banger import run
from banger.contract import errors

MAGIC: Final = b"\x02\x21\x4c\x18"
_MIN_MATCH: Final = 4


def decompress(data: bytes, *, limit_bytes: int) -> bytes:
    """Raises BadRequestError when the data is not what it says or would grow past the limit."""
    if not data.startswith(MAGIC):
        raise errors.BadRequestError("not an LZ4 legacy frame")
    out: list[bytes] = []
    total, position = 0, len(MAGIC)
    while position + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, position)
        position += 4
        if data[position - 4 : position] == MAGIC:
            continue
        if size == 0 or position + size > len(data):
            break
        run.check_cancelled()
        out.append(_block(data[position : position + size], limit_bytes - total))
        total += len(out[-1])
        position += size
    return b"".join(out)


def _block(data: bytes, limit_bytes: int) -> bytes:
    try:
        return bytes(_decode(data, limit_bytes))
    except (IndexError, struct.error) as error:
        raise errors.BadRequestError("an LZ4 block ends in the middle of a sequence") from error


def _decode(data: bytes, limit_bytes: int) -> bytearray:
    """One loop on purpose: it runs a million times per kernel, and calls would double its time."""
    out = bytearray()
    position, end = 0, len(data)
    while position < end:
        token = data[position]
        position += 1
        length = token >> 4
        if length == 15:
            while (more := data[position]) == 255:
                length += 255
                position += 1
            length += more
            position += 1
        if length:
            if position + length > end:
                raise errors.BadRequestError("an LZ4 literal ends after its block")
            out += data[position : position + length]
            position += length
        if position >= end:
            break
        distance = data[position] | data[position + 1] << 8
        position += 2
        length = token & 15
        if length == 15:
            while (more := data[position]) == 255:
                length += 255
                position += 1
            length += more
            position += 1
        length += _MIN_MATCH
        start = len(out) - distance
        if distance == 0 or start < 0 or len(out) + length > limit_bytes:
            raise errors.BadRequestError("an LZ4 match points outside the data or past the limit")
        if distance >= length:
            out += out[start : start + length]
        else:
            pattern = out[start:]
            out += (pattern * (length // distance + 1))[:length]
    return out
