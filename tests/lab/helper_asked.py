# SPDX-License-Identifier: MIT
"""The helper of a lab, asked by one process there that stays: to start one takes seconds in a lab."""

from __future__ import annotations

import select
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from banger.contract import privileged
from lab import errors, limits, provision
from lab.session import Lab

_PLACE = "/usr/local/lib/banger/helper_driver.py"
_LIMIT_S = 3600
ANSWER_LIMIT_S = limits.patient(120)

Ask = Callable[[Sequence[privileged.Request[Any]]], list[privileged.Reply]]
"""The replies, up to the first error."""


def bring(lab: Lab) -> None:
    lab.write(_PLACE, Path(__file__).with_name("helper_driver.py").read_bytes())


@contextmanager
def asked(lab: Lab, user: str = provision.OWNER) -> Iterator[Ask]:
    """Asks as that user, by the daemon's own client, until the block ends."""
    driver = _Driver(lab, user)
    try:
        yield driver.ask
    finally:
        driver.end()


class _Driver:
    """The process that asks. One whose answer did not come ends: the answer is not to be the next one's."""

    def __init__(self, lab: Lab, user: str) -> None:
        self._lab = lab
        self._user = user
        self._open = ExitStack()
        self._running: subprocess.Popen[bytes] | None = None

    def ask(self, requests: Sequence[privileged.Request[Any]]) -> list[privileged.Reply]:
        if self._running is None:
            argv = [f"{provision.VENV}/bin/python", "-I", _PLACE]
            opening = self._lab.shell.open(argv, user=self._user, limit_s=_LIMIT_S)
            self._running = self._open.enter_context(opening)
        try:
            return _exchange(self._running, requests)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        self._open.close()
        self._running = None


def _exchange(
    running: subprocess.Popen[bytes], requests: Sequence[privileged.Request[Any]]
) -> list[privileged.Reply]:
    assert running.stdin is not None
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdin.write(msgspec.json.encode(requests) + b"\n")
    running.stdin.flush()
    if not select.select([running.stdout], [], [], ANSWER_LIMIT_S)[0]:
        kinds = ", ".join(type(request).__name__ for request in requests)
        raise errors.RunTimeoutError(f"the helper gave no answer in {ANSWER_LIMIT_S} s to {kinds}")
    line = running.stdout.readline()
    assert line, running.stderr.read().decode(errors="replace")
    return msgspec.json.decode(line, type=list[privileged.Reply])
