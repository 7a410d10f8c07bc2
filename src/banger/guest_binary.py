# SPDX-License-Identifier: MIT
"""Where the guest binary is that ships with this package: one per architecture, built from `guest/`."""

from __future__ import annotations

from pathlib import Path

from banger.contract import errors


def path(arch: str) -> Path:
    """Raises MissingToolError when the package was not built with it."""
    found = Path(__file__).parent / "_guest" / f"banger-guest-{arch}"
    if not found.is_file():
        raise errors.MissingToolError(
            f"the guest binary for {arch} is missing", hint="run `make guest`, or install a built wheel"
        )
    return found
