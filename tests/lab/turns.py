# SPDX-License-Identifier: MIT
"""How many tests have a busy lab at once, over all workers on this machine: one for each processor.

One more makes none of them faster, and each of them slower: what they wait for has limits.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_S = 0.2


@contextmanager
def taken(directory: Path, places: int) -> Iterator[None]:
    """Wait for one of the places, and have it inside the block; it is free when this process ends, too."""
    directory.mkdir(parents=True, exist_ok=True)
    fds = [os.open(directory / f"turn-{n}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC) for n in range(places)]
    try:
        while not any(_locked(fd) for fd in fds):
            time.sleep(_POLL_S)
        yield
    finally:
        for fd in fds:
            os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
