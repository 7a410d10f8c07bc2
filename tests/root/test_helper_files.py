# SPDX-License-Identifier: MIT
"""The owner is hostile: nothing it puts into its directory makes root touch something else."""

from __future__ import annotations

import concurrent.futures
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from banger.contract import errors, privileged
from banger.helper import filesystem, operations
from tests.root.helper_world import IMAGE, KERNEL, OTHER_VM, OWNER, VM, HelperWorld

BASE = f"images/{IMAGE}/rootfs.ext4"
LIMIT = 1 << 20


def open_base(world: HelperWorld, *, writable: bool = False) -> int:
    return filesystem.open_owned(world.policy, BASE, writable=writable, max_bytes=LIMIT)


def test_plain_file_of_the_owner_is_opened(helper_world_here: HelperWorld) -> None:
    helper_world_here.owned(BASE, b"content")
    fd = open_base(helper_world_here)
    assert os.pread(fd, 100, 0) == b"content"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(fd, b"x")
    os.close(fd)


def test_missing_file_is_not_found(helper_world_here: HelperWorld) -> None:
    with pytest.raises(errors.NotFoundError):
        open_base(helper_world_here)


@pytest.mark.parametrize(
    "attack",
    [
        "symlink",
        "symlinked directory",
        "hard link",
        "fifo",
        "device",
        "directory",
        "empty",
        "huge",
        "foreign",
    ],
)
def test_anything_else_is_refused(helper_world_here: HelperWorld, attack: str) -> None:
    world = helper_world_here
    secret = world.root / "secret"
    secret.write_bytes(b"secret")
    file = world.owned(BASE)
    if attack == "symlinked directory":
        moved = world.state / "elsewhere"
        file.parent.rename(moved)
        file.parent.symlink_to(moved)
    elif attack == "hard link":
        os.link(file, world.state / "second name")
    elif attack == "huge":
        os.truncate(file, LIMIT + 1)
    elif attack == "empty":
        os.truncate(file, 0)
    elif attack == "foreign":
        os.chown(file, 0, 0)
    else:
        file.unlink()
        if attack == "symlink":
            file.symlink_to(secret)
        elif attack == "fifo":
            os.mkfifo(file)
        elif attack == "device":
            os.mknod(file, stat.S_IFBLK | 0o600, os.makedev(7, 0))
        else:
            file.mkdir()
        os.chown(file, OWNER, OWNER, follow_symlinks=False)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(errors.UnauthorizedError):
        open_base(world, writable=True)
    assert secret.read_bytes() == b"secret"
    assert len(os.listdir("/proc/self/fd")) == before, "a descriptor leaked"


def test_another_mount_is_refused(helper_world_here: HelperWorld) -> None:
    world = helper_world_here
    file = world.owned(BASE)
    subprocess.run(["mount", "-t", "tmpfs", "none", file.parent], check=True, timeout=10)
    try:
        world.owned(BASE)
        with pytest.raises(errors.UnauthorizedError, match="another mount"):
            open_base(world)
    finally:
        subprocess.run(["umount", file.parent], check=True, timeout=10)


def test_a_lease_does_not_stall_us(helper_world_here: HelperWorld) -> None:
    """The owner may hold a write lease; breaking it would block an opener for 45 seconds."""
    file = helper_world_here.owned(BASE)
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # how the kernel asks for the lease back
    with file.open("r+b") as held:
        fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        began = time.monotonic()
        with pytest.raises(BlockingIOError):
            open_base(helper_world_here)
        assert time.monotonic() - began < 5
        fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def test_renames_in_the_middle_are_harmless(helper_world_here: HelperWorld) -> None:
    """While the owner swaps file and link as fast as it can, root opens the owner's file or nothing."""
    world = helper_world_here
    secret = world.root / "secret"
    secret.write_bytes(b"secret!")
    file = world.owned(BASE, b"content")
    good, bad = world.state / "good", world.state / "bad"
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            shutil.copy(file, good)
            os.chown(good, OWNER, OWNER)
            bad.symlink_to(secret)
            os.rename(bad, file)
            os.rename(good, file)

    attacker = threading.Thread(target=swap)
    attacker.start()
    opened = refused = 0
    deadline = time.monotonic() + 20
    try:
        while (opened < 200 or refused < 20) and time.monotonic() < deadline:
            try:
                fd = open_base(world)
            except (errors.UnauthorizedError, errors.NotFoundError):
                refused += 1
                continue
            opened += 1
            assert os.pread(fd, 100, 0) != b"secret!"
            os.close(fd)
    finally:
        stop.set()
        attacker.join()
    assert opened >= 200
    assert refused >= 20, "the attack never met the check, so it proves nothing"


def test_jail_has_the_shape_the_jailer_wants(helper_world_here: HelperWorld) -> None:
    world = helper_world_here
    uid = filesystem.make_jail(world.policy, VM, 7)
    assert uid == world.policy.uid_base + 7
    place = Path(filesystem.jail(world.policy, VM))
    assert place == world.root / "jails" / "firecracker" / VM
    status = place.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, OWNER, 0o710)
    for directory in (place / "root", place / "root" / "run"):
        assert (directory.stat().st_uid, stat.S_IMODE(directory.stat().st_mode)) == (uid, 0o700)


def test_a_slot_in_use_is_refused(helper_world_here: HelperWorld) -> None:
    world = helper_world_here
    filesystem.make_jail(world.policy, VM, 7)
    with pytest.raises(errors.ConflictError, match=VM):
        filesystem.make_jail(world.policy, OTHER_VM, 7)
    with pytest.raises(errors.ConflictError):
        filesystem.claim(world.policy, VM, 8)
    filesystem.make_jail(world.policy, VM, 7)
    filesystem.make_jail(world.policy, OTHER_VM, 8)
    with pytest.raises(errors.BadRequestError):
        world.policy.uid(world.policy.uid_count + 1)


def test_of_many_that_want_one_slot_at_once_one_gets_it(helper_world_here: HelperWorld) -> None:
    world = helper_world_here
    ids = [f"{number:012x}" for number in range(16)]
    ready = threading.Barrier(len(ids))

    def want(vm_id: str) -> bool:
        ready.wait()
        try:
            filesystem.make_jail(world.policy, vm_id, 7)
        except errors.ConflictError:
            return False
        return True

    filesystem.make_jail(world.policy, OTHER_VM, 8)  # what is above the jails is there
    with concurrent.futures.ThreadPoolExecutor(len(ids)) as pool:
        for _ in range(10):
            got = [vm_id for vm_id, gets in zip(ids, pool.map(want, ids), strict=True) if gets]
            assert len(got) == 1
            filesystem.remove_tree(filesystem.jail(world.policy, got[0]))


def test_jails_that_would_hold_no_device_are_refused(helper_world_here: HelperWorld) -> None:
    jails = Path(helper_world_here.policy.jails)
    jails.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nodev", "none", jails], check=True)
    try:
        with pytest.raises(errors.MissingToolError, match="nodev") as caught:
            filesystem.make_jail(helper_world_here.policy, VM, 1)
        assert "without nodev" in caught.value.hint
    finally:
        subprocess.run(["umount", "-l", jails], check=True)


@pytest.mark.parametrize(
    "kind",
    [kind for kind in privileged.REQUEST_TYPES if "slot" in kind.__struct_fields__],
    ids=lambda kind: kind.__name__,
)
def test_no_request_is_served_in_the_slot_of_another_vm(
    helper_world_here: HelperWorld, own_network: None, kind: type[privileged.Request[Any]]
) -> None:
    """The slot is whose uid and address it is about."""
    policy = helper_world_here.policy
    filesystem.make_jail(policy, OTHER_VM, 7)
    more: dict[str, Any] = {"image_id": IMAGE, "kernel_id": KERNEL, "addresses": ("192.0.2.1",), "ttl_s": 60}
    more |= {"initrd": False, "vcpus": 1, "memory_mib": 128, "boot_args": "quiet"}
    given = {name: more[name] for name in kind.__struct_fields__ if name in more}
    if kind is privileged.LaunchVmm:
        with pytest.raises(errors.NotFoundError, match="has no jail"):  # nor could it have got one
            operations.run(policy, kind(vm_id=VM, slot=7, **given))
        return
    with pytest.raises(errors.ConflictError, match=f"slot 7: VM {OTHER_VM}"):
        operations.run(policy, kind(vm_id=VM, slot=7, **given))


def test_a_vm_that_has_a_jail_is_compared_with_no_other(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a tap takes no longer beside many VMs. The slot was nobody else's when the jail was made."""
    world = helper_world_here
    filesystem.make_jail(world.policy, OTHER_VM, 8)
    uid = filesystem.make_jail(world.policy, VM, 7)
    looked: list[str] = []
    look = os.lstat

    def lstat(path: str) -> os.stat_result:
        looked.append(path)
        return look(path)

    monkeypatch.setattr(os, "lstat", lstat)
    assert filesystem.claim(world.policy, VM, 7) == uid
    assert looked == [f"{filesystem.jail(world.policy, VM)}/uid"]
    with pytest.raises(errors.ConflictError, match=VM):
        filesystem.claim(world.policy, VM, 8)


def test_frozen_jail_is_no_longer_the_vmms(helper_world_here: HelperWorld) -> None:
    world = helper_world_here
    uid = filesystem.make_jail(world.policy, VM, 1)
    root = filesystem.open_jail(world.policy, VM)
    place = Path(filesystem.jail(world.policy, VM)) / "root"
    for directory in (place / "dev", place / "dev" / "net"):
        directory.mkdir()
        os.chown(directory, uid, uid)
    filesystem.freeze_jail(root)
    os.close(root)
    for directory in (place, place / "run", place / "dev", place / "dev" / "net"):
        status = directory.stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, 0, 0o711)
    tried = subprocess.run(
        ["mv", place / "run", place / "gone"],
        user=uid,
        group=uid,
        extra_groups=[],
        capture_output=True,
        timeout=10,
    )
    assert tried.returncode != 0


def test_freezing_does_not_follow_a_link(helper_world_here: HelperWorld) -> None:
    world = helper_world_here
    uid = filesystem.make_jail(world.policy, VM, 1)
    place = Path(filesystem.jail(world.policy, VM)) / "root"
    (place / "run").rmdir()
    victim = world.root / "victim"
    victim.mkdir(mode=0o755)
    os.chown(victim, uid, uid)
    (place / "run").symlink_to(victim)
    root = filesystem.open_jail(world.policy, VM)
    with pytest.raises(OSError, match="Not a directory"):
        filesystem.freeze_jail(root)
    os.close(root)
    assert victim.stat().st_uid == uid


@pytest.mark.parametrize("fake", ["symlink", "file", "foreign"])
def test_only_the_vmms_own_socket_is_granted(helper_world_here: HelperWorld, fake: str) -> None:
    world = helper_world_here
    uid = filesystem.make_jail(world.policy, VM, 1)
    run = Path(filesystem.jail(world.policy, VM)) / "root" / "run"
    path = run / "api.sock"
    if fake == "symlink":
        path.symlink_to("/run/other.sock")
    elif fake == "file":
        path.write_bytes(b"")
        os.chown(path, uid, uid)
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    directory = os.open(run, os.O_RDONLY)
    with pytest.raises(errors.UnauthorizedError):
        filesystem.grant_socket(world.policy, directory, "api.sock", uid)
    os.close(directory)


def test_granted_socket_is_the_owners_to_connect(helper_world_here: HelperWorld) -> None:
    world = helper_world_here
    uid = filesystem.make_jail(world.policy, VM, 1)
    run = Path(filesystem.jail(world.policy, VM)) / "root" / "run"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(run / "api.sock"))
        os.chown(run / "api.sock", uid, uid)
        directory = os.open(run, os.O_RDONLY)
        filesystem.grant_socket(world.policy, directory, "api.sock", uid)
        os.close(directory)
    status = (run / "api.sock").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (uid, OWNER, 0o660)


def test_wait_for_sees_what_appears_and_who_dies(helper_world_here: HelperWorld) -> None:
    directory = os.open(helper_world_here.root, os.O_RDONLY)
    child = subprocess.Popen(["sleep", "30"])
    process = os.pidfd_open(child.pid)
    try:
        timer = threading.Timer(0.2, (helper_world_here.root / "late").touch)
        timer.start()
        assert filesystem.wait_for(directory, "late", process=process, deadline=time.monotonic() + 10)
        assert not filesystem.wait_for(directory, "never", process=process, deadline=time.monotonic() + 0.1)
        child.kill()
        began = time.monotonic()
        assert not filesystem.wait_for(directory, "never", process=process, deadline=began + 10)
        assert time.monotonic() - began < 5
    finally:
        child.kill()
        child.wait()
        os.close(process)
        os.close(directory)


def test_a_deep_tree_is_removed(helper_world_here: HelperWorld) -> None:
    """A VMM can nest directories deeper than a path may be long, or than Python recurses."""
    top = helper_world_here.root / "deep"
    top.mkdir()
    here = os.open(top, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    (top / "link").symlink_to(helper_world_here.state)
    filesystem.remove_tree(str(top))
    assert not top.exists()
    assert helper_world_here.state.exists()
    filesystem.remove_tree(str(top))


def test_a_tree_of_many_names_takes_no_memory_by_their_number(helper_world_here: HelperWorld) -> None:
    """A VMM makes as many as the disk holds, and the helper may have 512 MiB."""
    top = helper_world_here.root / "wide"
    for directory in (top, top / "inner"):
        directory.mkdir()
        for number in range(2000):
            os.close(os.open(directory / f"{number:0200}", os.O_CREAT))
    tracemalloc.start()
    try:
        filesystem.remove_tree(str(top))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not top.exists()
    assert peak < 200_000


def test_logs_of_vms_that_are_gone_do_not_grow_in_number_without_end(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is listed with the world, whose list has to stay readable."""
    policy = helper_world_here.policy
    monkeypatch.setattr(filesystem, "MAX_LOGS", 1)
    operations.execute(policy, privileged.PrepareJail(vm_id=VM, slot=1))
    with pytest.raises(errors.ConflictError, match="logs"):
        operations.execute(policy, privileged.PrepareJail(vm_id=OTHER_VM, slot=2))
    assert os.listdir(f"{policy.jails}/firecracker") == [VM]
    operations.execute(policy, privileged.PrepareJail(vm_id=VM, slot=1))


def test_a_directory_that_becomes_a_link_as_it_is_removed_is_not_followed(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, top = helper_world_here, helper_world_here.root / "tree"
    (top / "child").mkdir(parents=True)
    kept = world.owned("kept/file")
    unlink = os.unlink

    def swapped(name: str, *, dir_fd: int) -> None:
        try:
            unlink(name, dir_fd=dir_fd)
        except IsADirectoryError:
            (top / "child").rmdir()
            (top / "child").symlink_to(kept.parent)
            raise

    monkeypatch.setattr(os, "unlink", swapped)
    with pytest.raises(NotADirectoryError):
        filesystem.remove_tree(str(top))
    monkeypatch.undo()
    assert kept.exists()


def link(world: HelperWorld, name: str) -> bytes:
    root = filesystem.open_jail(world.policy, VM)
    try:
        filesystem.link_kernel(world.policy, root, KERNEL, name)
        fd = os.open(name, os.O_RDONLY, dir_fd=root)
        try:
            return os.pread(fd, 1 << 20, 0)
        finally:
            os.close(fd)
            os.unlink(name, dir_fd=root)
    finally:
        os.close(root)


def test_kernel_is_copied_once_for_each_version(helper_world_here: HelperWorld) -> None:
    world = helper_world_here
    filesystem.make_jail(world.policy, VM, 1)
    file = world.owned(f"kernels/{KERNEL}/vmlinux", b"one" * 1000)
    cache = world.root / "kernels"
    assert link(world, "vmlinux") == b"one" * 1000
    assert link(world, "vmlinux") == b"one" * 1000
    assert len(list(cache.iterdir())) == 1
    kept = next(cache.iterdir()).stat()
    assert (kept.st_uid, stat.S_IMODE(kept.st_mode)) == (0, 0o444)
    before = file.stat()
    file.write_bytes(b"two" * 1000)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert link(world, "vmlinux") == b"two" * 1000, "an owner that restores mtime is not believed"
    for number in range(filesystem.KEPT_KERNELS + 4):
        file.write_bytes(b"%d" % number)
        link(world, "vmlinux")
    assert len(list(cache.iterdir())) <= filesystem.KEPT_KERNELS + 1


def test_kernel_is_copied_once_for_many_starts_at_once(helper_world_here: HelperWorld) -> None:
    world = helper_world_here
    filesystem.make_jail(world.policy, VM, 1)
    world.owned(f"kernels/{KERNEL}/vmlinux", b"k" * (8 << 20))
    starts = 3 * filesystem.KEPT_KERNELS
    root = filesystem.open_jail(world.policy, VM)

    def start(number: int) -> None:
        os.mkdir(f"jail-{number}", dir_fd=root)
        jail = os.open(f"jail-{number}", os.O_RDONLY | os.O_DIRECTORY, dir_fd=root)
        try:
            filesystem.link_kernel(world.policy, jail, KERNEL, "vmlinux")
        finally:
            os.close(jail)

    try:
        with concurrent.futures.ThreadPoolExecutor(starts) as pool:
            list(pool.map(start, range(starts)))
    finally:
        os.close(root)
    (kept,) = (world.root / "kernels").iterdir()
    assert kept.stat().st_nlink == 1 + starts


def test_logs_rotate_and_are_the_owners_to_read(helper_world_here: HelperWorld) -> None:
    world = helper_world_here
    filesystem.make_logs(world.policy, VM)
    directory = Path(filesystem.logs(world.policy, VM))
    (directory / "console.log").write_bytes(b"first boot")
    filesystem.make_logs(world.policy, VM)
    assert (directory / "console.log").read_bytes() == b""
    assert (directory / "console.log.1").read_bytes() == b"first boot"
    status = (directory / "console.log").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, OWNER, 0o640)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o750


def test_node_can_be_opened_by_number_only(helper_world_here: HelperWorld) -> None:
    world = helper_world_here
    with filesystem.node(world.policy, os.makedev(1, 3), 0):
        assert os.listdir(world.root) == []
