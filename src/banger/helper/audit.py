# SPDX-License-Identifier: MIT
"""Writes the audit record: only ever appended to, root's own, readable by the owner, bounded by rotation."""

from __future__ import annotations

import itertools
import os
import threading
from typing import Final

import msgspec

from banger.contract import audit
from banger.helper import filesystem
from banger.helper import policy as policies

_FLAGS: Final = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_lock: Final = threading.Lock()
_encoder: Final = msgspec.json.Encoder()


def append(policy: policies.Policy, entry: audit.Entry) -> None:
    """One line in one write, so that a kill leaves whole lines. Raises OSError, as when the disk is full."""
    line = _encoder.encode(entry) + b"\n"
    files = audit.REFUSED if entry.outcome == "refused" else audit.FILES
    directory = f"{policy.helper_dir}/{audit.DIRECTORY}"
    with _lock:
        filesystem.make_directory(directory, 0o750, gid=policy.owner_gid)
        fd = _opened(policy, f"{directory}/{files[0]}")
        try:
            if os.fstat(fd).st_size + len(line) > audit.MAX_FILE_BYTES:
                os.close(fd)
                fd = -1
                _rotate(directory, files)
                fd = _opened(policy, f"{directory}/{files[0]}")
            os.write(fd, line)
        finally:
            if fd >= 0:
                os.close(fd)


def _opened(policy: policies.Policy, path: str) -> int:
    fd = os.open(path, _FLAGS, 0o600)
    os.fchown(fd, 0, policy.owner_gid)
    os.fchmod(fd, 0o640)
    return fd


def _rotate(directory: str, files: tuple[str, ...]) -> None:
    """The oldest goes."""
    for newer, older in reversed(list(itertools.pairwise(files))):
        if os.path.exists(f"{directory}/{newer}"):
            os.rename(f"{directory}/{newer}", f"{directory}/{older}")
