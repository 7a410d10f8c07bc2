# SPDX-License-Identifier: MIT
"""A kernel's build configuration: which options are built in, which are modules.

From the image itself (CONFIG_IKCONFIG) or from the `config` file beside it. Used by the importer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from banger.contract import errors
from banger.kernels import files, payload

LIMIT_BYTES: Final = 4 << 20
_EMBEDDED: Final = b"IKCFG_ST"
_LINE = re.compile(r"^CONFIG_([A-Za-z0-9_]+)=(.*)$", re.MULTILINE)

Config = Mapping[str, str]
"""From an option, without CONFIG_, to `y`, `m` or a value; what is not set is not there."""


def parse(text: bytes) -> Config:
    return dict(_LINE.findall(text.decode(errors="replace")))


def embedded(image: files.Data) -> Config | None:
    """None when the image carries no configuration, or none that can be read."""
    start = image.find(_EMBEDDED + b"\x1f\x8b")
    if start < 0:
        return None
    packed = image[start + len(_EMBEDDED) : start + len(_EMBEDDED) + LIMIT_BYTES]
    try:
        return parse(payload.decompress(packed, limit_bytes=LIMIT_BYTES)) or None
    except errors.BadRequestError:
        return None


def read(path: Path) -> Config:
    """Raises BadRequestError for a file that is no configuration."""
    found = parse(files.read(path, LIMIT_BYTES))
    if not found:
        raise errors.BadRequestError(f"{path} is no kernel configuration")
    return found
