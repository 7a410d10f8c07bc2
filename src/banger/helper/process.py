# SPDX-License-Identifier: MIT
"""Privileged operations on VMMs: jail, launch, find, signal, measure. A VMM is what runs in its VM's cgroup.

Firecracker is started by its jailer as init of a pid namespace, and the jailer by the log writer. The
jailer's first process ends at once: the VMM is then a child of the log writer, which sees how it ends, and
neither service's end touches them. Only root can put a process into the cgroup, so no pidfile is needed, and
none is believed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import subprocess
import time
from collections.abc import Callable, Generator
from typing import Final, NoReturn

import msgspec

from banger.contract import errors, names, privileged
from banger.helper import cgroup, filesystem, network, storage
from banger.helper import policy as policies
from banger.helper.linux import libc, pidfd

LAUNCH_DEADLINE_S: Final = 20.0
END_DEADLINE_S: Final = 10.0
LOG_LIMIT_BYTES: Final = 512 << 10
GUEST_CID: Final = 3
API_SOCKET, VSOCK_SOCKET = "api.sock", "vsock.sock"
_LOOKS: Final = 100
# Neither VMX nor SVM: Firecracker is not tested with guests that are hosts, and what KVM does for those has
# been the way out of a guest before. Bits: Intel SDM, CPUID.1:ECX.5; AMD APM, CPUID Fn8000_0001:ECX.2.
_NO_VIRTUALISATION: Final = {
    "cpuid_modifiers": [
        {"leaf": leaf, "subleaf": "0x0", "flags": 0, "modifiers": [{"register": "ecx", "bitmap": bits}]}
        for leaf, bits in (("0x1", "0b0xxxxx"), ("0x80000001", "0b0xx"))
    ]
}
_DONE: Final = privileged.Done()
_IS_X86: Final = platform.machine() == "x86_64"


def prepare_jail(policy: policies.Policy, request: privileged.PrepareJail) -> privileged.Done:
    if find(policy, request.vm_id).pid:
        raise errors.ConflictError(f"VM {request.vm_id} is running", vm=request.vm_id)
    filesystem.claim(policy, request.vm_id, request.slot)  # a refusal leaves an older jail as it is
    try:
        filesystem.make_jail(policy, request.vm_id, request.slot)
        filesystem.make_logs(policy, request.vm_id)
    except BaseException:
        filesystem.remove_tree(filesystem.jail(policy, request.vm_id))
        raise
    return _DONE


def delete_jail(policy: policies.Policy, request: privileged.DeleteJail) -> privileged.Done:
    if find(policy, request.vm_id).pid:
        raise errors.ConflictError(f"VM {request.vm_id} is running", hint="kill it first", vm=request.vm_id)
    _await_console(request.vm_id, deadline_s=1.0)  # it reads the cgroup's last words
    _end(policy, names.VmId(request.vm_id))
    filesystem.remove_tree(filesystem.jail(policy, request.vm_id))
    return _DONE


def purge_logs(policy: policies.Policy, request: privileged.PurgeLogs) -> privileged.Done:
    filesystem.remove_tree(filesystem.logs(policy, request.vm_id))
    return _DONE


# --- launch ---


def launch(policy: policies.Policy, request: privileged.LaunchVmm) -> privileged.Vmm:
    vm_id = names.VmId(request.vm_id)
    os.close(filesystem.open_jail(policy, vm_id))
    if find(policy, vm_id).pid:
        raise errors.ConflictError(f"VM {vm_id} is running already", vm=vm_id)
    check_runtime(policy, privileged.CheckRuntime())
    # Anew: the jailer refuses what an earlier try left.
    uid = filesystem.make_jail(policy, vm_id, request.slot)
    deadline = time.monotonic() + LAUNCH_DEADLINE_S
    with libc.closing(filesystem.open_jail(policy, vm_id)) as root, contextlib.ExitStack() as on_failure:
        _furnish(policy, request, root, uid)
        on_failure.callback(_end, policy, vm_id)
        cgroup.create(policy, vm_id, vcpus=request.vcpus, memory_mib=request.memory_mib)
        with _started(policy, vm_id, uid, root) as jailer:
            _await_jailer(policy, vm_id, jailer, deadline)
        vmm = _await_vmm(policy, vm_id, root, deadline)
        if _consoles[vm_id].poll() is not None:
            raise errors.OperationFailedError(f"the log writer of VM {vm_id} ended at once", vm=vm_id)
        on_failure.pop_all()
        return vmm


def _furnish(policy: policies.Policy, request: privileged.LaunchVmm, root: int, uid: int) -> None:
    """What the VMM finds in its jail."""
    vm_id = names.VmId(request.vm_id)
    filesystem.make_node(root, "rootfs", storage.snapshot_device(vm_id), uid)
    if request.work_disk:
        filesystem.make_node(root, "work", storage.work_device(vm_id), uid)
    if request.tap:
        tap = network.find_tap(policy, vm_id)
        if tap is None or tap.tun_owner != uid:
            raise errors.NotFoundError(f"VM {vm_id} has no tap", vm=vm_id)
    filesystem.link_kernel(policy, root, request.kernel_id, "vmlinux")
    if request.initrd:
        filesystem.link_kernel(policy, root, request.kernel_id, "initrd")
    for name in ("vmm.log", "metrics.log"):
        os.mkfifo(name, 0o600, dir_fd=root)
        os.chown(name, uid, uid, dir_fd=root, follow_symlinks=False)
    if _IS_X86:
        filesystem.write_file(root, "cpu.json", msgspec.json.encode(_NO_VIRTUALISATION))
    filesystem.write_file(root, "vm.json", msgspec.json.encode(_configuration(request)))


def _configuration(request: privileged.LaunchVmm) -> dict[str, object]:
    """Firecracker's own configuration format; all paths are inside the jail."""
    vm_id = names.VmId(request.vm_id)
    source = {"kernel_image_path": "/vmlinux", "boot_args": request.boot_args}
    if request.initrd:
        source["initrd_path"] = "/initrd"
    drives = ["rootfs", "work"] if request.work_disk else ["rootfs"]
    interface = {
        "iface_id": "eth0",
        "guest_mac": names.mac_address(vm_id),
        "host_dev_name": names.tap_name(vm_id),
    }
    return {
        **({"cpu-config": "/cpu.json"} if _IS_X86 else {}),
        "boot-source": source,
        "drives": [
            {
                "drive_id": drive,
                "path_on_host": f"/{drive}",
                "is_root_device": False,  # true would add root= to the arguments: those are the daemon's
                "is_read_only": False,
                "cache_type": "Writeback",  # else a guest's fsync ends in this host's memory
            }
            for drive in drives
        ],
        "machine-config": {"vcpu_count": request.vcpus, "mem_size_mib": request.memory_mib},
        "network-interfaces": [interface] if request.tap else [],
        "vsock": {"guest_cid": GUEST_CID, "uds_path": "/run/vsock.sock"},
        "metrics": {"metrics_path": "/metrics.log"},
    }


@contextlib.contextmanager
def _started(policy: policies.Policy, vm_id: names.VmId, uid: int, root: int) -> Generator[int]:
    """Starts the log writer as the VM's uid with its descriptors alone, and through it the jailer.

    The jailer is in the VM's cgroup already: its own way there costs it half of its time. Yields the
    descriptor where a byte comes when the jailer has ended well.
    """
    os.close(policies.open_root_owned(policy.console))
    _await_console(vm_id, deadline_s=0)
    jailer, telling = os.pipe2(os.O_CLOEXEC)
    # The others are open for as long as starting takes: the writer ends when nobody holds the VMM's output.
    with libc.closing(jailer), contextlib.ExitStack() as opened:

        def held(fd: int) -> int:
            return opened.enter_context(libc.closing(fd))

        told, group = held(telling), held(cgroup.open_console_procs(policy))
        output, streams = _streams(policy, vm_id, root, held)
        ending = filesystem.open_log(policy, f"{filesystem.logs(policy, vm_id)}/{filesystem.ENDING}.log")
        fds = (group, told, held(cgroup.open_memory_events(policy, vm_id)), held(ending))
        its_group = held(cgroup.open_procs(policy, vm_id))
        argv = [policy.console, str(uid), *map(str, fds), str(LOG_LIMIT_BYTES)]
        argv += [":".join(map(str, stream)) for stream in streams]
        argv += ["--", str(its_group), *_jailer(policy, vm_id, uid)]
        # A user for Popen would have it fork this whole process; without one it borrows its memory (vfork).
        _consoles[vm_id] = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[*fds, its_group, *itertools.chain(*streams)],
            env={},
            cwd="/",
            start_new_session=True,
        )
        opened.close()
        yield jailer


def _streams(
    policy: policies.Policy, vm_id: names.VmId, root: int, held: Callable[[int], int]
) -> tuple[int, list[tuple[int, int, int]]]:
    """What the VMM writes to; and of each log its source, its file and the file's predecessor."""
    source, output = map(held, os.pipe2(os.O_CLOEXEC))
    streams: list[tuple[int, int, int]] = []
    for name in filesystem.LOGS:
        if name != "console":
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
            source = held(os.open(f"{name}.log", flags, dir_fd=root))
        path = f"{filesystem.logs(policy, vm_id)}/{name}.log"
        current, old = (held(filesystem.open_log(policy, each)) for each in (path, f"{path}.1"))
        streams.append((source, current, old))
    return output, streams


def _jailer(policy: policies.Policy, vm_id: names.VmId, uid: int) -> list[str]:
    argv = [policy.jailer, "--id", vm_id, "--exec-file", policy.firecracker, "--new-pid-ns"]
    argv += ["--uid", str(uid), "--gid", str(uid), "--chroot-base-dir", policy.jails]
    # No file in the jail grows but the jailer's pidfile: logs are pipes, disks are block devices.
    argv += ["--resource-limit", "fsize=4096"]
    # Its log's place in the configuration file would be known only after its first lines, which are then
    # written to its output: the guest's console.
    argv += ["--", "--config-file", "/vm.json", "--log-path", "/vmm.log", "--level", "Info"]
    return [*argv, "--api-sock", "/run/api.sock"]


def _await_jailer(policy: policies.Policy, vm_id: names.VmId, started: int, deadline: float) -> None:
    """Returns when the jailer's first process has ended, once the VMM's exists."""
    if not pidfd.wait(started, deadline=deadline) or not os.read(started, 1):
        _fail_launch(policy, vm_id, "the jailer failed")


def _await_vmm(policy: policies.Policy, vm_id: names.VmId, root: int, deadline: float) -> privileged.Vmm:
    """The VMM has made its sockets: its configuration was good, and it goes on to load the kernel."""
    with _held(policy, vm_id) as (vmm, process), filesystem.opened_run(root) as run:
        sockets = (API_SOCKET, VSOCK_SOCKET) if process >= 0 else ()
        made = [filesystem.wait_for(run, each, process=process, deadline=deadline) for each in sockets]
    if not made or not all(made):
        runs = find(policy, vm_id).pid
        _fail_launch(policy, vm_id, "Firecracker is stuck" if runs else "Firecracker ended")
    return vmm


def _fail_launch(policy: policies.Policy, vm_id: names.VmId, what: str) -> NoReturn:
    """With the end of the VMM's log, once it is written: the log writer ends after the VMM."""
    _end(policy, vm_id)
    _await_console(vm_id, deadline_s=1.0)
    said = filesystem.log_tail(policy, vm_id, "vmm")
    if not said:
        ending = filesystem.log_tail(policy, vm_id, filesystem.ENDING)
        said = f"{filesystem.log_tail(policy, vm_id, 'console')} {ending}".strip()
    raise errors.OperationFailedError(f"{what}, for VM {vm_id}: {said}", vm=vm_id, log=said)


def _end(policy: policies.Policy, vm_id: names.VmId) -> None:
    """Of a launch the rest, the jail's contents, is made anew by the next one, or deleted with the jail."""
    cgroup.delete(policy, vm_id, deadline=time.monotonic() + END_DEADLINE_S)


_consoles: dict[str, subprocess.Popen[bytes]] = {}


def _await_console(vm_id: str, *, deadline_s: float) -> None:
    """The VMM has ended, so its log writer ends now. One of an earlier life of this service is init's."""
    console = _consoles.pop(vm_id, None)
    if console is not None:
        try:
            console.wait(deadline_s)
        except subprocess.TimeoutExpired:
            console.kill()
            console.wait()


# --- what runs ---


def find_vmm(policy: policies.Policy, request: privileged.FindVmm) -> privileged.Vmm:
    return find(policy, request.vm_id)


def find(policy: policies.Policy, vm_id: str) -> privileged.Vmm:
    return privileged.Vmm(pid=min(cgroup.processes(policy, vm_id), default=0))


@contextlib.contextmanager
def _held(policy: policies.Policy, vm_id: str) -> Generator[tuple[privileged.Vmm, int]]:
    """The VMM and a pidfd of it, -1 if none runs."""
    for _ in range(_LOOKS):
        vmm = find(policy, vm_id)
        if not vmm.pid:
            yield vmm, -1
            return
        with cgroup.held(policy, vm_id, vmm.pid) as process:
            if process >= 0:
                yield vmm, process
                return
    raise errors.ConflictError(f"the processes of VM {vm_id} change all the time", vm=vm_id)


def grant_api_socket(policy: policies.Policy, request: privileged.GrantApiSocket) -> privileged.Done:
    _grant(policy, request.vm_id, request.slot, API_SOCKET)
    return _DONE


def grant_vsock(policy: policies.Policy, request: privileged.GrantVsock) -> privileged.Done:
    _grant(policy, request.vm_id, request.slot, VSOCK_SOCKET)
    return _DONE


def _grant(policy: policies.Policy, vm_id: str, slot: int, name: str) -> None:
    """The launch saw the VMM make both sockets; once the jail is frozen it can make none."""
    uid = filesystem.claim(policy, vm_id, slot)
    if not find(policy, vm_id).pid:
        raise errors.NotRunningError(f"VM {vm_id} is not running", vm=vm_id)
    with libc.closing(filesystem.open_jail(policy, vm_id)) as root:
        filesystem.freeze_jail(root)
        with filesystem.opened_run(root) as run:
            filesystem.grant_socket(policy, run, name, uid)


def kill_vmm(policy: policies.Policy, request: privileged.KillVmm) -> privileged.Done:
    """All of the VM's cgroup ends, whatever a VMM that was taken over made of itself.

    No gentler way first: SIGHUP, which Firecracker handles, was seen to leave one running for 10 seconds,
    and all it would keep is its metrics. What else is to be kept, the guest has flushed.
    """
    vm_id = names.VmId(request.vm_id)
    if not cgroup.end(policy, vm_id, deadline=time.monotonic() + END_DEADLINE_S):
        raise errors.DeadlineError(f"the processes of VM {vm_id} do not end", vm=vm_id)
    return _DONE


# --- the runtime ---


def check_runtime(policy: policies.Policy, _request: privileged.CheckRuntime) -> privileged.Done:
    policies.require_pinned(policy.firecracker, policy.firecracker_sha256)
    policies.require_pinned(policy.jailer, policy.jailer_sha256)
    return _DONE
