# SPDX-License-Identifier: MIT
"""Results on stdout: JSON for programs, text for people."""

from __future__ import annotations

import os
import select
import sys
from typing import Any

import msgspec

from banger.cli import render


def json(value: Any) -> None:
    """One document. `value` is whatever msgspec encodes."""
    text(render.json_text(msgspec.json.format(msgspec.json.encode(value), indent=2)))


def raw(data: bytes) -> None:
    """Bytes as they are, at once. Waits where stdout does not block: who shares it may have made it so."""
    sys.stdout.flush()
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(1, view) :]
        except BlockingIOError:
            poller = select.poll()
            poller.register(1, select.POLLOUT)
            poller.poll()


def text(value: str) -> None:
    whole = value if not value or value.endswith("\n") else value + "\n"
    raw(whole.encode(sys.stdout.encoding, sys.stdout.errors or "strict"))
