# SPDX-License-Identifier: MIT
"""One change of a host's installation at a time, which signals end in order."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from banger.contract import errors

_LOCK: Final = "upgrade.lock"
"""The name that versions before this one lock when they upgrade."""
_ENDING: Final = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def on_host(helper_dir: Path) -> Iterator[None]:
    """Raises ConflictError while another installation, upgrade or removal is under way."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(helper_dir / _LOCK, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise errors.ConflictError(
            "another installation, upgrade or removal is under way on this host",
            hint="wait until it has ended",
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def cancelled_by_signals() -> Iterator[None]:
    """Who ends it, or closes the terminal, gets back what was before."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None  # noqa: S101 - a coroutine runs in one
    for number in _ENDING:
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number in _ENDING:
            loop.remove_signal_handler(number)
