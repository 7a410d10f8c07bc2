# SPDX-License-Identifier: MIT
"""What an installation made on this host, and uninstalling takes away."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from banger.contract import decoding
from banger.system import host

PATH: Final = host.HELPER / "install-manifest.json"


class Manifest(msgspec.Struct, frozen=True):
    files: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    """Directories that others may use by now: they go when they are empty."""


def read() -> Manifest:
    try:
        return decoding.json(PATH.read_bytes(), Manifest)
    except FileNotFoundError:
        return Manifest()


def remove_empty(directories: Iterable[Path]) -> None:
    """The innermost first; one that somebody uses stays."""
    for path in sorted(directories, reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()
