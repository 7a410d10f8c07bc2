# SPDX-License-Identifier: MIT
"""The helper of a lab, asked by one process there that stays: to start one takes seconds in a lab."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from banger.contract import privileged
from lab import provision
from lab.session import Lab

_PLACE = "/usr/local/lib/banger/helper_driver.py"
_LIMIT_S = 3600

Ask = Callable[[Sequence[privileged.Request[Any]]], list[privileged.Reply]]
"""The replies, up to the first error."""


def bring(lab: Lab) -> None:
    lab.write(_PLACE, Path(__file__).with_name("helper_driver.py").read_bytes())


@contextmanager
def asked(lab: Lab, user: str = provision.OWNER) -> Iterator[Ask]:
    """Asks as that user, by the daemon's own client, until the block ends."""
    argv = [f"{provision.VENV}/bin/python", "-I", _PLACE]
    with lab.shell.open(argv, user=user, limit_s=_LIMIT_S) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None
        assert driver.stderr is not None
        sends, hears, complains = driver.stdin, driver.stdout, driver.stderr

        def ask(requests: Sequence[privileged.Request[Any]]) -> list[privileged.Reply]:
            sends.write(msgspec.json.encode(requests) + b"\n")
            sends.flush()
            line = hears.readline()
            assert line, complains.read().decode(errors="replace")
            return msgspec.json.decode(line, type=list[privileged.Reply])

        yield ask
