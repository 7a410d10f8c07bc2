# SPDX-License-Identifier: MIT
"""TOML files that people write: decoded strictly, refused with the file and the key in the message."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from banger.contract import decoding, errors

T = TypeVar("T")

_WHERE: Final = re.compile(r"(.*) - at `\$\.(.+)`", re.DOTALL)


def read(path: Path, kind: type[T], *, hint: str) -> T:
    """Raises FileNotFoundError for no file, BadRequestError for one that is wrong."""
    try:
        return parse(path.read_text(), kind, what=str(path), hint=hint)
    except UnicodeDecodeError as error:
        raise errors.BadRequestError(f"{path}: it is not TOML: {error}", hint=hint) from error


def parse(text: str, kind: type[T], *, what: str, hint: str) -> T:
    try:
        return decoding.convert(tomllib.loads(text), kind)
    except msgspec.ValidationError as error:
        raise errors.BadRequestError(f"{what}: {_by_key(str(error))}", hint=hint) from error
    except (ValueError, RecursionError) as error:
        # Besides its own error: a number of thousands of digits, or brackets without end.
        raise errors.BadRequestError(f"{what}: it is not TOML: {error}", hint=hint) from error


def _by_key(text: str) -> str:
    """The key first, as our own checks have it; msgspec puts it last."""
    found = _WHERE.fullmatch(text)
    return f"{found[2]}: {found[1][0].lower()}{found[1][1:]}" if found else text[0].lower() + text[1:]
