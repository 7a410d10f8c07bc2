# SPDX-License-Identifier: MIT
"""Two trees side by side: everything that a file system says of each file, and what is in it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

LOST_AND_FOUND = b"lost+found"

Facts = dict[str, object]


@contextlib.contextmanager
def mounted(image: Path, at: Path) -> Iterator[Path]:
    """An image of ours, read-only, in the kernel's own eyes."""
    at.mkdir()
    subprocess.run(["mount", "-t", "ext4", "-o", "ro,loop,noatime", image, at], check=True, timeout=60)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", at], check=True, timeout=60)


def facts(root: Path) -> dict[bytes, Facts]:
    """By path below the root, the root itself as `.`."""
    top = os.fsencode(root)
    found = {b".": _facts(top)}
    waiting = [b""]
    while waiting:
        prefix = waiting.pop()
        with os.scandir(os.path.join(top, prefix)) as entries:
            for entry in entries:
                path = prefix + entry.name
                if path == LOST_AND_FOUND:
                    continue
                found[path] = _facts(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(path + b"/")
    return found


def _facts(path: bytes) -> Facts:
    about = os.lstat(path)
    found: Facts = {
        "mode": stat.filemode(about.st_mode),
        "owner": (about.st_uid, about.st_gid),
        "mtime": about.st_mtime_ns,
        "xattrs": {name: os.getxattr(path, name, follow_symlinks=False) for name in _xattrs(path)},
    }
    if not stat.S_ISDIR(about.st_mode):
        found["links"] = about.st_nlink
    if stat.S_ISREG(about.st_mode):
        found["size"] = about.st_size
        with open(path, "rb") as file:
            found["content"] = hashlib.file_digest(file, "sha256").hexdigest()
    elif stat.S_ISLNK(about.st_mode):
        found["target"] = os.readlink(path)
    elif stat.S_ISCHR(about.st_mode) or stat.S_ISBLK(about.st_mode):
        found["device"] = (os.major(about.st_rdev), os.minor(about.st_rdev))
    return found


def _xattrs(path: bytes) -> list[str]:
    return sorted(os.listxattr(path, follow_symlinks=False))


def differences(ours: Path, theirs: Path) -> list[str]:
    """One line each, the first hundred."""
    left, right = facts(ours), facts(theirs)
    lines = [f"only ours: {path!r}" for path in sorted(left.keys() - right.keys())]
    lines += [f"only theirs: {path!r}" for path in sorted(right.keys() - left.keys())]
    for path in sorted(left.keys() & right.keys()):
        for key in sorted(left[path].keys() | right[path].keys()):
            mine, other = left[path].get(key), right[path].get(key)
            if mine != other:
                lines.append(f"{path!r} {key}: ours {mine!r}, theirs {other!r}")
    return lines[:100]
