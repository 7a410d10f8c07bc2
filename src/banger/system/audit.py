# SPDX-License-Identifier: MIT
"""Reads the helper's audit record; root and the owner may."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from banger.contract import audit, decoding, errors
from banger.system import host

DIRECTORY: Final = host.HELPER / audit.DIRECTORY


def read(directory: Path = DIRECTORY) -> Iterator[audit.Entry]:
    """The oldest first. Raises NotFoundError when there is no record, UnauthorizedError for others' eyes."""
    decoder = decoding.decoder(audit.Entry)
    try:
        found = [directory / name for name in reversed(audit.FILES) if (directory / name).exists()]
        if not found:
            raise errors.NotFoundError(
                f"there is no record in {directory}", hint="is banger installed here?"
            )
        for path in found:
            with path.open("rb") as lines:
                for line in lines:
                    try:
                        yield decoder.decode(line)
                    except (msgspec.MsgspecError, UnicodeDecodeError):
                        continue  # a line that a full disk cut short
    except PermissionError:
        raise errors.UnauthorizedError(
            f"you may not read {directory}", hint="run it as the owner, or with sudo"
        ) from None
