# SPDX-License-Identifier: MIT
"""Looks at ext4 file systems in files by e2fsprogs, without mounting them and without root.

What is written is written by `mkfs`; root's edits of a VM's snapshot are the helper's. Used for images that
come from elsewhere, and to see what an image holds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from banger import run
from banger.contract import errors

_PACKAGE: Final = "e2fsprogs"
_DEADLINE_S: Final = 300.0
_MEMORY_BYTES: Final = 1 << 30
"""A file system from elsewhere may claim anything."""
_BANNER: Final = re.compile(rb"debugfs \d")
_INODE: Final = re.compile(r"^Inode: \d+", re.MULTILINE)


def check(image: Path) -> None:
    """A full read-only check; anything to repair is an error."""
    run.require("e2fsck", _PACKAGE)
    run.run(["e2fsck", "-f", "-n", str(image)], deadline_s=_DEADLINE_S, memory_bytes=_MEMORY_BYTES)


def exists(image: Path, path: str) -> bool:
    """Whether anything is at a path; links are not followed."""
    run.require("debugfs", _PACKAGE)
    asked = ["debugfs", "-R", f"stat {_quoted(path)}", str(image)]
    result = run.run(asked, deadline_s=_DEADLINE_S, memory_bytes=_MEMORY_BYTES)
    # It ends with status 0 whatever happened: any other complaint is an error.
    lines = (line.strip() for line in result.stderr.splitlines())
    complaints = [line for line in lines if line and not _BANNER.match(line)]
    if complaints and not any(b"File not found" in line for line in complaints):
        raise errors.OperationFailedError(f"debugfs on {image}: {complaints[0].decode(errors='replace')}")
    return _INODE.search(result.text) is not None


def _quoted(path: str) -> str:
    """In the form in which debugfs reads back exactly that path; refuses what has none."""
    plain = path.startswith("/") and not {"..", "."} & set(path.split("/"))
    if not plain or any(character in path for character in "\n\r\0"):
        raise errors.BadRequestError(f"{path!r} is not an absolute, plain path")
    return '"' + path.replace('"', '""') + '"'
