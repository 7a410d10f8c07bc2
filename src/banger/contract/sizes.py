# SPDX-License-Identifier: MIT
"""Human sizes and the integers they mean: units are binary, a bare number counts MiB. And counts of things.

Used by the CLI for options and tables, by whoever reads a size from a configuration file, and in messages.
"""

from __future__ import annotations

import re
from typing import Final

from banger.contract import errors

KIB: Final = 1024
MIB: Final = 1024 * KIB

_SHIFT: Final = {"": 20, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE: Final = r"([0-9]{1,9}(?:\.[0-9]{1,3})?)\s*(?:([KMGT])(?:i?B)?|(B))?"
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def parse_bytes(text: str) -> int:
    """`2G`, `512M`, `1.5GiB`, `300` (MiB). Raises BadRequestError for anything else."""
    found = re.fullmatch(_SIZE, text.strip(), re.IGNORECASE)
    if found is None:
        raise errors.BadRequestError(
            f"{text!r} is not a size", hint="write a number and K, M, G or T, such as 512M or 2G"
        )
    unit = (found[2] or found[3] or "").upper()
    whole, _, fraction = found[1].partition(".")
    thousandths = int(whole) * 1000 + int(f"{fraction:0<3}")
    return (thousandths << _SHIFT[unit]) // 1000


def parse_mib(text: str) -> int:
    """A size in whole MiB; one that is not is refused, not rounded."""
    size_bytes = parse_bytes(text)
    if size_bytes % MIB:
        raise errors.BadRequestError(f"{text!r} is not a whole number of MiB", hint="such as 512M or 2G")
    return size_bytes // MIB


def text_of_bytes(size_bytes: int) -> str:
    """With at most one decimal: `0 B`, `1.5 GiB`."""
    size, power = float(size_bytes), 0
    while size >= 1000 and power < len(_UNITS) - 1:
        size, power = size / KIB, power + 1
    text = f"{size:.1f}".removesuffix(".0") if size < 100 else f"{size:.0f}"
    return f"{text} {_UNITS[power]}"


def text_of_mib(size_mib: int) -> str:
    return text_of_bytes(size_mib * MIB)


def counted(count: int, what: str) -> str:
    """`1 file`, `2 files`; for words that take an `s`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
