# SPDX-License-Identifier: MIT
"""A small host for tests of the helper: directories, files of an owner, a network namespace of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from banger.helper import policy as policies
from banger.helper.linux import loop

OWNER = 12345
STRANGER = 12346
# Loop devices are the whole machine's: two processes that test at once must not tear down each other's.
_LOOKED_AT_S = 20
VM = f"01{os.getpid():010x}"
OTHER_VM = f"ba{os.getpid():010x}"
IMAGE = "aaaaaaaaaaaa"
KERNEL = "bbbbbbbbbbbb"
NO_SHA = "0" * 64
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True, slots=True)
class HelperWorld:
    """Where everything is. `state` is the owner's, `root` the helper's."""

    state: Path
    root: Path
    policy: policies.Policy

    def owned(self, path: str, data: bytes = b"x" * 4096) -> Path:
        """A file of the owner's beneath the state directory."""
        file = self.state / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        for each in (file, *file.parents):
            if self.state in (each, *each.parents):
                os.chown(each, OWNER, OWNER)
        return file


def make(directory: Path) -> HelperWorld:
    state, root, guest = (directory / name for name in ("state", "root", "guest"))
    for each in (state, root, guest):
        each.mkdir()
        each.chmod(0o755)
    os.chown(state, OWNER, OWNER)
    state.chmod(0o700)
    root.chmod(0o711)
    (guest / f"banger-guest-{os.uname().machine}").write_bytes(b"\x7fELF guest" * 1000)
    policy = policies.Policy(
        owner_uid=OWNER,
        owner_gid=OWNER,
        owner_name="owner",
        network="10.213.240.0/20",
        state_dir=str(state),
        helper_dir=str(root),
        firecracker_sha256=NO_SHA,
        jailer_sha256=NO_SHA,
        guest_dir=str(guest),
        cgroup_mount=str(directory / "cgroup"),
    )
    return HelperWorld(state, root, policy)


@contextlib.contextmanager
def network_namespace() -> Iterator[None]:
    """Inside, this thread has an empty network of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        assert libc.unshare(_CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        yield
    finally:
        assert libc.setns(home, _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        os.close(home)


def loops_left() -> list[loop.Loop]:
    """Of the VM, when nobody looks any more: whoever lists all such devices has each open for a moment."""
    deadline = time.monotonic() + _LOOKED_AT_S
    while (left := loop.scan(f"banger/{VM}/")) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def make_ext4(path: Path, *, size_mib: int = 16, content: Path | None = None) -> None:
    with path.open("wb") as file:
        file.truncate(size_mib << 20)
    source = ["-d", str(content)] if content is not None else []
    subprocess.run(["mkfs.ext4", "-q", *source, str(path)], check=True, stdin=subprocess.DEVNULL, timeout=30)


def read_ext4(path: str | Path, command: str) -> str:
    """What debugfs prints for one command."""
    done = subprocess.run(
        ["debugfs", "-R", command, str(path)], check=True, capture_output=True, text=True, timeout=30
    )
    return done.stdout
