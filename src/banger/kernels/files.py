# SPDX-License-Identifier: MIT
"""Reads what a kernel is imported from, with bounds: every file may be hostile, or change while it is read.

What is large is copied into a directory of ours first and mapped there: a mapped file that somebody else
cuts short would end this process. Used by the kernel importer.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Final

from banger import artefacts, run
from banger.contract import errors

Data = bytes | mmap.mmap

MAX_IMAGE_BYTES: Final = 1 << 30
_CHUNK: Final = 1 << 20


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A regular file; anything else could block or never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        hint = artefacts.unread(path, error)
        raise errors.BadRequestError(f"cannot read {path}: {error.strerror}", hint=hint) from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise errors.BadRequestError(f"{path} is not a file")
        yield file


def read(path: Path, limit_bytes: int) -> bytes:
    with opened(path) as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise errors.BadRequestError(f"{path} is larger than {limit_bytes >> 20} MiB")
    return data


def head(path: Path, count: int) -> bytes:
    with opened(path) as file:
        return file.read(count)


def copy(source: Path, target: Path, limit_bytes: int = MAX_IMAGE_BYTES) -> None:
    with opened(source) as file:
        write(pieces(file, str(source), limit_bytes), target)


def pieces(file: IO[bytes], what: str, limit_bytes: int) -> Iterator[bytes]:
    left = limit_bytes
    while piece := file.read(_CHUNK):
        left -= len(piece)
        if left < 0:
            raise errors.BadRequestError(f"{what} is larger than {limit_bytes >> 20} MiB")
        yield piece


def write(data: Iterable[bytes], target: Path) -> None:
    with target.open("xb") as out:
        for piece in data:
            run.check_cancelled()
            out.write(piece)


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[Data]:
    """A file of ours as bytes that are not in this process's own memory."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def inside(directory: Path, relative: str | Path) -> Path:
    """The path with its links followed; refused when they lead out of the directory."""
    top = directory.resolve()
    try:
        path = (top / relative).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise errors.BadRequestError(f"cannot follow {relative} in {directory}: {error}") from error
    if not path.is_relative_to(top):
        raise errors.BadRequestError(
            f"{relative} leads out of {directory}", hint="replace the link by what it should lead to"
        )
    return path
