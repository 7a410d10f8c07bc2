# SPDX-License-Identifier: MIT
"""Directories of this process that vanish with it: what a killed one leaves is swept by the next.

Who works in one holds a lock on it, which the kernel lets go whatever ends the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_LARGE: Final = "/var/tmp"  # noqa: S108  # a directory of our own in it is made as tempfile makes any


@contextlib.contextmanager
def made(prefix: str) -> Iterator[Path]:
    """A new one for this user alone, gone with everything in it when the block ends."""
    place = _large()
    _sweep(place, prefix)
    while True:
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        with _held(directory) as descriptor:
            if _is_locked(descriptor, wait=True) and _is_at(descriptor, directory):
                try:
                    yield directory
                finally:
                    shutil.rmtree(directory)
                return
            # Another swept it before it was locked.


def _sweep(place: str, prefix: str) -> None:
    with os.scandir(place) as entries:
        found = [Path(entry.path) for entry in entries if entry.name.startswith(prefix)]
    for directory in found:
        with _held(directory) as descriptor:
            if _is_locked(descriptor, wait=False) and os.fstat(descriptor).st_uid == os.geteuid():
                shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[int]:
    """A descriptor of it until the block ends, -1 for none. No link is followed."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield -1
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int, *, wait: bool) -> bool:
    """A file system that knows no locks of directories lets whoever waits for one have it."""
    if descriptor < 0:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return wait
    return True


def _is_at(descriptor: int, directory: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(directory))
    except FileNotFoundError:
        return False


def _large() -> str:
    """Where much can lie for a while: /tmp is often memory."""
    if os.environ.get("TMPDIR") or not os.access(_LARGE, os.W_OK | os.X_OK):
        return tempfile.gettempdir()
    return _LARGE
