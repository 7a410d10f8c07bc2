# SPDX-License-Identifier: MIT
"""Versions of banger, which are 1.2.3, 1.2.3a1, 1.2.3b1 or 1.2.3rc1, and their order."""

from __future__ import annotations

import re
from typing import Final

from banger.contract import errors

_VERSION: Final = re.compile(r"(\d{1,6}(?:\.\d{1,6}){0,3})(?:(a|b|rc)(\d{1,6}))?")
_FINAL: Final = ("z", 0)


def parse(text: str) -> tuple[tuple[int, ...], tuple[str, int]]:
    """In an order that can be compared. Raises BadRequestError."""
    found = _VERSION.fullmatch(text)
    if found is None:
        raise errors.BadRequestError(f"{text!r} is no version of banger")
    numbers = [int(part) for part in found[1].split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers), (found[2], int(found[3])) if found[2] else _FINAL


def refuse_older(version: str, installed: str) -> None:
    """Raises ConflictError when `version` is older than what is installed."""
    if parse(version) < parse(installed):
        raise errors.ConflictError(
            f"banger {installed} is installed, and {version} is older: it need not understand what the "
            "newer one wrote",
            hint="stay with the newer one, or take it off first: banger system uninstall --purge",
        )
