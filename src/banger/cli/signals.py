# SPDX-License-Identifier: MIT
"""Signals that reach the CLI: turned into an exception, or into bytes that `poll` can wait for."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Final

from banger.cli import exits

ENDING: Final = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def raised(numbers: Sequence[signal.Signals] = ENDING) -> Iterator[None]:
    """Inside the block these signals raise, so that whatever must be tidied up is."""

    def end(number: int, _: FrameType | None) -> None:
        raise exits.SignalledError(number)

    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def held_back(numbers: Sequence[signal.Signals] = (signal.SIGINT, *ENDING)) -> Iterator[None]:
    """Inside the block these signals wait: a request whose answer names what to undo must be heard."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def collected(numbers: Sequence[signal.Signals]) -> Iterator[socket.socket]:
    """Inside the block each of these signals is a byte with its number on the socket that is yielded."""
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        woken = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, _ignore) for number in numbers}
        try:
            yield reader
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(woken)


def arrived(reader: socket.socket) -> bytes:
    """The numbers of the signals since the last call."""
    try:
        return reader.recv(256)
    except BlockingIOError:
        return b""


def _ignore(_: int, __: FrameType | None) -> None:
    """The wake-up descriptor has it; a handler must exist for that."""
