# SPDX-License-Identifier: MIT
"""Results on stdout: JSON for programs, text for people."""

from __future__ import annotations

import sys
from typing import Any

import msgspec

from banger.cli import render


def json(value: Any) -> None:
    """One document. `value` is whatever msgspec encodes."""
    text = render.json_text(msgspec.json.format(msgspec.json.encode(value), indent=2))
    sys.stdout.write(text + "\n")


def text(value: str) -> None:
    sys.stdout.write(value if not value or value.endswith("\n") else value + "\n")
