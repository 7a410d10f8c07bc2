# SPDX-License-Identifier: MIT
"""The ext4 on a VM's block devices, edited and checked by e2fsprogs as the VM's uid."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Generator, Sequence
from typing import Final

from banger.contract import errors, names, privileged
from banger.helper import filesystem, program
from banger.helper import policy as policies
from banger.helper.linux import libc

CHECK_DEADLINE_S: Final = 120.0
PATCH_DEADLINE_S: Final = 30.0
GROW_DEADLINE_S: Final = 100.0
_EXT2_SUPER_MAGIC: Final = 0xEF53
_EXT2_VALID_FS: Final = 1
_INCOMPAT_RECOVER: Final = 0x4
_INCOMPAT_64BIT: Final = 0x80
_SPARE_BYTES: Final = 1 << 20
_RO_COMPAT_ORPHAN_PRESENT: Final = 0x10000


def patch(policy: policies.Policy, request: privileged.PatchRoot, device: int, uid: int) -> None:
    """Writes the guest binary, and reads it back."""
    with open(policies.open_root_owned(policy.guest), "rb") as file:
        binary = file.read()
    with filesystem.node(policy, device, uid) as node:
        failed = _write(node, uid, binary)
    if failed:
        raise errors.OperationFailedError(
            f"could not write {names.GUEST_BINARY} into the root disk: {failed}", vm=request.vm_id
        )
    _flush(policy, device)


def _write(node: int, uid: int, binary: bytes) -> str:
    """Empty when it is written; debugfs exits 0 always, so only what it reads back counts."""
    with _memory(binary) as source:
        lines = _write_commands(source, make_directory=_lacks_directory(node, uid))
        ended = _debugfs(node, uid, lines, [source], ["-w"])
    if ended.status != 0 or f"debugfs: cat {names.GUEST_BINARY}\n".encode() + binary not in ended.output:
        return _complaint(ended.output)
    return ""


def _write_commands(source: int, *, make_directory: bool) -> list[str]:
    directory, name = names.GUEST_BINARY.rsplit("/", 1)
    return [
        *([f"mkdir {directory}"] if make_directory else []),
        f"rm {names.GUEST_BINARY}",
        f"cd {directory}",
        f"write /proc/self/fd/{source} {name}",
        f"sif {names.GUEST_BINARY} mode 0100755",
        f"sif {names.GUEST_BINARY} uid 0",
        f"sif {names.GUEST_BINARY} gid 0",
        f"cat {names.GUEST_BINARY}",
    ]


def _lacks_directory(node: int, uid: int) -> bool:
    """Looked for first: debugfs damages the file system when it makes a directory that is there."""
    return b"File not found" in _debugfs(node, uid, [f"stat {names.GUEST_DIR}"], [], []).output


def _debugfs(
    node: int, uid: int, lines: Sequence[str], sources: Sequence[int], options: Sequence[str]
) -> program.Ended:
    with _memory("".join(f"{line}\n" for line in lines).encode()) as script:
        arguments = [*options, "-f", f"/proc/self/fd/{script}", f"/proc/self/fd/{node}"]
        fds = [node, script, *sources]
        return program.run("debugfs", arguments, uid=uid, fds=fds, deadline_s=PATCH_DEADLINE_S)


def _complaint(output: bytes) -> str:
    """The last thing a tool said that has a reason, and is no echo of our commands."""
    lines = output[-4096:].decode(errors="replace").splitlines()
    said = [
        line
        for line in lines
        if not line.startswith(("debugfs", "e2fsck: aborted")) and "not found" not in line
    ]
    return said[-1][:200] if said else "it said nothing"


@contextlib.contextmanager
def _memory(data: bytes) -> Generator[int]:
    """An anonymous file of root's with this content, of mode 0777: the VM's uid may open it by number."""
    with libc.closing(os.memfd_create("banger")) as fd:
        os.write(fd, data)
        yield fd


def _flush(policy: policies.Policy, device: int) -> None:
    """What debugfs wrote has reached the overlay, or we hear of it now."""
    with filesystem.node(policy, device, 0) as node, _opened(node) as fd:
        os.fsync(fd)


def _opened(node: int) -> contextlib.AbstractContextManager[int]:
    return libc.closing(os.open(f"/proc/self/fd/{node}", os.O_RDONLY | os.O_CLOEXEC))


def check(policy: policies.Policy, device: int, uid: int) -> None:
    """e2fsck as the VM's uid: it parses what the owner or the guest made."""
    deadline = time.monotonic() + CHECK_DEADLINE_S
    with filesystem.node(policy, device, uid) as node:
        if _is_clean(node):
            return
        for mode in ("-p", "-y"):
            ended = _run("e2fsck", mode, node=node, uid=uid, deadline=deadline)
            if ended.status in {0, 1}:
                return
    said = _complaint(ended.output)
    raise errors.OperationFailedError(
        f"e2fsck could not repair the file system (status {ended.status}): {said}"
    )


def grow(policy: policies.Policy, device: int, uid: int) -> None:
    """The file system fills its device: resize2fs as the VM's uid, after the whole check that it wants."""
    deadline = time.monotonic() + GROW_DEADLINE_S
    with filesystem.node(policy, device, uid) as node:
        if not _has_room(node):
            return
        _run("e2fsck", "-f", "-y", node=node, uid=uid, deadline=deadline)
        ended = _run("resize2fs", node=node, uid=uid, deadline=deadline)
    if ended.status != 0:
        said = _complaint(ended.output)
        raise errors.OperationFailedError(f"resize2fs could not grow the file system: {said}")
    _flush(policy, device)


def _run(command: str, *options: str, node: int, uid: int, deadline: float) -> program.Ended:
    left_s = max(1.0, deadline - time.monotonic())
    return program.run(command, [*options, f"/proc/self/fd/{node}"], uid=uid, fds=[node], deadline_s=left_s)


def _superblock(node: int) -> tuple[bytes, int]:
    """struct ext2_super_block, or zeros, and the size of the device."""
    with _opened(node) as fd:
        return os.pread(fd, 1024, 1024).ljust(1024, b"\0"), os.lseek(fd, 0, os.SEEK_END)


def _has_room(node: int) -> bool:
    """Whether the device has blocks that a larger file system would use: a last group of blocks that could
    hold little more than its own tables is left out of any.
    """
    block, size = _superblock(node)
    if struct.unpack_from("<H", block, 0x38)[0] != _EXT2_SUPER_MAGIC:
        return False
    (low,), (shift,) = struct.unpack_from("<I", block, 0x04), struct.unpack_from("<I", block, 0x18)
    (features,), (high,) = struct.unpack_from("<I", block, 0x60), struct.unpack_from("<I", block, 0x150)
    (inodes,), (inode_bytes,) = struct.unpack_from("<I", block, 0x28), struct.unpack_from("<H", block, 0x58)
    blocks = low | (high << 32 if features & _INCOMPAT_64BIT else 0)
    used = blocks << (10 + min(shift, 6))
    return bool(size - used > inodes * inode_bytes + _SPARE_BYTES)


def _is_clean(node: int) -> bool:
    """What makes `e2fsck -p` end at once; starting it to hear that is not free."""
    block, _ = _superblock(node)
    magic, state = struct.unpack_from("<HH", block, 0x38)
    incompatible, read_only = struct.unpack_from("<II", block, 0x60)
    (last_orphan,) = struct.unpack_from("<I", block, 0xE8)
    pending = incompatible & _INCOMPAT_RECOVER or read_only & _RO_COMPAT_ORPHAN_PRESENT or last_orphan
    return magic == _EXT2_SUPER_MAGIC and state == _EXT2_VALID_FS and not pending
