# SPDX-License-Identifier: MIT
"""Owner and VMM race root in what they can write: whatever they swap, root takes theirs or nothing.

Each race goes on until both were seen: root got what it asked for, and root met the attack and refused.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger.contract import errors, privileged
from banger.helper import filesystem, operations
from banger.helper.linux import loop
from tests.root import helper_world
from tests.root.helper_world import OWNER, VM, HelperWorld

SECRET = b"secret!" * 1024
_DEADLINE_S = 20
_WANTED = 40
REFUSALS = (errors.UnauthorizedError, errors.NotFoundError, errors.ConflictError)


@pytest.fixture
def secret(helper_world_here: HelperWorld) -> Path:
    """Root's, beside what the owner has; a directory has it under every name that root asks for."""
    top = helper_world_here.root / "secrets"
    top.mkdir(mode=0o700)
    (top / "vmlinux").write_bytes(SECRET)
    _disk(top / "work.ext4", SECRET)
    return top


def _disk(path: Path, content: bytes) -> None:
    """A file system, with something before it that root reads first."""
    helper_world.make_ext4(path, size_mib=1)
    with path.open("r+b") as file:
        file.write(content[:1024])


@contextlib.contextmanager
def swapping(world: HelperWorld, path: Path, secret: Path) -> Iterator[None]:
    """What lies at a path is the owner's, a link to the secret, or not there, as fast as that goes."""
    stop, aside, link = threading.Event(), path.with_name("aside"), path.with_name("link")

    def swap() -> None:
        while not stop.is_set():
            link.symlink_to(secret)
            os.rename(path, aside)
            os.rename(link, path)
            path.unlink()
            os.rename(aside, path)

    attacker = threading.Thread(target=swap)
    attacker.start()
    try:
        yield
    finally:
        stop.set()
        attacker.join()


def race(attempt: Callable[[], None], wanted: int = _WANTED) -> None:
    done = refused = 0
    deadline = time.monotonic() + _DEADLINE_S
    while (done < wanted or refused < wanted) and time.monotonic() < deadline:
        try:
            attempt()
        except REFUSALS:
            refused += 1
        else:
            done += 1
    assert done >= wanted
    assert refused >= wanted, "the attack never met the check, so it proves nothing"


@pytest.mark.parametrize("swapped", ["vms", f"vms/{VM}", f"vms/{VM}/work.ext4"], ids=["vms", "VM", "disk"])
def test_no_name_on_the_way_to_a_disk_can_be_swapped(
    helper_world_here: HelperWorld, secret: Path, swapped: str
) -> None:
    """The request that attaches it as a loop device, which the VMM then writes to."""
    world = helper_world_here
    _disk(world.owned(f"vms/{VM}/work.ext4"), b"content" * 1024)
    request = privileged.AttachWorkDisk(vm_id=VM, slot=7)
    operations.execute(world.policy, privileged.PrepareJail(vm_id=VM, slot=7))
    place = secret
    if swapped == "vms":
        place = secret / "vms"
        (place / VM).mkdir(parents=True)
        _disk(place / VM / "work.ext4", SECRET)
    elif swapped.endswith("ext4"):
        place = secret / "work.ext4"

    def attempt() -> None:
        operations.execute(world.policy, request)
        try:
            (found,) = [each for each in loop.scan("banger/") if VM in each.label]
            assert Path(f"/dev/loop{found.number}").read_bytes()[:7] == b"content"
        finally:
            operations.execute(world.policy, privileged.DetachWorkDisk(vm_id=VM))

    with swapping(world, world.state / swapped, place):
        race(attempt, wanted=10)  # each looks over the file system


@pytest.mark.parametrize("swapped", ["", "/vmlinux"])
def test_no_kernel_is_swapped_for_a_file_of_root_s(
    helper_world_here: HelperWorld, secret: Path, swapped: str
) -> None:
    world = helper_world_here
    kernel = f"kernels/{helper_world.KERNEL}"
    world.owned(f"{kernel}/vmlinux", b"content" * 1024)
    filesystem.make_jail(world.policy, VM, 7)
    root = filesystem.open_jail(world.policy, VM)

    def attempt() -> None:
        filesystem.link_kernel(world.policy, root, helper_world.KERNEL, "vmlinux")
        try:
            with open(os.open("vmlinux", os.O_RDONLY, dir_fd=root), "rb") as linked:
                status = os.fstat(linked.fileno())
                assert linked.read(7) == b"content"
                assert (status.st_uid, status.st_mode & 0o777) == (0, 0o444)
        finally:
            os.unlink("vmlinux", dir_fd=root)

    try:
        with swapping(world, world.state / f"{kernel}{swapped}", secret / swapped.lstrip("/")):
            race(attempt)
    finally:
        os.close(root)


def test_a_kernel_that_is_written_while_it_is_copied_is_the_one_or_refused(
    helper_world_here: HelperWorld,
) -> None:
    """What a VM boots is what root has looked at: never half of each, once a write was over for a moment."""
    world = helper_world_here
    path = world.owned(f"kernels/{helper_world.KERNEL}/vmlinux", b"a" * (4 << 20))
    filesystem.make_jail(world.policy, VM, 7)
    root = filesystem.open_jail(world.policy, VM)
    stop = threading.Event()

    def write() -> None:
        with path.open("r+b") as file:
            while not stop.is_set():
                for byte in (b"b", b"a"):
                    file.seek(0)
                    file.write(byte * (4 << 20))
                    file.flush()

    writer = threading.Thread(target=write)
    writer.start()
    said: list[str] = []
    deadline = time.monotonic() + _DEADLINE_S
    try:
        while len(said) < 10 and time.monotonic() < deadline:
            try:
                filesystem.link_kernel(world.policy, root, helper_world.KERNEL, "vmlinux")
                os.unlink("vmlinux", dir_fd=root)
            except errors.ConflictError as error:
                said.append(str(error))
    finally:
        stop.set()
        writer.join()
    assert len(said) >= 10
    assert all("changed while it was read" in each for each in said)
    time.sleep(0.02)  # beyond the grain of the file system's clock
    path.write_bytes(b"c" * (4 << 20))
    filesystem.link_kernel(world.policy, root, helper_world.KERNEL, "vmlinux")
    with open(os.open("vmlinux", os.O_RDONLY, dir_fd=root), "rb") as linked:
        assert set(linked.read()) == set(b"c")
    os.close(root)


def test_a_vmm_cannot_have_root_open_anything_but_its_socket(
    helper_world_here: HelperWorld, secret: Path
) -> None:
    """It swaps its socket for links to others until its directory is taken from it, and tries on after."""
    world = helper_world_here
    uid = world.policy.uid(7)
    target = world.root / "others.sock"
    with socket.socket(socket.AF_UNIX) as others:
        others.bind(str(target))
        target.chmod(0o600)
        before = target.lstat()

        def attempt() -> None:
            filesystem.make_jail(world.policy, VM, 7)
            root = filesystem.open_jail(world.policy, VM)
            child = _swap_as(uid, filesystem.jail(world.policy, VM) + "/root/run", target)
            try:
                filesystem.freeze_jail(root)
                try:
                    with filesystem.opened_run(root) as run:
                        filesystem.grant_socket(world.policy, run, "api.sock", uid)
                        granted = os.stat("api.sock", dir_fd=run, follow_symlinks=False)
                    assert (granted.st_uid, granted.st_gid) == (uid, OWNER)
                finally:
                    after = target.lstat()
                    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, 0, before.st_gid)
            finally:
                os.close(root)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)

        race(attempt, wanted=10)


def _swap_as(uid: int, directory: str, target: Path) -> int:
    """A process of the VM's; returns when its first socket is there."""
    ready, told = os.pipe()
    child = os.fork()
    if child:
        os.close(told)
        os.read(ready, 1)
        os.close(ready)
        return child
    try:
        os.chdir(directory)  # in its jail it has no way to walk
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        made = socket.socket(socket.AF_UNIX)
        made.bind("api.sock")
        os.write(told, b".")
        while True:
            with contextlib.suppress(OSError):
                os.symlink(target, "link")
            with contextlib.suppress(OSError):
                os.rename("api.sock", "aside")
                os.rename("link", "api.sock")
            with contextlib.suppress(OSError):
                os.rename("aside", "api.sock")
    finally:
        os._exit(1)
