# SPDX-License-Identifier: MIT
"""As many files of one kind as one file system takes, in a process of its own.

`python -m bench.image_full_once KIND DISK` says how many that are; with their number as a third argument it
makes the file system, and says how long that took and the most memory.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from banger.contract import errors
from banger.images import flatten
from banger.images.mkfs import filesystem
from banger.tarstream import reader
from bench import pull_once
from tests.unit import tars

KINDS: Final = ("one directory", "long names", "attributes")
LIMITS: Final = filesystem.Limits()
_HEADROOM_BYTES: Final = 1 << 20
_OURS: Final = 8
"""Room for what is not of the kind: directories above it, `lost+found`."""


def most(kind: str, disk: Path, limits: filesystem.Limits = LIMITS) -> int:
    """How many of a kind are taken before one is refused."""
    taken = 0

    def pieces() -> Iterator[bytes]:
        nonlocal taken
        for taken in itertools.count():
            yield _file(kind, taken)

    with filesystem.Filesystem(disk, limits=limits) as made, contextlib.suppress(errors.BadRequestError):
        flatten.Tree(made).add(reader.entries(pieces()), "layer 1")
    return taken - _OURS


def once(kind: str, disk: Path, files: int, limits: filesystem.Limits = LIMITS) -> dict[str, float]:
    began = time.perf_counter()
    pieces = itertools.chain((_file(kind, number) for number in range(files)), [tars.END])
    with filesystem.Filesystem(disk, limits=limits) as made:
        flatten.Tree(made).add(reader.entries(pieces), "layer 1")
        made.finish(headroom_bytes=_HEADROOM_BYTES)
    return {"files": files, "done_s": time.perf_counter() - began, "peak_bytes": pull_once.peak_bytes()}


def _file(kind: str, number: int) -> bytes:
    match kind:
        case "one directory":
            return tars.file(b"d/a-file-%d" % number)
        case "long names":
            return tars.file(b"d%d/%s" % (number // 100, (b"a-file-%d-" % number).ljust(90, b"x")))
        case "attributes":
            return tars.pax((b"SCHILY.xattr.user.note", b"%d" % number)) + tars.file(
                b"d%d/a-file-%d" % (number // 100, number)
            )
    raise ValueError(kind)


if __name__ == "__main__":
    asked, where = sys.argv[1], Path(sys.argv[2])
    print(json.dumps(once(asked, where, int(sys.argv[3])) if sys.argv[3:] else most(asked, where)))
