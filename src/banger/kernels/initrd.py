# SPDX-License-Identifier: MIT
"""Builds the initrd for a kernel whose drivers are modules: the modules, their order, and the guest binary.

The guest binary is `/init`: it loads what `/banger-modules` lists, line by line, then mounts the root disk.
Used by the kernel importer.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from banger import run
from banger.contract import errors
from banger.kernels import cpio, modules

MODULE_LIST: Final = "banger-modules"
_MODULE_DIR: Final = "modules"
_EMPTY_DIRS: Final = ("dev", "proc", "sys", "run", "root")


def build(guest_binary: Path, load: Sequence[modules.Module]) -> bytes:
    """A gzip-compressed cpio archive; the same input gives the same bytes."""
    entries = [cpio.Entry.directory(name) for name in (*_EMPTY_DIRS, _MODULE_DIR)]
    entries.append(cpio.Entry.character_device("dev/console", 5, 1))
    entries.append(cpio.Entry.character_device("dev/null", 1, 3, 0o666))
    paths = [f"{_MODULE_DIR}/{module.name}.ko" for module in load]
    left = modules.MAX_LOADED_BYTES
    for path, module in zip(paths, load, strict=True):
        run.check_cancelled()
        entries.append(cpio.Entry.file(path, module.read()))
        left -= len(entries[-1].data)
        if left < 0:
            raise errors.BadRequestError(
                f"the modules that are needed take more than {modules.MAX_LOADED_BYTES >> 20} MiB"
            )
    listing = "".join(f"/{path}\n" for path in paths)
    entries.append(cpio.Entry.file(MODULE_LIST, listing.encode()))
    entries.append(cpio.Entry.file("init", guest_binary.read_bytes(), 0o755))
    return gzip.compress(cpio.pack(entries), compresslevel=6, mtime=0)
