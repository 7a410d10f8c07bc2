# SPDX-License-Identifier: MIT
"""The VMs' cgroups (v2): made, filled and removed here, and nowhere else. They name a VM's processes.

`banger-vms.service` delegates its cgroup to us. A process of its own keeps systemd from pruning it; that one
must move into a leaf before controllers can be enabled for the leaves (the rule of no inner processes).
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Generator
from typing import Final

from banger.contract import errors, names
from banger.helper import filesystem
from banger.helper import policy as policies
from banger.helper.linux import libc, pidfd

HOLDER: Final = "holder"
CONSOLES: Final = "consoles"
CONTROLLERS: Final = ("cpu", "io", "memory", "pids")
OVERHEAD_MIB: Final = 128
_OVERHEAD_PIDS: Final = 16
_PERIOD_US: Final = 100_000
_GONE: Final = (errno.ENOENT, errno.ENODEV)
"""A cgroup may be removed at any moment; reading a file of it that was open by then is ENODEV."""


def ensure_parent(policy: policies.Policy) -> None:
    """The delegated cgroup has its controllers; without systemd it is simply made."""
    parent = f"{policy.cgroup_mount}/{names.CGROUP_PARENT}"
    if set(CONTROLLERS) <= set(_read(f"{parent}/cgroup.subtree_control").split()):
        return
    path = policy.cgroup_mount
    for part in names.CGROUP_PARENT.split("/"):
        _enable(path)
        path = f"{path}/{part}"
        _make(path)
    for leaf in (HOLDER, CONSOLES):
        _make(f"{parent}/{leaf}")
    for pid in _read(f"{parent}/cgroup.procs").split():
        with contextlib.suppress(ProcessLookupError):
            _write(f"{parent}/{HOLDER}/cgroup.procs", pid)
    _enable(parent)
    _limit_consoles(f"{parent}/{CONSOLES}")


def create(policy: policies.Policy, vm_id: names.VmId, *, vcpus: int, memory_mib: int) -> None:
    """A cgroup with limits: what the VM was promised, and room for the VMM itself.

    The owner may read it, for its counters.
    """
    ensure_parent(policy)
    path = _path(policy, vm_id)
    filesystem.make_directory(path, 0o750, gid=policy.owner_gid)
    _limit(path, vcpus=vcpus, memory_mib=memory_mib)


def _limit_consoles(path: str) -> None:
    """What VMMs print is bounded on disk; so is the time that writing it takes, of all VMs together."""
    if os.path.exists(f"{path}/cpu.max"):
        _write(f"{path}/cpu.max", f"{_PERIOD_US // 2} {_PERIOD_US}")


def _limit(path: str, *, vcpus: int, memory_mib: int) -> None:
    _write(f"{path}/cpu.max", f"{(vcpus + 1) * _PERIOD_US} {_PERIOD_US}")
    _write(f"{path}/memory.max", str((memory_mib + OVERHEAD_MIB) << 20))
    _write(f"{path}/pids.max", str(vcpus + _OVERHEAD_PIDS))


def end(policy: policies.Policy, vm_id: names.VmId, *, deadline: float) -> bool:
    """Kills whatever runs in the VM's cgroup, and says whether it has ended.

    `cgroup.kill` signals each process by its first thread, and one whose first thread has ended goes on. A
    pidfd means all of it.
    """
    path = _path(policy, vm_id)
    try:
        _write(f"{path}/cgroup.kill", "1")
    except OSError as error:
        if error.errno not in _GONE:
            raise
    for pid in processes(policy, vm_id):
        with held(policy, vm_id, pid) as process:
            if process >= 0:
                pidfd.send(process, signal.SIGKILL)
    return _await_empty(path, deadline)


@contextlib.contextmanager
def held(policy: policies.Policy, vm_id: str, pid: int) -> Generator[int]:
    """A pidfd of a process in the VM's cgroup; -1 if it is not there once held, for a pid may be reused."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        yield -1
        return
    with libc.closing(process):
        yield process if pid in processes(policy, vm_id) else -1


def delete(policy: policies.Policy, vm_id: names.VmId, *, deadline: float) -> None:
    """Ends whatever runs in the VM's cgroup, and removes it. Gone is gone."""
    if not end(policy, vm_id, deadline=deadline):
        raise errors.ConflictError(f"the processes of VM {vm_id} do not end", vm=vm_id)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(_path(policy, vm_id))


def open_procs(policy: policies.Policy, vm_id: names.VmId) -> int:
    """A descriptor through which a process enters the VM's cgroup."""
    return os.open(f"{_path(policy, vm_id)}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)


def open_memory_events(policy: policies.Policy, vm_id: names.VmId) -> int:
    """Counts what was ended in the VM's cgroup for want of memory; empty where the kernel does not."""
    try:
        return os.open(f"{_path(policy, vm_id)}/memory.events", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def open_console_procs(policy: policies.Policy) -> int:
    """The log writer outlives us as the VMM does, but is not the VMM: it has a cgroup elsewhere."""
    path = f"{policy.cgroup_mount}/{names.CGROUP_PARENT}/{CONSOLES}/cgroup.procs"
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC)


def processes(policy: policies.Policy, vm_id: str) -> list[int]:
    """The pids in the VM's cgroup; KVM's kernel threads are there too and do not count."""
    return list(filter(pidfd.is_alive, map(int, _read(f"{_path(policy, vm_id)}/cgroup.procs").split())))


def vm_ids(policy: policies.Policy) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        parent = f"{policy.cgroup_mount}/{names.CGROUP_PARENT}"
        leaves = [entry.name for entry in os.scandir(parent) if entry.is_dir()]
        return [leaf for leaf in leaves if leaf not in {HOLDER, CONSOLES}]
    return []


def _await_empty(path: str, deadline: float) -> bool:
    """Waits for `populated 0` in cgroup.events; the kernel tells of each change by inotify."""
    try:
        watch = libc.inotify(f"{path}/cgroup.events", libc.IN_MODIFY)
    except FileNotFoundError:
        return True
    with libc.closing(watch):
        while "populated 1" in _read(f"{path}/cgroup.events"):
            if not pidfd.wait(watch, deadline=deadline):
                return False
            os.read(watch, 4096)
        return True


def _path(policy: policies.Policy, vm_id: str) -> str:
    return f"{policy.cgroup_mount}/{names.cgroup_path(names.VmId(vm_id))}"


def _enable(path: str) -> None:
    """What the host offers. Where a controller is missing, a VM's limit cannot be set and it does not start.

    Above the slice all is read-only to the service: there systemd has enabled what it delegates.
    """
    if not os.access(f"{path}/cgroup.subtree_control", os.W_OK):
        return
    offered = _read(f"{path}/cgroup.controllers").split()
    enabled = _read(f"{path}/cgroup.subtree_control").split()
    for controller in CONTROLLERS:
        if controller in offered and controller not in enabled:
            _write(f"{path}/cgroup.subtree_control", f"+{controller}")


def _make(path: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o755)


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return ""


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
