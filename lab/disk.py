# SPDX-License-Identifier: MIT
"""Hands a lab a directory as a read-only disk, far quicker than a copy. Used by session.

The disk is plugged into a running machine, never part of its start: a saved state knows nothing of it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from lab import cache, command, qemu

log = logging.getLogger("lab")

KEPT_DISKS = 4
MIB = 1 << 20
DISK = "artefacts.ext4"
NODE = "artefacts"


def ensure(root: Path, directory: Path) -> cache.Entry:
    """Open the disk with this directory's content, making it when the cache has none."""
    store = cache.Cache(root, "artefacts", KEPT_DISKS)
    return store.ensure(cache.key_of(_content(directory)), lambda stage: _build(directory, stage))


def plug(machine: qemu.Machine, entry: cache.Entry) -> None:
    """Give a running machine the disk; the lab's udev knows it by its serial number."""
    file = {"driver": "file", "filename": str(entry.path / DISK), "read-only": True}
    device = {"driver": "virtio-blk-pci", "id": NODE, "serial": NODE, "drive": NODE, "bus": "slot0"}
    with machine.control() as control:
        control.execute(
            "blockdev-add", {"node-name": NODE, "driver": "raw", "read-only": True, "file": file}
        )
        control.execute("device_add", device)


def is_plugged(machine: qemu.Machine) -> bool:
    with machine.control() as control:
        return any(node["node-name"] == NODE for node in control.execute("query-named-block-nodes"))


def unplug(machine: qemu.Machine) -> None:
    """Take the disk away and return when the machine has let go of it."""
    with machine.control() as control:
        control.execute("device_del", {"id": NODE})
        while control.wait_event("DEVICE_DELETED")["data"].get("device") != NODE:
            pass
        control.execute("blockdev-del", {"node-name": NODE})


def _content(directory: Path) -> Iterator[str]:
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        yield f"{path.relative_to(directory)} {status.st_mode:o} {status.st_uid} {status.st_gid}"
        if stat.S_ISLNK(status.st_mode):
            yield os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            with path.open("rb") as file:
                yield hashlib.file_digest(file, "blake2b").hexdigest()


def _build(directory: Path, stage: Path) -> None:
    paths = [path.lstat() for path in directory.rglob("*")]
    content_bytes = sum(status.st_blocks * 512 for status in paths) + len(paths) * 4096
    log.info("making a disk of %s (%d MiB)", directory, content_bytes // MIB)
    disk = stage / DISK
    with disk.open("wb") as file:
        file.truncate(content_bytes + content_bytes // 10 + 16 * MIB)
    options = ["-O", "^has_journal,^resize_inode", "-m", "0", "-N", str(len(paths) + 64)]
    command.run(["mkfs.ext4", "-q", *options, "-E", "root_owner=0:0", "-d", directory, disk], timeout_s=300)
    command.run(["debugfs", "-w", "-R", "rmdir lost+found", disk], timeout_s=60)
