# SPDX-License-Identifier: MIT
"""A VMM's life, request by request: real cgroups, processes, jails and sockets; jailer and VMM are a script.

The script does what the helper relies on: the jailer's first process ends at once, the VMM runs as the VM's
uid in the VM's cgroup, makes its sockets, and ends on SIGHUP. The real ones run in the lab.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.contract import errors, names, privileged
from banger.helper import cgroup, filesystem, operations, process
from banger.helper.linux import libc
from tests.root import device_mapper, helper_world, test_console
from tests.root.helper_world import KERNEL, OWNER, VM, HelperWorld

JAILER = (
    f"#!{sys.executable} -IS"
    + """
import ctypes, os, signal, socket, sys, threading, time
def given(name): return sys.argv[sys.argv.index(name) + 1]
jail = f"{given('--chroot-base-dir')}/firecracker/{given('--id')}/root"
behaviour = open(f"{jail}/../../../../behaviour").read()
if behaviour == "no jailer":
    sys.exit("no such jail")
parent, child = os.pipe()
if os.fork():
    os.close(child)
    os.read(parent, 1)
    os._exit(0)
os.chdir(f"{jail}/run")
os.setresgid(*[int(given("--gid"))] * 3)
os.setresuid(*[int(given("--uid"))] * 3)
if behaviour == "deaf":
    for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
if behaviour == "ends":
    print("bad configuration", flush=True)
    os._exit(1)
for name in () if behaviour == "stuck" else ("api.sock", "vsock.sock"):
    made = socket.socket(socket.AF_UNIX)
    made.bind(name)
    made.listen()
    made.detach()
if behaviour == "without its first thread":
    threading.Thread(target=time.sleep, args=(600,)).start()
    os.close(child)
    ctypes.CDLL(None).syscall(60, 0)
os.close(child)
if behaviour == "rotates":
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.pause()
    end = time.monotonic() + 30
    for _ in range(8):
        if not os.fork():
            while time.monotonic() < end:
                if os.fork():
                    os._exit(0)
            os._exit(0)
    os._exit(0)
time.sleep(600)
"""
)


DESERTER = """
import os, subprocess, sys, time
at, first = sys.argv.index("--"), os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == first:
    time.sleep(0.01)
os.write(int(sys.argv[at + 1]), b"0")
subprocess.run(sys.argv[at + 2:], close_fds=False, check=True)
os.write(int(sys.argv[3]), b"x")
"""


@pytest.fixture
def world(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[HelperWorld]:
    """A host with a snapshot and a kernel for the VM, where everything but its limits is real."""
    tree = test_console.cgroup_tree() / f"banger-launch-{os.getpid()}"
    parent = tree / names.CGROUP_PARENT
    (parent / cgroup.CONSOLES).mkdir(parents=True)
    # Version 2 may have no controllers here, and a file that is not there cannot be made.
    monkeypatch.setattr(cgroup, "_limit", lambda *_args, **_limits: None)
    runtime = helper_world_here.root / "runtime"
    runtime.mkdir()
    shas = {}
    for name, text in (("jailer", JAILER), ("firecracker", "the VMM")):
        (runtime / name).write_text(text)
        (runtime / name).chmod(0o755)
        shas[f"{name}_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    policy = msgspec.structs.replace(helper_world_here.policy, cgroup_mount=str(tree), **shas)
    shutil.copy(test_console.PROGRAM, policy.guest_dir)
    helper_world_here.owned(f"kernels/{KERNEL}/vmlinux", b"kernel")
    helper_world_here.owned(f"kernels/{KERNEL}/initrd", b"initrd")
    mapper = device_mapper.install(monkeypatch, tmp_path)
    mapper.devices[names.dm_name(names.VmId(VM))] = device_mapper.Device(f"BANGER-{VM}", "7:0 7:0 P 8")
    made = HelperWorld(helper_world_here.state, helper_world_here.root, policy)
    behave(made, "well")
    yield made
    operations.execute(policy, privileged.KillVmm(vm_id=VM))
    operations.execute(policy, privileged.DeleteJail(vm_id=VM))
    for path in (parent / cgroup.HOLDER, parent / cgroup.CONSOLES, parent, *parent.parents):
        if tree in (path, *path.parents):
            with contextlib.suppress(FileNotFoundError):
                path.rmdir()


def behave(world: HelperWorld, how: str) -> None:
    (world.root / "behaviour").write_text(how)


def launch(world: HelperWorld, **changes: Any) -> privileged.Vmm:
    given: dict[str, Any] = {"vcpus": 2, "memory_mib": 256, "boot_args": "quiet", "initrd": True}
    given |= {"work_disk": False, "tap": False} | changes
    operations.execute(world.policy, privileged.PrepareJail(vm_id=VM, slot=1))
    return operations.execute(
        world.policy, privileged.LaunchVmm(vm_id=VM, slot=1, kernel_id=KERNEL, **given)
    )


def test_a_life(world: HelperWorld) -> None:
    vmm = launch(world)
    assert operations.execute(world.policy, privileged.FindVmm(vm_id=VM)) == vmm
    assert Path(f"/proc/{vmm.pid}").stat().st_uid == world.policy.uid(1)
    assert _seen(world) == privileged.VmWorld(
        vm_id=VM, snapshot=True, jail=True, cgroup=True, logs=True, vmm_pid=vmm.pid
    )
    root = Path(filesystem.jail(world.policy, VM), "root")
    device = (root / "rootfs").stat()
    assert (stat.S_ISBLK(device.st_mode), device.st_rdev) == (True, os.makedev(7, 0))
    configuration = json.loads((root / "vm.json").read_bytes())
    assert configuration["machine-config"] == {"vcpu_count": 2, "mem_size_mib": 256}
    assert configuration["network-interfaces"] == []
    assert {drive["cache_type"] for drive in configuration["drives"]} == {"Writeback"}
    if "cpu-config" in configuration or os.uname().machine == "x86_64":
        assert configuration["cpu-config"] == "/cpu.json"
        assert (root / "cpu.json").read_bytes() == msgspec.json.encode(process._NO_VIRTUALISATION)
    assert _holders(root) == {world.policy.uid(1)}
    for grant, name in ((privileged.GrantApiSocket, "api.sock"), (privileged.GrantVsock, "vsock.sock")):
        operations.execute(world.policy, grant(vm_id=VM, slot=1))
        granted = (root / "run" / name).stat()
        assert (granted.st_gid, stat.S_IMODE(granted.st_mode)) == (OWNER, 0o660)
        assert _holders(root) == {0}, "the VMM can put nothing into the place of what was granted"
    for refused in (
        privileged.PrepareJail(vm_id=VM, slot=1),
        privileged.DeleteJail(vm_id=VM),
        privileged.LaunchVmm(VM, 1, KERNEL, False, 1, 64, "quiet", False, False),
    ):
        with pytest.raises(errors.ConflictError, match="running"):
            operations.run(world.policy, refused)
    operations.execute(world.policy, privileged.KillVmm(vm_id=VM))
    assert operations.execute(world.policy, privileged.FindVmm(vm_id=VM)).pid == 0
    operations.execute(world.policy, privileged.KillVmm(vm_id=VM))  # gone is gone
    with pytest.raises(errors.NotRunningError):
        operations.execute(world.policy, privileged.GrantVsock(vm_id=VM, slot=1))
    operations.execute(world.policy, privileged.DeleteJail(vm_id=VM))
    assert not root.parent.exists()
    assert _seen(world) == privileged.VmWorld(vm_id=VM, snapshot=True, logs=True)


def _seen(world: HelperWorld) -> privileged.VmWorld:
    with helper_world.network_namespace():
        found = operations.execute(world.policy, privileged.ListWorld())
    [mine] = [each for each in found.vms if each.vm_id == VM]
    return mine


def _holders(root: Path) -> set[int]:
    return {path.stat().st_uid for path in (root, root / "run")}


@pytest.mark.parametrize("killed", [False, True])
def test_a_vmm_whose_first_thread_has_ended_is_seen_and_ends(world: HelperWorld, killed: bool) -> None:
    """It looks like a zombie, and `cgroup.kill` does not end it."""
    behave(world, "without its first thread")
    vmm = launch(world)
    while Path(f"/proc/{vmm.pid}/stat").read_text().rpartition(") ")[2][0] != "Z":
        time.sleep(0.01)
    assert operations.execute(world.policy, privileged.FindVmm(vm_id=VM)) == vmm
    with pytest.raises(errors.ConflictError, match="is running"):
        operations.execute(world.policy, privileged.DeleteJail(vm_id=VM))
    if killed:
        operations.execute(world.policy, privileged.KillVmm(vm_id=VM))
    else:
        cgroup.delete(world.policy, names.VmId(VM), deadline=time.monotonic() + 5)
    assert operations.execute(world.policy, privileged.FindVmm(vm_id=VM)).pid == 0
    while Path(f"/proc/{vmm.pid}").exists():  # until its parent, the log writer, has heard of it
        time.sleep(0.01)


@pytest.mark.parametrize("of", ["blocks", "inodes"])
def test_a_directory_of_root_s_that_is_full_is_named_and_holds_no_half_a_vm(
    world: HelperWorld, of: str
) -> None:
    """One more unit of room each time, until there is enough; each time before, nothing of the VM stays."""
    with _own_file_system(world.root) as fill:
        refused: list[errors.BangerError | None] = []
        while not refused or refused[-1] is not None:
            fill(of, len(refused))
            refused.append(_refused_for_room(world))
        operations.execute(world.policy, privileged.KillVmm(vm_id=VM))
    assert len(refused) > 3
    for error in refused[:-1]:
        assert error is not None
        assert "o space left" in error.message
        if "Firecracker ended" not in error.message:  # what it could not make is in its own words
            assert error.code == "no_space"
            assert str(world.root) in error.message
            assert "df -i" in error.hint


def _refused_for_room(world: HelperWorld) -> errors.BangerError | None:
    """What a launch says; a failed one leaves nothing that runs, and its jail can be deleted."""
    try:
        launch(world)
    except errors.BangerError as error:
        assert cgroup.vm_ids(world.policy) == []
        operations.execute(world.policy, privileged.DeleteJail(vm_id=VM))
        assert not Path(filesystem.jail(world.policy, VM)).exists()
        return error
    return None


@contextlib.contextmanager
def _own_file_system(path: Path) -> Iterator[Callable[[str, int], None]]:
    """What is in `path`, in a file system of its own. Call it with what is to be free, and how much."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(path, copy, dirs_exist_ok=True)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=1000,mode=711", "tmpfs", path], check=True
        )
        shutil.copytree(copy, path, dirs_exist_ok=True)

    def fill(of: str, room: int) -> None:
        found = os.statvfs(path)
        if of == "blocks":
            option = f"size={(found.f_blocks - found.f_bfree + room) * found.f_frsize}"
        else:
            option = f"nr_inodes={found.f_files - found.f_ffree + room}"
        subprocess.run(["mount", "-o", f"remount,{option}", path], check=True)

    try:
        yield fill
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_a_process_outside_the_vm_is_never_held(world: HelperWorld) -> None:
    """A pid that was looked up may be another's by now: what counts is who has it once it is held."""
    vmm = launch(world)
    with cgroup.held(world.policy, VM, os.getpid()) as held:
        assert held == -1
    with cgroup.held(world.policy, VM, vmm.pid) as held:
        assert held >= 0


def test_a_cgroup_that_goes_away_while_it_is_read_is_gone() -> None:
    """Between opening and reading: the descriptor holds that moment."""
    group = test_console.cgroup_tree() / f"banger-gone-{os.getpid()}"
    group.mkdir()
    procs = os.open(group / "cgroup.procs", os.O_RDONLY)
    try:
        group.rmdir()
        with pytest.raises(OSError, match="No such device"):
            os.read(procs, 1)
        assert cgroup._read(f"/proc/self/fd/{procs}") == ""
    finally:
        os.close(procs)


def test_a_vmm_that_is_deaf_to_all_it_can_be_ends(world: HelperWorld) -> None:
    behave(world, "deaf")
    launch(world)
    operations.execute(world.policy, privileged.KillVmm(vm_id=VM))
    assert process.find(world.policy, VM).pid == 0


def test_a_vmm_that_is_another_process_all_the_time_ends(world: HelperWorld) -> None:
    """Signalled one by one, some of them would not be there any more."""
    behave(world, "rotates")
    vmm = launch(world)
    os.kill(vmm.pid, signal.SIGUSR1)
    while process.find(world.policy, VM).pid in {vmm.pid, 0}:  # 0: between reading pids and looking at them
        time.sleep(0.001)
    operations.execute(world.policy, privileged.KillVmm(vm_id=VM))
    assert process.find(world.policy, VM).pid == 0
    assert not cgroup._read(f"{cgroup._path(world.policy, VM)}/cgroup.procs")


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("no jailer", "the jailer failed, for VM [0-9a-f]+: no such jail"),
        ("ends", "Firecracker ended, for VM"),
        ("stuck", "Firecracker is stuck"),
    ],
)
def test_a_launch_that_fails_says_why_and_leaves_nothing_running(
    world: HelperWorld, monkeypatch: pytest.MonkeyPatch, how: str, why: str
) -> None:
    behave(world, how)
    if how == "stuck":
        monkeypatch.setattr(process, "LAUNCH_DEADLINE_S", 1.0)
    with pytest.raises(errors.OperationFailedError, match=why):
        launch(world)
    assert cgroup.vm_ids(world.policy) == []


@pytest.mark.parametrize("name", ["jailer", "firecracker"])
def test_another_program_than_was_installed_is_not_run(world: HelperWorld, name: str) -> None:
    with (world.root / "runtime" / name).open("a") as file:
        file.write("#")
    with pytest.raises(errors.UnauthorizedError, match="recorded at installation"):
        launch(world)
    assert cgroup.vm_ids(world.policy) == []


def test_what_the_vm_has_not_is_refused(world: HelperWorld) -> None:
    with helper_world.network_namespace(), pytest.raises(errors.NotFoundError, match="no tap"):
        launch(world, tap=True)
    with pytest.raises(errors.NotFoundError, match="work disk"):
        launch(world, work_disk=True)


def test_a_tap_of_another_slot_is_not_the_vm_s(world: HelperWorld) -> None:
    """A daemon that was taken over makes it for one uid, before there is a jail, and starts another's VM."""
    with helper_world.network_namespace():
        operations.execute(world.policy, privileged.EnsureBridge())
        operations.execute(world.policy, privileged.CreateTap(vm_id=VM, slot=2))
        with pytest.raises(errors.NotFoundError, match="no tap"):
            launch(world, tap=True)
    assert cgroup.vm_ids(world.policy) == []


def test_a_tear_down_ends_a_vmm_and_takes_its_jail(world: HelperWorld) -> None:
    vmm = launch(world)
    with helper_world.network_namespace():
        operations.execute(world.policy, privileged.TearDown(vm_id=VM))
    assert process.find(world.policy, VM).pid == 0
    assert not Path(f"/proc/{vmm.pid}").exists()
    assert not Path(filesystem.jail(world.policy, VM)).exists()


def test_a_jail_whose_logs_cannot_be_made_is_not_left(world: HelperWorld) -> None:
    (world.root / "logs").write_text("in the way")
    with pytest.raises(errors.OperationFailedError):
        operations.execute(world.policy, privileged.PrepareJail(vm_id=VM, slot=1))
    assert not Path(filesystem.jail(world.policy, VM)).exists()


def test_a_vmm_whose_log_writer_ended_at_once_is_not_left_alone(world: HelperWorld) -> None:
    """Nobody would take what it prints, nor say how it ended. This one starts it, and is gone before it."""
    Path(world.policy.console).write_text(f"#!{sys.executable} -IS{DESERTER}")
    with pytest.raises(errors.OperationFailedError, match=r"the log writer of VM [0-9a-f]+ ended at once"):
        launch(world)
    assert cgroup.vm_ids(world.policy) == []


def test_limits_are_what_the_vm_was_promised(helper_world_here: HelperWorld) -> None:
    """In a plain directory, which takes whatever is written."""
    policy = helper_world_here.policy
    parent = Path(policy.cgroup_mount, names.CGROUP_PARENT)
    parent.mkdir(parents=True)
    for path in (Path(policy.cgroup_mount), *parent.parents[:1], parent):
        (path / "cgroup.controllers").write_text("cpu io memory")
        (path / "cgroup.subtree_control").write_text("cpu")
    (parent / "cgroup.procs").write_text(f"{os.getpid()}\n")
    (parent / cgroup.CONSOLES).mkdir()
    (parent / cgroup.CONSOLES / "cpu.max").write_text("max 100000")
    cgroup.create(policy, names.VmId(VM), vcpus=2, memory_mib=256)
    leaf = parent / VM
    assert (leaf.stat().st_uid, leaf.stat().st_gid) == (0, OWNER)
    assert stat.S_IMODE(leaf.stat().st_mode) == 0o750, "its owner reads what it counts, nobody else"
    assert (leaf / "cpu.max").read_text() == "300000 100000"
    assert (leaf / "memory.max").read_text() == str(384 << 20)
    assert (leaf / "pids.max").read_text() == "18"
    assert (parent / cgroup.CONSOLES / "cpu.max").read_text() == "50000 100000", "what all print, together"
    assert (parent / cgroup.HOLDER / "cgroup.procs").read_text() == str(os.getpid())
    assert (parent / "cgroup.subtree_control").read_text() in {"+io", "+memory"}


def test_what_the_kernel_says_is_said_with_its_object() -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    try:
        with pytest.raises(OSError, match="the thing"):
            libc.ioctl(fd, 0x12345678, bytearray(8), "the thing")
        with pytest.raises(FileNotFoundError, match="/nowhere"):
            libc.inotify("/nowhere", libc.IN_MODIFY)
    finally:
        os.close(fd)
