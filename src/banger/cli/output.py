# SPDX-License-Identifier: MIT
"""Results on stdout: JSON for programs, text for people."""

from __future__ import annotations

import sys
from typing import Any

import msgspec


def json(value: Any) -> None:
    """One document. `value` is whatever msgspec encodes."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    sys.stdout.write(text + "\n")


def text(value: str) -> None:
    sys.stdout.write(value if not value or value.endswith("\n") else value + "\n")
