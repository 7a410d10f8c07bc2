# SPDX-License-Identifier: MIT
"""The helper under systemd, as installed: device-mapper, jailer, Firecracker, restarts, and what is left."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from banger.contract import names, privileged
from banger.system.doctor import services
from lab import limits
from tests.lab import helper_host as helper_hosts
from tests.lab.helper_host import (
    BOOT_ARGS,
    CGROUP,
    INITRD_KERNEL,
    OTHER,
    ROOT,
    STATE,
    VM,
    HelperHost,
    launch_request,
    start_requests,
)

HOLD_TAP = """
import fcntl, os, struct, sys, time
fd = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", sys.argv[1].encode(), 0x5002))
time.sleep(300)
"""

# Kills the helper as soon as its record says that an operation has begun; says whether it had ended by then.
KILL_IN = """
import json, os, subprocess, sys, time
path, op = sys.argv[1:]
show = ("systemctl", "show", "-P", "MainPID", "bangerd-root")
pid = int(subprocess.run(show, capture_output=True, check=True).stdout)
with open(path) as record:
    record.seek(0, 2)
    print("watching", flush=True)
    deadline = time.monotonic() + limits.patient(60)
    seen = []
    while not seen and time.monotonic() < deadline:
        seen = [each for each in map(json.loads, record.readlines()) if each.get("op") == op]
        if not seen:
            time.sleep(0.0005)
    os.kill(pid, 9)
    time.sleep(0.1)
    seen += [each for each in map(json.loads, record.readlines()) if each.get("op") == op]
print("killed", op if [each["outcome"] for each in seen] == ["begun"] else "")
"""


@pytest.fixture(scope="module")
def helper_host(
    new_name: Callable[[str], str], no_lab_left: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HelperHost]:
    """See helper_host.installed; shared, so leave no VM on it."""
    with helper_hosts.installed(new_name("helper"), tmp_path_factory.mktemp("helper")) as host:
        yield host


@pytest.fixture
def empty_host(helper_host: HelperHost) -> Iterator[HelperHost]:
    """No VM is on the host, and none is left on it."""
    yield helper_host
    helper_host.sh("systemctl start bangerd-root.socket")
    helper_host.do(privileged.TearDown(vm_id=VM), privileged.TearDown(vm_id=OTHER))
    assert_nothing_left(helper_host)


_LEFT = f"""
dmsetup ls | grep fc-rootfs
losetup -l -n | grep banger
ls /sys/class/net | grep tap-
ls {ROOT}/jails/firecracker 2>/dev/null
cd {CGROUP} && find . -mindepth 1 -type d ! -path ./consoles ! -path ./holder
pgrep -a -x firecracker
true
"""


def assert_nothing_left(host: HelperHost) -> None:
    assert [vm for vm in host.world().vms if not vm.is_empty] == []
    assert host.sh(_LEFT) == ""
    assert wait_until(lambda: host.sh("pgrep banger-console || true") == "")


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> bool:
    deadline = time.monotonic() + limits.patient(timeout_s)
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.3)
    return True


def test_vm_boots_and_its_agent_listens(empty_host: HelperHost) -> None:
    vmm = empty_host.start()
    empty_host.await_agent()
    (seen,) = empty_host.world().vms
    assert seen == privileged.VmWorld(
        vm_id=VM,
        snapshot=True,
        loops=3,
        tap=True,
        jail=True,
        cgroup=True,
        logs=True,
        vmm_pid=vmm.pid,
    )


def test_kernel_with_initrd_boots_too_and_its_console_is_kept(empty_host: HelperHost) -> None:
    empty_host.make_disks(VM)
    arguments = f"{BOOT_ARGS} ignore_loglevel"
    requests = start_requests(VM, 1)
    requests[9] = launch_request(
        VM, 1, kernel_id=INITRD_KERNEL, initrd=True, memory_mib=256, boot_args=arguments
    )
    empty_host.do(*requests)
    empty_host.await_agent()
    console = empty_host.lab.run(["cat", f"{ROOT}/logs/{VM}/console.log"], user="dev").stdout
    assert b"Linux version 6.1" in console
    assert b"Running Firecracker" not in console, "that is for the VMM's log"


def test_jail_path_by_path(empty_host: HelperHost) -> None:
    empty_host.start()
    uid = names.UID_BASE + 1
    jail = f"{ROOT}/jails/firecracker/{VM}"
    listing = empty_host.sh(f"cd {jail} && find . -printf '%p %y %m %U:%G\\n'")
    dev = empty_host.sh("id -u dev") + ":" + empty_host.sh("id -g dev")
    assert sorted(line.removeprefix("./") for line in listing.splitlines()) == sorted(
        [
            f". d 710 0:{dev.split(':')[1]}",
            "root d 711 0:0",
            "root/dev d 711 0:0",
            f"root/dev/kvm c 600 {uid}:{uid}",
            "root/dev/net d 711 0:0",
            f"root/dev/net/tun c 600 {uid}:{uid}",
            f"root/dev/urandom c 600 {uid}:{uid}",
            f"root/dev/userfaultfd c 600 {uid}:{uid}",
            "root/firecracker f 755 0:0",
            "root/firecracker.pid f 600 0:0",
            f"root/metrics.log p 600 {uid}:{uid}",
            f"root/rootfs b 600 {uid}:{uid}",
            "root/run d 711 0:0",
            f"root/run/api.sock s 660 {uid}:{dev.split(':')[1]}",
            f"root/run/vsock.sock s 660 {uid}:{dev.split(':')[1]}",
            "root/cpu.json f 644 0:0",
            "root/vm.json f 644 0:0",
            "root/vmlinux f 444 0:0",
            f"root/vmm.log p 600 {uid}:{uid}",
            f"root/work b 600 {uid}:{uid}",
            f"uid f 600 {uid}:{uid}",
        ]
    )


def test_vmm_is_confined(empty_host: HelperHost) -> None:
    vmm = empty_host.start()
    uid = names.UID_BASE + 1
    status = dict(
        line.split(":\t", 1)
        for line in empty_host.sh(f"cat /proc/{vmm.pid}/status").splitlines()
        if ":\t" in line
    )
    assert status["Uid"].split() == [str(uid)] * 4
    assert status["Gid"].split() == [str(uid)] * 4
    assert status["Groups"].split() == []
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert empty_host.sh(f"cat /proc/{vmm.pid}/oom_score_adj") == "0", "the helper is spared, a VMM is not"
    assert status["NSpid"].split() == [str(vmm.pid), "1"]
    assert empty_host.sh(f"cat /proc/{vmm.pid}/cgroup") == f"0::/{names.CGROUP_PARENT}/{VM}"
    assert len(empty_host.sh(f"cat /proc/{vmm.pid}/mounts").splitlines()) == 1
    limits = empty_host.sh(f"cd {CGROUP}/{VM}; cat cpu.max memory.max pids.max").splitlines()
    assert limits == ["200000 100000", str((128 + 128) << 20), "17"]


def test_others_cannot_reach_a_vm(empty_host: HelperHost) -> None:
    empty_host.start()
    empty_host.await_agent()
    assert empty_host.lab.run(["id", "-un"], user="stranger").text.strip() == "stranger"
    assert not empty_host.agent_listens(user="stranger", timeout_s=2)
    logs = empty_host.lab.run(["cat", f"{ROOT}/logs/{VM}/vmm.log"], user="stranger", check=False)
    assert logs.status != 0
    moved = empty_host.lab.run(
        ["mv", f"{ROOT}/jails/firecracker/{VM}/root/run", "/tmp/run"], user="dev", check=False
    )
    assert moved.status != 0


def test_another_uid_cannot_even_connect(helper_host: HelperHost) -> None:
    (reply,) = helper_host.ask(privileged.GetHost(), user="stranger")
    assert reply.error is not None
    assert reply.error.code == "unavailable"
    assert helper_host.sh(
        "stat -c '%a %U' /run/banger-root /run/banger-root/bangerd-root.sock"
    ).splitlines() == [
        "711 root",
        "600 dev",
    ]


def test_guest_survives_restart_and_kill_of_the_helper(empty_host: HelperHost) -> None:
    vmm = empty_host.start()
    empty_host.await_agent()
    for end in (
        "systemctl restart bangerd-root",
        "kill -9 $(systemctl show bangerd-root -p MainPID --value)",
        "systemctl stop bangerd-root.service bangerd-root.socket; systemctl start bangerd-root.socket",
        "systemctl daemon-reload",
    ):
        empty_host.sh(end)
        assert wait_until(lambda: empty_host.ask(privileged.GetHost())[0].error is None)
        assert empty_host.do(privileged.FindVmm(vm_id=VM)) == [vmm]
        empty_host.await_agent()
    assert "left-over" not in empty_host.sh("journalctl -u bangerd-root -o cat")


def test_stopping_the_cgroups_unit_ends_every_vm(empty_host: HelperHost) -> None:
    empty_host.start()
    empty_host.start(OTHER, 2)
    empty_host.sh("systemctl stop banger-vms")
    assert empty_host.sh("pgrep -x firecracker || true") == ""
    empty_host.start()
    assert empty_host.sh("systemctl is-active banger-vms") == "active"


def test_a_vmm_out_of_memory_takes_nobody_along(empty_host: HelperHost) -> None:
    victim = empty_host.start()
    other = empty_host.start(OTHER, 2)
    empty_host.await_agent()
    empty_host.await_agent(OTHER)
    empty_host.sh(f"echo 0 > {CGROUP}/{VM}/memory.max")
    assert wait_until(lambda: empty_host.do(privileged.FindVmm(vm_id=VM)) == [privileged.Vmm(pid=0)]), victim
    assert empty_host.do(privileged.FindVmm(vm_id=OTHER)) == [other]
    assert empty_host.sh("systemctl is-active banger-vms") == "active"


def test_kill_is_certain_and_idempotent(empty_host: HelperHost) -> None:
    vmm = empty_host.start()
    kill = privileged.KillVmm(vm_id=VM)
    empty_host.do(kill)
    assert empty_host.sh(f"test -e /proc/{vmm.pid} && echo there || true") == ""
    empty_host.do(kill)


def test_a_pidfile_is_not_believed(empty_host: HelperHost) -> None:
    """A VMM that was taken over could have written any number there while its jail was its own."""
    vmm = empty_host.start()
    victim = empty_host.sh("sleep 300 >/dev/null 2>&1 & echo $!")
    empty_host.sh(f"echo {victim} > {ROOT}/jails/firecracker/{VM}/root/firecracker.pid")
    assert empty_host.do(privileged.FindVmm(vm_id=VM)) == [vmm]
    empty_host.do(privileged.KillVmm(vm_id=VM), privileged.TearDown(vm_id=VM))
    assert empty_host.sh(f"kill -0 {victim} && echo alive") == "alive"
    empty_host.sh(f"kill {victim}")


@pytest.mark.timeout(900)
def test_prefixes_of_a_start_are_torn_down(empty_host: HelperHost) -> None:
    requests = start_requests(VM, 1)
    empty_host.make_disks(VM)
    for count in range(2, len(requests) + 1, 2):
        empty_host.do(*requests[:count])
        empty_host.do(privileged.TearDown(vm_id=VM), privileged.TearDown(vm_id=VM))
        assert_nothing_left(empty_host)
        if count == 2:
            empty_host.do(privileged.DeleteBridge())
    assert "br-fc" in empty_host.sh("ls /sys/class/net")


@pytest.mark.timeout(900)
def test_helper_killed_at_any_instant_leaks_nothing(empty_host: HelperHost) -> None:
    for delay_ms in (150, 400, 800, 1400):
        empty_host.make_disks(VM)
        killer = empty_host.sh(
            f"(sleep {delay_ms / 1000}; kill -9 $(systemctl show bangerd-root -p MainPID --value))"
            " >/dev/null 2>&1 & echo $!"
        )
        empty_host.ask(*start_requests(VM, 1))
        empty_host.sh(f"while test -e /proc/{killer}; do sleep 0.1; done")
        empty_host.sh("systemctl start bangerd-root.socket")
        assert wait_until(lambda: empty_host.ask(privileged.TearDown(vm_id=VM))[0].error is None)
        assert_nothing_left(empty_host)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_helper_killed_inside_each_operation_leaks_nothing(empty_host: HelperHost) -> None:
    """In each operation of a start, and in taking down a VM that runs, as soon as its record says so."""
    empty_host.lab.write("/root/kill_in.py", KILL_IN.encode())
    start = start_requests(VM, 1)
    ends = [each for each in start if not isinstance(each, privileged.CheckRuntime)]
    cut: list[str] = []
    for last in (*ends[1:], ends[0]):
        tag = str(last.__struct_config__.tag)
        empty_host.make_disks(VM)
        whole = start if last is ends[0] else start[: start.index(last)]
        empty_host.do(*whole)
        empty_host.sh(
            f"python3 /root/kill_in.py {ROOT}/audit/audit.log {tag} >/root/killed 2>&1 &"
            " until grep -q watching /root/killed; do sleep 0.02; done"
        )
        empty_host.ask(last)
        said = empty_host.sh("until grep killed /root/killed; do sleep 0.02; done")
        cut += said.split()[1:]
        empty_host.sh("systemctl start bangerd-root.socket")
        assert wait_until(lambda: empty_host.ask(privileged.TearDown(vm_id=VM))[0].error is None)
        assert_nothing_left(empty_host)
    assert len(cut) > len(ends) / 2, f"of most, the end was recorded as well; only {cut} were cut off"


def test_a_launch_that_fails_says_why_and_leaves_the_next_one_free(empty_host: HelperHost) -> None:
    empty_host.make_disks(VM)
    requests = start_requests(VM, 1)
    tap = names.tap_name(names.VmId(VM))
    empty_host.do(*requests[:9])
    empty_host.lab.write("/root/hold.py", HOLD_TAP.encode())
    holder = empty_host.sh(f"python3 /root/hold.py {tap} >/dev/null 2>&1 & echo $!")
    assert wait_until(lambda: "LOWER_UP" in empty_host.sh(f"ip link show {tap}"))
    failed = empty_host.refused(launch_request(VM, 1))
    assert failed.fields["vm"] == VM
    assert "busy" in failed.message, failed
    empty_host.sh(f"kill {holder}")
    assert empty_host.do(privileged.FindVmm(vm_id=VM)) == [privileged.Vmm(pid=0)]
    empty_host.do(launch_request(VM, 1), *requests[10:])
    empty_host.await_agent()


def test_a_kernel_that_is_none_is_told_by_the_log(empty_host: HelperHost) -> None:
    empty_host.make_disks(VM)
    bad = "dddddddddddd"
    kernel = f"{STATE}/kernels/{bad}"
    empty_host.sh(
        f"mkdir -p {kernel}; head -c 100000 /dev/urandom > {kernel}/vmlinux; chown -R dev:dev {kernel}"
    )
    empty_host.ask(*start_requests(VM, 1)[:9], launch_request(VM, 1, kernel_id=bad))
    assert wait_until(lambda: empty_host.do(privileged.FindVmm(vm_id=VM)) == [privileged.Vmm(pid=0)])
    log = empty_host.lab.run(["cat", f"{ROOT}/logs/{VM}/vmm.log"], user="dev").text
    assert "ernel" in log


def test_missing_parts_are_named(empty_host: HelperHost) -> None:
    empty_host.make_disks(VM)
    requests = start_requests(VM, 1)
    without_tap = [*requests[:6], *requests[7:9], launch_request(VM, 1)]
    assert "no tap" in empty_host.refused(*without_tap).message
    wrong = launch_request(VM, 1, kernel_id="ffffffffffff")
    failed = empty_host.refused(*requests[:9], wrong)
    assert failed.code == "not_found"
    assert "ffffffffffff" in failed.message
    other_slot = msgspec.structs.replace(launch_request(VM, 2))
    assert empty_host.refused(*requests[:9], other_slot).code == "conflict"


def test_a_running_vm_keeps_its_jail(empty_host: HelperHost) -> None:
    vmm = empty_host.start()
    for request in (
        privileged.DeleteJail(vm_id=VM),
        privileged.PrepareJail(vm_id=VM, slot=1),
        launch_request(VM, 1),
    ):
        assert empty_host.refused(request).code == "conflict"
    assert empty_host.do(privileged.FindVmm(vm_id=VM)) == [vmm]


def _snapshot(host: HelperHost) -> str:
    """The node of the VM's device: udev makes no link to it."""
    found = host.sh(f"grep -lx {names.dm_name(names.VmId(VM))} /sys/block/dm-*/dm/name")
    return f"/dev/{found.split('/')[3]}"


def test_a_busy_snapshot_is_a_conflict_and_goes_with_its_user(empty_host: HelperHost) -> None:
    empty_host.make_disks(VM)
    empty_host.do(*start_requests(VM, 1)[:3])
    holder = empty_host.sh(f"sleep 300 < {_snapshot(empty_host)} >/dev/null 2>&1 & echo $!")
    assert empty_host.refused(privileged.DeleteSnapshot(vm_id=VM)).code == "conflict"
    empty_host.sh(f"kill {holder}")
    empty_host.do(privileged.DeleteSnapshot(vm_id=VM), privileged.DeleteSnapshot(vm_id=VM))


def test_a_full_overlay_is_an_error_that_says_so(empty_host: HelperHost) -> None:
    empty_host.make_disks(VM, overlay_mib=1)
    empty_host.do(*start_requests(VM, 1)[:3])
    write = f"dd if=/dev/urandom of={_snapshot(empty_host)} bs=1M count=8 conv=fsync 2>/dev/null"
    empty_host.sh(write, check=False)
    failed = empty_host.refused(start_requests(VM, 1)[4])
    assert failed.code in {"operation_failed", "no_space"}


def test_an_overlay_s_header_is_not_believed(empty_host: HelperHost) -> None:
    """The kernel does: it takes the chunks that are written there, and no word from us."""
    empty_host.make_disks(VM)
    overlay = f"{STATE}/vms/{VM}/overlay.cow"
    header = r"SnAp\001\000\000\000\001\000\000\000\020"
    empty_host.sh(f"printf '{header}' | dd of={overlay} conv=notrunc status=none")
    believed = empty_host.sh(
        f"o=$(losetup -f --show {overlay}); b=$(losetup -f --show -r {STATE}/vms/{VM}/work.ext4);"
        'dmsetup create believed --table "0 65536 snapshot $b $o P 8"; dmsetup table believed;'
        "dmsetup remove believed; losetup -d $o $b"
    )
    assert believed.split()[-2:] == ["P", "16"]
    refused = empty_host.refused(*start_requests(VM, 1)[:3])
    assert (refused.code, "is damaged" in refused.message) == ("operation_failed", True)


def test_a_foreign_device_of_the_name_is_left_alone(empty_host: HelperHost) -> None:
    empty_host.make_disks(VM)
    empty_host.sh(f"dmsetup create fc-rootfs-{VM} --table '0 8 zero'")
    try:
        requests = start_requests(VM, 1)
        assert empty_host.refused(requests[1], requests[2]).code == "conflict"
        assert empty_host.refused(privileged.DeleteSnapshot(vm_id=VM)).code == "conflict"
        assert empty_host.sh("dmsetup ls") != ""
    finally:
        empty_host.sh(f"dmsetup remove fc-rootfs-{VM}")


def test_runtime_that_changed_is_not_run(empty_host: HelperHost) -> None:
    empty_host.make_disks(VM)
    path = f"{ROOT}/runtime/firecracker"
    empty_host.sh(
        f"cp -p {path} /root/kept; cp {path} /root/changed; echo >> /root/changed; mv /root/changed {path}"
    )
    try:
        assert empty_host.refused(*start_requests(VM, 1)[:9]).code == "unauthorized"
        assert empty_host.refused(launch_request(VM, 1)).code in {"unauthorized", "not_found"}
    finally:
        empty_host.sh(f"mv /root/kept {path}")


def test_requests_grep_by_operation_id(helper_host: HelperHost) -> None:
    helper_host.do(privileged.EnsureBridge())
    lines = helper_host.sh("journalctl -u bangerd-root -o cat -g lab-test | tail -1")
    logged = json.loads(lines)
    assert logged["op_id"] == "lab-test"


@pytest.mark.parametrize(("unit", "limit"), services.EXPOSURE_LIMITS.items())
def test_exposure_stays_low(helper_host: HelperHost, unit: str, limit: float) -> None:
    said = helper_host.sh(f"systemd-analyze security --no-pager {unit} | tail -1")
    found = re.search(r": ([0-9.]+) ", said)
    assert found is not None, said
    assert float(found[1]) <= limit
    verified = helper_host.sh(f"systemd-analyze verify /etc/systemd/system/{unit} 2>&1 || true")
    assert "Unknown" not in verified
