# SPDX-License-Identifier: MIT
"""The user's terminal: its size, and raw mode that is always taken back."""

from __future__ import annotations

import contextlib
import os
import termios
import tty
from collections.abc import Iterator


def is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


def size(fd: int) -> tuple[int, int]:
    """Rows and columns; 24 by 80 where the terminal does not know."""
    try:
        found = os.get_terminal_size(fd)
    except OSError:
        return 24, 80
    return found.lines or 24, found.columns or 80


class RawMode:
    """A terminal that hands every byte on at once; `suspended` gives it back for a while."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before = termios.tcgetattr(fd)

    def enter(self) -> None:
        tty.setraw(self._fd, termios.TCSANOW)

    def leave(self) -> None:
        """TCSANOW: waiting for stopped output could last for ever. A terminal that is gone needs nothing."""
        with contextlib.suppress(termios.error):
            termios.tcsetattr(self._fd, termios.TCSANOW, self._before)


@contextlib.contextmanager
def raw(fd: int) -> Iterator[RawMode]:
    mode = RawMode(fd)
    mode.enter()
    try:
        yield mode
    finally:
        mode.leave()
