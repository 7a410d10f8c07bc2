# SPDX-License-Identifier: MIT
"""Reads the helper's audit record; root and the owner may."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from banger.contract import audit, decoding, errors
from banger.system import host

DIRECTORY: Final = host.HELPER / audit.DIRECTORY


def read(directory: Path = DIRECTORY) -> list[audit.Entry]:
    """Each request once, by its end where it has one; the oldest first.

    Raises NotFoundError when there is no record, UnauthorizedError for others' eyes.
    """
    try:
        if not any((directory / name).exists() for name in (*audit.FILES, *audit.REFUSED)):
            raise errors.NotFoundError(
                f"there is no record in {directory}: nothing was asked of root yet, or no banger is here",
                hint="`banger vm run --rm -- true` asks something",
            )
        kept = [_entries(directory, files) for files in (audit.FILES, audit.REFUSED)]
        found = list(heapq.merge(*kept, key=lambda entry: entry.time))
    except PermissionError:
        raise errors.UnauthorizedError(
            f"you may not read {directory}", hint="run it as the owner, or with sudo"
        ) from None
    ended = {entry.id for entry in found if entry.outcome != "begun"}
    return [entry for entry in found if entry.outcome != "begun" or entry.id not in ended]


def _entries(directory: Path, files: tuple[str, ...]) -> Iterator[audit.Entry]:
    decoder = decoding.decoder(audit.Entry)
    for path in (directory / name for name in reversed(files)):
        if path.exists():
            with path.open("rb") as lines:
                for line in lines:
                    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
                        yield decoder.decode(line)  # or a line that a full disk cut short
