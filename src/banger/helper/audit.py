# SPDX-License-Identifier: MIT
"""Writes the audit record: only ever appended to, root's own, readable by the owner, bounded by rotation."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from typing import Final

import msgspec

from banger.contract import audit
from banger.helper import filesystem
from banger.helper import policy as policies
from banger.helper.linux import libc

_lock: Final = threading.Lock()
_encoder: Final = msgspec.json.Encoder()


def append(policy: policies.Policy, entry: audit.Entry) -> None:
    """One line in one write, so that a kill leaves whole lines. Raises OSError, as when the disk is full."""
    line = _encoder.encode(entry) + b"\n"
    files = audit.REFUSED if entry.outcome == "refused" else audit.FILES
    directory = f"{policy.helper_dir}/{audit.DIRECTORY}"
    path = f"{directory}/{files[0]}"
    with _lock:
        filesystem.make_directory(directory, 0o750, gid=policy.owner_gid)
        if os.path.exists(path) and os.lstat(path).st_size + len(line) > audit.MAX_FILE_BYTES:
            _rotate(directory, files)
        with libc.closing(filesystem.open_log(policy, path, os.O_APPEND)) as file:
            size = os.fstat(file).st_size
            if os.write(file, line) < len(line):  # its beginning would spoil the line that comes after it
                os.ftruncate(file, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def _rotate(directory: str, files: tuple[str, ...]) -> None:
    """The oldest goes."""
    for newer, older in reversed(list(itertools.pairwise(files))):
        if os.path.exists(f"{directory}/{newer}"):
            os.rename(f"{directory}/{newer}", f"{directory}/{older}")
