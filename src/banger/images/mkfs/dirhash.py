# SPDX-License-Identifier: MIT
"""The hash of names that ext4 indexes large directories by: "half MD4", over the unsigned bytes of a name.

The arithmetic of many names at once is done in one big integer with a lane of 64 bits for each name,
which is an order of magnitude faster than name by name. Used by `mkfs` only.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Sequence
from typing import Final

_CHUNK: Final = 32
_LANES: Final = 1024
_LANE_BYTES: Final = 8
_END_OF_DIRECTORY: Final = 0xFFFFFFFE
_State = tuple[int, int, int, int]


def _select(x: int, y: int, z: int) -> int:
    return z ^ x & (y ^ z)


def _majority(x: int, y: int, z: int) -> int:
    return (x & y) + ((x ^ y) & z)


def _parity(x: int, y: int, z: int) -> int:
    return x ^ y ^ z


# Function, constant, order of the words, rotations.
_ROUNDS: Final[tuple[tuple[Callable[[int, int, int], int], int, tuple[int, ...], tuple[int, ...]], ...]] = (
    (_select, 0, (0, 1, 2, 3, 4, 5, 6, 7), (3, 7, 11, 19)),
    (_majority, 0x5A827999, (1, 3, 5, 7, 0, 2, 4, 6), (3, 5, 9, 13)),
    (_parity, 0x6ED9EBA1, (3, 7, 2, 6, 1, 5, 0, 4), (3, 9, 11, 15)),
)


def hashes(names: Sequence[bytes], seed: bytes) -> array[int]:
    """The hash of each name, its lowest bit clear."""
    found = array("I", bytes(4 * len(names)))
    by_length: dict[int, list[int]] = {}
    for number, name in enumerate(names):
        by_length.setdefault(-(-len(name) // _CHUNK), []).append(number)
    for chunks, numbers in by_length.items():
        for start in range(0, len(numbers), _LANES):
            part = numbers[start : start + _LANES]
            for number, value in zip(
                part, _lanes([names[each] for each in part], chunks, seed), strict=True
            ):
                value &= 0xFFFFFFFE
                found[number] = value if value != _END_OF_DIRECTORY else _END_OF_DIRECTORY - 2
    return found


def _lanes(names: list[bytes], chunks: int, seed: bytes) -> tuple[int, ...]:
    """The hashes of names that have the same number of chunks."""
    count = len(names)
    ones = int.from_bytes(b"\1".ljust(_LANE_BYTES, b"\0") * count, "little")
    first, second, third, fourth = (word * ones for word in struct.unpack("<4I", seed))
    state = (first, second, third, fourth)
    for chunk in range(chunks):
        padded = b"".join(_padded(name[chunk * _CHUNK :]) for name in names)
        words = struct.unpack(f">{8 * count}I", padded)
        inputs = [int.from_bytes(struct.pack(f"<{count}Q", *words[each::8]), "little") for each in range(8)]
        state = _transform(state, inputs, ones)
    return struct.unpack(f"<{count}Q", state[1].to_bytes(count * _LANE_BYTES, "little"))


def _padded(rest: bytes) -> bytes:
    """Eight words; the length of the rest stands for what is missing of a word, and of those after it."""
    if len(rest) >= _CHUNK:
        return rest[:_CHUNK]
    fill = bytes((len(rest),))
    begun = len(rest) % 4
    whole = len(rest) - begun
    return (rest[:whole] + (fill * (4 - begun) + rest[whole:] if begun else b"")).ljust(_CHUNK, fill)


def _transform(state: _State, words: list[int], ones: int) -> _State:
    mask = ones * 0xFFFFFFFF
    a, b, c, d = state
    for function, constant, order, rotations in _ROUNDS:
        added = constant * ones
        for step, word in enumerate(order):
            turn = rotations[step % 4]
            total = (a + (function(b, c, d) & mask) + words[word] + added) & mask
            # A lane's high half is free: what is shifted out of the low half lands there.
            shifted = total << turn
            a, b, c, d = d, (shifted | shifted >> 32) & mask, b, c
    return (
        (state[0] + a) & mask,
        (state[1] + b) & mask,
        (state[2] + c) & mask,
        (state[3] + d) & mask,
    )
