# SPDX-License-Identifier: MIT
"""Processes held by descriptor: a pid may be reused, a pidfd never means another process."""

from __future__ import annotations

import contextlib
import select
import signal
import time
from typing import Final

_PF_KTHREAD: Final = 0x00200000


def is_alive(pid: int) -> bool:
    """By /proc/<pid>/stat; not a kernel thread, a zombie, or nothing.

    A process whose first thread has ended looks like a zombie while others run: field 20 counts them.
    """
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat", "rb") as stat:
        fields = stat.read().rpartition(b")")[2].split()
        runs = fields[0] not in b"ZX" or int(fields[17]) > 1
        return runs and not int(fields[6]) & _PF_KTHREAD
    return False


def wait(pidfd: int, *, deadline: float, other: int = -1) -> list[int]:
    """The descriptors that became readable (a pidfd does when its process ends); none at the deadline."""
    poll = select.poll()
    for fd in (pidfd, other):
        if fd >= 0:
            poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)]


def send(pidfd: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)
