# SPDX-License-Identifier: MIT
"""Programs that outlive whoever started them, found by the scratch directory that they were started for.

A process group is no bound: fakeroot's daemon leaves it, and all of it goes on when bangerd is killed. But
a program that works in a scratch directory has it in its environment (HOME, TMPDIR), and so has what it
starts. Used before such a directory is deleted.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from banger.contract import errors

_PROC: Final = Path("/proc")
_LIMIT_S: Final = 10.0


class _Process(NamedTuple):
    pid: int
    parent: int
    environment: bytes


def end(directory: Path) -> int:
    """Kills all that was started for this directory, and what that started; how many there were.

    Returns when they are gone. Raises DeadlineError for what cannot be ended.
    """
    ended, deadline = 0, time.monotonic() + _LIMIT_S
    while found := at_work(directory):
        with contextlib.ExitStack() as stack:
            held = {pid: each for pid in found if (each := _hold(stack, pid)) is not None}
            still = at_work(directory)  # what is held keeps its number from here on
            doomed = [held[pid] for pid in held.keys() & still]
            for descriptor in doomed:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            ended += len(doomed)
            if not _gone(doomed, deadline):
                raise errors.DeadlineError(f"programs that work in {directory} cannot be ended: {found}")
    return ended


def at_work(directory: Path) -> set[int]:
    """With the descendants of those that name the directory: they may have cleaned their environment."""
    running = {each.pid: each for each in _processes()}
    found = {each.pid for each in running.values() if _names(each.environment, directory)}
    while more := {each.pid for each in running.values() if each.parent in found} - found:
        found |= more
    return found - {os.getpid()}


def _names(environment: bytes, directory: Path) -> bool:
    wanted = os.fsencode(directory)
    values = (each.partition(b"=")[2] for each in environment.split(b"\0"))
    return any(value == wanted or value.startswith(wanted + b"/") for value in values)


def _processes() -> Iterator[_Process]:
    """What ends meanwhile is left out."""
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
                if fields[0] != b"Z":
                    yield _Process(int(entry.name), int(fields[1]), _environment(entry))


def _environment(entry: Path) -> bytes:
    """Nothing for one that we may not look into: of another user, or in another user namespace."""
    try:
        return (entry / "environ").read_bytes()
    except PermissionError:
        return b""


def _hold(stack: contextlib.ExitStack, pid: int) -> int | None:
    """A pidfd; None for one that is gone."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    stack.callback(os.close, descriptor)
    return descriptor


def _gone(held: list[int], deadline: float) -> bool:
    poll = select.poll()
    for descriptor in held:
        poll.register(descriptor, select.POLLIN)
    left = len(held)
    while left:
        ended = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not ended:
            return False
        for descriptor, _ in ended:
            poll.unregister(descriptor)
        left -= len(ended)
    return True
