# SPDX-License-Identifier: MIT
"""Names a process for longer than its pid is its own, and ends it by descriptor. Used by machine."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab import errors


@dataclass(frozen=True, slots=True)
class Identity:
    """A pid together with the time its process started, in clock ticks since boot."""

    pid: int
    started_ticks: int


def identify(pid: int) -> Identity | None:
    """Read who has this pid now; None when nobody has."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in brackets and may hold anything; field 22 is the start time.
    fields = stat.rpartition(")")[2].split()
    if fields[0] == "Z":
        return None
    return Identity(pid, int(fields[19]))


@contextlib.contextmanager
def held(identity: Identity) -> Iterator[int | None]:
    """Hold a descriptor of the process; None when it has ended."""
    try:
        fd = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield fd if identify(identity.pid) == identity else None
    finally:
        os.close(fd)


def is_running(identity: Identity) -> bool:
    return identify(identity.pid) == identity


def kill(identity: Identity, *, timeout_s: float = 10) -> None:
    """Kill the process and return when it is gone; it may be gone already."""
    with held(identity) as fd:
        if fd is None:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        _wait_gone(fd, identity, timeout_s)


def wait_gone(identity: Identity, *, timeout_s: float) -> None:
    """Return when the process has ended; an error at the deadline."""
    with held(identity) as fd:
        if fd is not None:
            _wait_gone(fd, identity, timeout_s)


def _wait_gone(fd: int, identity: Identity, timeout_s: float) -> None:
    if not select.select([fd], [], [], timeout_s)[0]:
        raise errors.QemuError(f"process {identity.pid} did not end within {timeout_s:g} s")
