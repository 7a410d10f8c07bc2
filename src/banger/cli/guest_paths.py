# SPDX-License-Identifier: MIT
"""What is in a directory of a guest, for a shell that completes a word: within a moment, or nothing."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Final, NoReturn

from banger.cli import attach, command, render, vm_copy
from banger.contract import errors, resources

_LIMIT_S: Final = 2.0
_LIMIT_BYTES: Final = 1 << 18
_OURS: Final = "banger: "
"""How a line begins that the daemon says meanwhile."""


def like(settings: command.Settings, vm: str, path: str) -> list[str]:
    """The paths that begin so, as they were typed; directories end in a slash. Needs `ls` in the guest."""
    above, slash, begin = path.rpartition("/")
    directory = above + slash
    kept = attach.Kept(_LIMIT_BYTES)
    with contextlib.suppress(errors.BangerError, OSError), _within(_LIMIT_S):
        place = vm_copy.parse_place(f"{vm}:{directory}")
        request = resources.ExecRequest(argv=("ls", "-1Ap", "--", place.path))
        if attach.run(settings.client(), vm, request, stdin=False, kept=kept, forwarded=()) == 0:
            names = kept.data.decode(errors="surrogateescape").splitlines()
            return [f"{directory}{name}" for name in names if _fits(name, begin)]
    return []


def _fits(name: str, begin: str) -> bool:
    """A hidden one only where a dot was typed; one that would drive the terminal never."""
    is_shown = begin.startswith(".") or not name.startswith(".")
    return is_shown and render.safe(name) == name and name.startswith(begin) and not name.startswith(_OURS)


@contextlib.contextmanager
def _within(limit_s: float) -> Iterator[None]:
    """Whatever it waits for, a connection too."""

    def over(*_: object) -> NoReturn:
        raise errors.DeadlineError("the guest did not answer in time")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
