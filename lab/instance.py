# SPDX-License-Identifier: MIT
"""The directory of one named lab, and the lock that says whether it is in use. Used by session and cli."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import errors

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
RECORD = "lab.json"


@dataclass(frozen=True, slots=True)
class Identity:
    """What a lab was made from."""

    image_key: str
    cpus: int
    memory_mib: int
    layer_key: str | None = None


@dataclass(frozen=True, slots=True)
class Instance:
    """A lab's directory; the lock is held by its owner and by its keeper."""

    name: str
    path: Path
    lock_fd: int | None

    def write(self, identity: Identity) -> None:
        (self.path / RECORD).write_text(json.dumps(asdict(identity)))

    def read(self) -> Identity:
        return Identity(**json.loads((self.path / RECORD).read_text()))

    def close(self) -> None:
        if self.lock_fd is not None:
            with contextlib.suppress(OSError):
                os.close(self.lock_fd)


def create(root: Path, name: str) -> Instance:
    """Make an empty directory for a lab of this name; what an earlier one left is deleted."""
    instance = _claim(root, name)
    if instance is None:
        raise errors.BusyError(
            f"a lab named {name} runs already", hint=f"run: python -m lab down --name {name}"
        )
    shutil.rmtree(instance.path, ignore_errors=True)
    instance.path.mkdir(mode=0o700)
    return instance


def find(root: Path, name: str) -> Instance:
    """Take up the directory of a lab that somebody else started."""
    path = _directory(root, name)
    if not (path / RECORD).exists():
        raise errors.NotRunningError(
            f"there is no lab named {name}", hint=f"run: python -m lab up --name {name}"
        )
    return Instance(name, path, None)


def delete(root: Path, name: str) -> bool:
    """Delete the directory of a lab that has ended; say whether it had."""
    instance = _claim(root, name)
    if instance is None:
        return False
    shutil.rmtree(instance.path, ignore_errors=True)
    instance.close()
    return True


def names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "labs").glob("*") if (path / RECORD).exists())


def prune(root: Path) -> None:
    """Delete what labs that ended without saying goodbye left."""
    for path in (root / "labs").glob("*"):
        if path.is_dir():
            delete(root, path.name)


def _claim(root: Path, name: str) -> Instance | None:
    path = _directory(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path.with_name(f"{name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return Instance(name, path, fd)


def _directory(root: Path, name: str) -> Path:
    if not NAME.fullmatch(name):
        raise errors.LabError(
            f"not a lab's name: {name!r}", hint="use lower-case letters, digits and hyphens"
        )
    return root / "labs" / name
