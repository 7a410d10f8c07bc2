# SPDX-License-Identifier: MIT
"""Every row of doctor both ways: a host on which all is well, then one thing broken, and the row says so."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from banger.contract import inventory, names, resources
from banger.system import host as hosts
from banger.system.doctor import report, scene, storage, table
from tests.fakes import host as fakes

ALL = (*table.ORDINARY, *table.PRODUCTION)
FAIL, WARN, SKIP, PASS = report.Status.FAIL, report.Status.WARN, report.Status.SKIP, report.Status.PASS
Break = Callable[[fakes.FakeHost], object]


SERVED = (
    "bangerd",
    "bangerd-root",
    "bangerd socket",
    "bangerd-root socket",
    "versions",
    "leftovers",
    "dns",
)
"""Rows about services that answer; for the others none has to be started."""


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Iterator[fakes.FakeHost]:
    """A host on which all is well; but for the services, where a test is about another row alone."""
    given = getattr(request.node, "callspec", None)
    check = given.params.get("check", SERVED[0]) if given is not None else SERVED[0]
    with fakes.furnished() as made, contextlib.ExitStack() as stack:
        if check in SERVED:
            stack.enter_context(made.serving())
            made.api.add_vm("web", id=fakes.VM)
        yield made


def exposure(said: str) -> Break:
    return lambda host: host.says("/usr/bin/systemd-analyze", f"→ Overall exposure level: {said} :-|")


def test_all_is_well(host: fakes.FakeHost) -> None:
    found = host.ask_all()
    assert [row for row in found.rows if row.status is not PASS] == []
    assert found.is_good(strict=True)
    assert [row.check for row in found.rows] == [check.name for check in ALL]


def writes(path: str | Path, text: str, *, mode: int = 0o644) -> Break:
    return lambda host: host.write(path, text, mode=mode)


def appends(path: str | Path, text: str) -> Break:
    return lambda host: host.write(path, host.at(path).read_text() + text)


def loses(path: str | Path) -> Break:
    return lambda host: host.at(path).unlink()


def mode(path: str | Path, bits: int) -> Break:
    return lambda host: host.at(path).chmod(bits)


def views(*, machine: str = "", kernel: str = "") -> Break:
    def change(host: fakes.FakeHost) -> None:
        was = host.viewer
        host.viewer = dataclasses.replace(was, machine=machine or was.machine, kernel=kernel or was.kernel)

    return change


def unit(name: str, old: str, new: str) -> Break:
    def change(host: fakes.FakeHost) -> None:
        blocks = host.all_units().split("\n\n")
        host.unit_states("\n\n".join(b.replace(old, new) if f"Id={name}" in b else b for b in blocks))

    return change


def hello(**values: str | int) -> Break:
    def change(host: fakes.FakeHost) -> None:
        host.helper.info = msgspec.structs.replace(host.helper.info, **values)

    return change


def stray(host: fakes.FakeHost) -> None:
    tap = inventory.Thing(inventory.Kind.TAP, "tap-ffffffff", "no VM has such an id", vm_id="ffffffffffff")
    host.api.inventory = inventory.Inventory((tap,))


def names_at(endpoint: str, *, problem: str = "") -> Break:
    def change(host: fakes.FakeHost) -> None:
        host.api.dns = resources.DnsStatus(
            listen=endpoint,
            listen_source=resources.SizeSource.DEFAULT,
            upstream_source=resources.SizeSource.DEFAULT,
            problem=problem,
        )

    return change


def writable_drop_in(host: fakes.FakeHost) -> None:
    host.write(f"{ETC}/bangerd-root.service.d/own.conf", "[Service]\n", mode=0o666)


def foreign_command(host: fakes.FakeHost) -> None:
    host.at(hosts.BIN / "banger").unlink()
    host.write(hosts.BIN / "banger", "")


def settings(old: str, new: str) -> Break:
    def change(host: fakes.FakeHost) -> None:
        text = host.at(hosts.INSTALL_TOML).read_text()
        assert re.search(old, text)
        host.write(hosts.INSTALL_TOML, re.sub(old, new, text))

    return change


def old_firecracker(host: fakes.FakeHost) -> None:
    """Supplied by the user, recorded as such, and too old."""
    host.program(str(hosts.RUNTIME / "firecracker"), "echo 'Firecracker v1.11.0'")
    same_everywhere(host, "firecracker")


def newer_firecracker(host: fakes.FakeHost) -> None:
    host.program(str(hosts.RUNTIME / "firecracker"), "echo 'Firecracker v1.13.0'")
    same_everywhere(host, "firecracker", version="1.13.0")


def same_everywhere(host: fakes.FakeHost, name: str, version: str = "") -> None:
    """Both records say that the file which is there is the one to be used."""
    path = host.at(hosts.RUNTIME / "runtime.json")
    record = msgspec.json.decode(path.read_bytes())
    record[name]["sha256"] = hashlib.sha256(host.at(hosts.RUNTIME / name).read_bytes()).hexdigest()
    record[name]["version"] = version or record[name]["version"]
    path.write_bytes(msgspec.json.encode(record))
    settings(f'{name}_sha256 = "[0-9a-f]+"', f'{name}_sha256 = "{record[name]["sha256"]}"')(host)


def configured(**values: object) -> Break:
    return lambda host: host.defaults(**{k: {"value": v, "source": "config"} for k, v in values.items()})


def refused_configuration(host: fakes.FakeHost) -> None:
    answer = (
        '{"error": {"code": "bad_request", "message": "vcpu: unknown field", "hint": "correct the file"}}'
    )
    host.says(f"{fakes.PREFIX}/bin/bangerd", answer, status=3)


def status_of(old: str, new: str) -> Break:
    def change(host: fakes.FakeHost) -> None:
        text = host.at("/proc/4242/status").read_text()
        assert old in text
        host.write("/proc/4242/status", text.replace(old, new))

    return change


HELPER_MODULE = fakes.PREFIX / "lib/python3/site-packages/banger/helper/policy.py"
OWN = str(names.UID_BASE + 1)
EDAC = "/sys/devices/system/edac/mc/mc0"
LIBRARY = "/usr/lib/x86_64-linux-gnu/libnftables.so.1"
MOUNTS = "/proc/self/mountinfo"
NOEXEC = "30 25 8:2 / /var/lib rw,nodev,noexec - ext4 /dev/vdb rw\n"
ROUTES = "/proc/net/route"
IPV6 = "/proc/sys/net/ipv6/conf/all"
ETC = "/etc/systemd/system"
MODULES_DEP = f"/lib/modules/{fakes.RELEASE}/modules.dep"

BROKEN: list[tuple[str, Break, report.Status, str, str]] = [
    ("architecture", views(machine="riscv64"), FAIL, "riscv64", "another host"),
    ("architecture", views(machine="aarch64"), WARN, "catalog", "--firecracker"),
    ("kvm", loses("/dev/kvm"), FAIL, "/dev/kvm", "modprobe"),
    ("kvm", writes("/proc/cpuinfo", "flags : fpu\n"), FAIL, "no svm or vmx", "firmware"),
    ("kvm", lambda h: h.program("/usr/bin/fake-python", "echo bad >&2", status=1), FAIL, "bad", "firmware"),
    ("linux", views(kernel="4.19.0"), FAIL, "4.19.0", "upgrade"),
    ("systemd", lambda h: h.at("/run/systemd/system").rmdir(), FAIL, "does not run", "systemd"),
    ("cgroup v2", loses("/sys/fs/cgroup/cgroup.controllers"), FAIL, "not mounted", "unified"),
    (
        "cgroup v2",
        writes("/sys/fs/cgroup/cgroup.controllers", "cpu io pids"),
        WARN,
        "memory",
        "cgroup_disable",
    ),
    ("loop", writes("/proc/misc", "200 tun\n"), FAIL, "loop", "install a kernel"),
    ("dm_snapshot", writes("/proc/modules", ""), WARN, "not loaded", "sudo modprobe dm_snapshot"),
    ("tun", writes("/proc/misc", ""), FAIL, "tun", "install a kernel"),
    ("bridge", writes("/proc/modules", ""), WARN, "not loaded", "sudo modprobe bridge"),
    ("nf_tables", writes(MODULES_DEP, ""), FAIL, "nf_tables", "install a kernel"),
    ("e2fsprogs", loses("/usr/bin/debugfs"), FAIL, "debugfs", "apt install e2fsprogs"),
    ("nft_ct", writes(MODULES_DEP, ""), FAIL, "nft_ct", "install a kernel"),
    ("nft_masq", writes(MODULES_DEP, ""), FAIL, "nft_masq", "install a kernel"),
    ("libnftables", loses(LIBRARY), FAIL, "no VM with a network", "apt install libnftables1"),
    ("mmdebstrap", loses("/usr/bin/mmdebstrap"), WARN, "no image can be built", "apt install mmdebstrap"),
    ("git", loses("/usr/bin/git"), WARN, "no repository", "apt install git"),
    ("ssh", loses("/usr/bin/ssh-keygen"), WARN, "ssh-keygen", "apt install openssh-client"),
    ("installed", loses(hosts.INSTALL_TOML), FAIL, "not installed", "system install"),
    ("installed", writes(hosts.INSTALL_TOML, "owner_uid = 'x'"), FAIL, "not valid", "system install"),
    ("installed", settings(r"owner_uid = \d+", "owner_uid = 1999999999"), FAIL, "1999999999", "--owner"),
    ("installed", settings('owner_name = ".+"', 'owner_name = "gone"'), FAIL, "was gone", "--owner"),
    ("uids", writes("/etc/passwd", f"eve:x:{names.UID_BASE + 1}:1::/:\n"), FAIL, "user eve", "usermod"),
    ("uids", writes("/etc/group", f"eve:x:{names.BUILD_UIDS[0]}:\n"), FAIL, "group eve", "groupmod"),
    ("uids", settings("owner_gid", "uid_base = 2099995000\nowner_gid"), FAIL, "uids of builds", "uid_base"),
    ("uids", writes("/etc/subuid", "eve:2000000000:200000000\n"), FAIL, "eve in /etc/subuid", "subuid"),
    ("firecracker", loses(hosts.RUNTIME / "firecracker"), FAIL, "not installed", "system install"),
    ("firecracker", mode(hosts.RUNTIME / "firecracker", 0o775), FAIL, "written by others", "chmod go-w"),
    ("firecracker", writes(hosts.RUNTIME / "firecracker", "other"), FAIL, "recorded", "system install"),
    ("firecracker", old_firecracker, FAIL, "older than 1.12.0", "system install"),
    ("jailer", loses(hosts.RUNTIME / "jailer"), FAIL, "not installed", "system install"),
    ("jailer", mode(hosts.RUNTIME, 0o777), FAIL, "written by others", "chmod go-w"),
    ("jailer", newer_firecracker, WARN, "Firecracker is 1.13.0", "system install"),
    ("root's code", mode(HELPER_MODULE, 0o664), FAIL, str(HELPER_MODULE), f"chmod go-w {HELPER_MODULE}"),
    ("root's code", mode("/usr/local", 0o777), FAIL, "/usr/local can be", "chmod go-w /usr/local"),
    ("root's code", mode("/usr/bin/python3.11", 0o775), FAIL, "python3.11 can", "chmod go-w"),
    ("root's interpreter", mode("/usr/lib/python3.11/os.py", 0o666), FAIL, "os.py can be", "chmod go-w"),
    ("root's interpreter", mode(fakes.LIBC, 0o666), FAIL, "libc.so.6 can be", "chmod go-w"),
    ("root's interpreter", mode(HELPER_MODULE, 0o664), SKIP, "others could change", "root's code"),
    ("root's programs", mode("/usr/bin/e2fsck", 0o777), FAIL, "/usr/bin/e2fsck can be", "chmod go-w"),
    ("root's programs", mode("/usr/bin", 0o1777), FAIL, "/usr/bin can be", "chmod go-w /usr/bin"),
    ("root's runtime", mode(hosts.RUNTIME / "runtime.json", 0o666), FAIL, "runtime.json", "chmod go-w"),
    ("root's settings", mode(hosts.INSTALL_TOML, 0o666), FAIL, "install.toml", "chmod go-w"),
    ("root's settings", writes("/etc/banger/a b", "", mode=0o666), FAIL, "a b can", "w '/etc/banger/a b'"),
    ("root's units", mode(hosts.UNIT_DIR / "bangerd.service", 0o666), FAIL, "bangerd.service", "chmod go-w"),
    ("root's units", writable_drop_in, FAIL, "own.conf can be", "chmod go-w"),
    ("commands", foreign_command, FAIL, "does not lead to", "move away"),
    ("commands", mode(hosts.BIN, 0o777), FAIL, "/usr/local/bin can be", "chmod go-w"),
    (
        "units as shipped",
        loses(hosts.UNIT_DIR / "bangerd.service"),
        FAIL,
        "bangerd.service",
        "system install",
    ),
    (
        "units as shipped",
        appends(hosts.UNIT_DIR / "bangerd-root.service", "NoNewPrivileges=no\n"),
        FAIL,
        "bangerd-root.service",
        "system install",
    ),
    ("units as shipped", writes(f"{ETC}/bangerd.service", ""), FAIL, "instead of ours", "delete it"),
    (
        "units as shipped",
        writes(f"{ETC}/bangerd.service.d/own.conf", "[Service]\n"),
        WARN,
        "own.conf",
        "daemon-reload",
    ),
    (
        "units",
        unit("bangerd.service", "active", "failed"),
        FAIL,
        "is failed",
        "systemctl start bangerd.service",
    ),
    (
        "units",
        unit("bangerd.service", "running", "auto-restart"),
        FAIL,
        "started again",
        "journalctl -u bangerd",
    ),
    ("units", unit("bangerd-root.socket", "enabled", "disabled"), FAIL, "disabled", "systemctl enable"),
    ("units", unit("bangerd-root.service", "Reload=no", "Reload=yes"), WARN, "older files", "daemon-reload"),
    ("bangerd", lambda h: h.api.stop(), FAIL, "does not answer", "systemctl restart bangerd"),
    ("bangerd-root", lambda h: h.helper.stop(), FAIL, "does not answer", "restart bangerd-root.socket"),
    ("bangerd socket", mode(hosts.API_SOCKET, 0o666), FAIL, "0666, not 0600", "restart"),
    ("bangerd-root socket", mode(hosts.HELPER_SOCKET, 0o660), FAIL, "0660, not 0600", "restart"),
    ("bangerd-build socket", mode(hosts.BUILDER_SOCKET, 0o666), FAIL, "0666", "restart bangerd-build"),
    ("bangerd-build exposure", exposure("2.3 OK"), FAIL, "2.3", "security bangerd-build@.service"),
    (
        "units",
        unit("bangerd-build.socket", "active", "failed"),
        FAIL,
        "failed",
        "start bangerd-build.socket",
    ),
    ("socket directory", mode("/run/banger-root", 0o755), FAIL, "0755, not 0711", "sudo chmod 711"),
    ("state", mode(hosts.STATE, 0o755), FAIL, "0755, not 0700", "sudo chmod 700"),
    ("cache", lambda h: h.at(hosts.CACHE).rmdir(), FAIL, "does not exist", "system install"),
    ("helper state", mode(hosts.HELPER, 0o777), FAIL, "0777, not 0711", "sudo chmod 711"),
    ("helper state", mode(hosts.HELPER, 0o700), FAIL, "0700, not 0711", "sudo chmod 711"),
    ("bangerd exposure", exposure("9.2 UNSAFE"), FAIL, "9.2", "systemd-analyze security bangerd.service"),
    ("bangerd-root exposure", exposure("huh"), WARN, "huh", "systemd-analyze"),
    ("versions", hello(version="0.0.0"), FAIL, "not in step", "system restart"),
    ("versions", hello(protocol=99), FAIL, "protocol 99", "system restart"),
    (
        "cgroup delegation",
        writes(f"/sys/fs/cgroup/{names.CGROUP_PARENT}/cgroup.controllers", "cpu"),
        FAIL,
        "lacks io, memory, pids",
        "restart banger-vms",
    ),
    (
        "network",
        appends(ROUTES, "eth1\t0000D50A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n"),
        FAIL,
        "10.213.0.0/16, which this host reaches by eth1",
        "--network",
    ),
    ("ipv6", writes(f"{IPV6}/forwarding", "1\n"), PASS, "reach the internet by it", ""),
    ("ipv6", writes(f"{IPV6}/forwarding", "0\n"), PASS, "not forwarded by this host", ""),
    (
        "ipv6",
        writes("/proc/net/ipv6_route", f"fd62616e6765{'0' * 20} 30 - 00 - - - - 00000003 eth1\n"),
        FAIL,
        "fd62:616e:6765::/48, which this host reaches by eth1",
        "--network6",
    ),
    ("ipv6", writes(f"{IPV6}/disable_ipv6", "1\n"), WARN, "no VM can have --ipv6", "disable_ipv6=0"),
    ("ipv6", loses(f"{IPV6}/disable_ipv6"), WARN, "no VM can have --ipv6", "disable_ipv6=0"),
    ("jail mount", appends(MOUNTS, NOEXEC), FAIL, "/var/lib, which is mounted nodev, noexec", "remount"),
    ("configuration", refused_configuration, FAIL, "vcpu: unknown field", "correct the file"),
    ("configuration", configured(memory_mib=64_000), WARN, "64000 (config)", "config.toml"),
    ("configuration", configured(vms_memory_mib=256), WARN, "VMs have 256 MiB together", "config.toml"),
    ("configuration", configured(vcpus=32), WARN, "the host has 2", "config.toml"),
    ("image", configured(image="other"), FAIL, "no image 'other'", "image build other"),
    ("image", loses(fakes.FakeHost.image_file("rootfs.ext4")), FAIL, "lost", "image delete"),
    ("image", writes(fakes.FakeHost.image_file("rootfs.ext4"), "short"), FAIL, "5 bytes", "image delete"),
    ("image", writes(fakes.FakeHost.image_file("rootfs.ext4"), "x" * 4096), FAIL, "no ext4", "image delete"),
    ("kernel", configured(kernel="other"), FAIL, "no kernel 'other'", "kernel pull other"),
    ("kernel", loses(fakes.FakeHost.kernel_file("vmlinux")), FAIL, "lost", "kernel pull"),
    ("kernel", writes(fakes.FakeHost.kernel_file("vmlinux"), "b kernel"), FAIL, "sha256", "kernel pull"),
    ("records", writes(fakes.FakeHost.image_file("image.json"), "{"), WARN, "aaaaaaaaaaaa", "delete"),
    ("leftovers", stray, WARN, "tap tap-ffffffff (no VM has such an id)", "gc --apply"),
    ("dns", names_at("127.0.0.1:1"), FAIL, "127.0.0.1:1", "system restart"),
    ("smt", writes("/sys/devices/system/cpu/smt/active", "1"), WARN, "share a core", "nosmt"),
    ("ksm", writes("/sys/kernel/mm/ksm/run", "1"), WARN, "merged", "ksm/run"),
    ("swap", writes("/proc/swaps", "Filename\n/dev/vda2 partition 1 0 -2\n"), WARN, "/dev/vda2", "swapoff"),
    ("mitigations", writes("/proc/cmdline", "mitigations=off"), FAIL, "mitigations=off", "auto,nosmt"),
    (
        "mitigations",
        writes("/sys/devices/system/cpu/vulnerabilities/meltdown", "Vulnerable"),
        WARN,
        "meltdown",
        "microcode",
    ),
    (
        "nx_huge_pages",
        writes("/sys/devices/system/cpu/vulnerabilities/itlb_multihit", "KVM: Vulnerable"),
        FAIL,
        "iTLB",
        "nx_huge_pages=auto",
    ),
    (
        "nx_huge_pages",
        writes("/sys/module/kvm/parameters/nx_huge_pages", "Y"),
        WARN,
        "since Linux 6.1",
        "never",
    ),
    ("tested kernel", views(kernel="6.12.0-1"), WARN, "6.12.0", "run one"),
    ("console", writes("/proc/cmdline", "console=ttyS0"), WARN, "console=ttyS0", "loglevel=1"),
    ("ecc memory", lambda h: h.at(EDAC).rename(h.at("/gone")), WARN, "no memory", "ECC"),
    ("jailed", status_of(OWN, "0"), FAIL, "uid 0", "kill"),
    ("jailed", status_of("CapPrm:\t0000", "CapPrm:\t00ff"), FAIL, "Linux capabilities", "kill"),
    ("jailed", status_of("Seccomp:\t2", "Seccomp:\t0"), FAIL, "no filter", "kill"),
    ("jailed", writes(f"/{fakes.VM_CGROUP}/cgroup.procs", "77\n"), SKIP, "no VM runs", "vm run"),
    ("limits", writes(f"/{fakes.VM_CGROUP}/memory.max", "max"), FAIL, "memory.max", "vm restart"),
    ("disk limits", writes(f"/{fakes.VM_CGROUP}/io.max", ""), WARN, "disks busy", "set-property"),
    (
        "guests' logs",
        writes(f"{hosts.HELPER}/logs/{fakes.VM}/console.log", "x" * (1 << 20)),
        FAIL,
        "1048576 bytes",
        "report",
    ),
]


@pytest.mark.parametrize(
    ("check", "change", "status", "detail", "remedy"),
    BROKEN,
    ids=[f"{number}-{each[0]}" for number, each in enumerate(BROKEN)],
)
def test_what_is_broken_is_said(
    host: fakes.FakeHost, check: str, change: Break, status: report.Status, detail: str, remedy: str
) -> None:
    change(host)
    row = host.ask(check)
    assert row.status is status, row
    assert detail in row.detail
    assert remedy in row.remedy
    assert bool(row.remedy) == (status is not PASS)


def test_every_row_can_fail() -> None:
    """Room depends on the test machine's own disk, and is judged below."""
    seen = {name for name, _, status, _, _ in BROKEN if status in (FAIL, WARN)}
    rooms = {check.name for check in ALL if isinstance(check.run, storage.Room)}
    assert {check.name for check in ALL} - seen - rooms == set()
    assert len({check.name for check in ALL}) == len(ALL)


@pytest.mark.parametrize(
    ("free", "inodes", "of", "status"),
    [
        (10 << 30, 10**6, 10**7, PASS),
        (10 << 30, 0, 0, PASS),  # a file system that counts none
        (10 << 30, 10, 10**7, WARN),
        (1 << 30, 10**6, 10**7, WARN),
        (1 << 20, 10**6, 10**7, FAIL),
    ],
)
def test_room(free: int, inodes: int, of: int, status: report.Status) -> None:
    found = storage.Room(Path("/var/lib/banger"), "disks").judge(free, inodes, inodes=of)
    assert found.status is status
    assert bool(found.remedy) == (status is not PASS)


def test_what_is_not_installed_is_one_failure_and_not_thirty(host: fakes.FakeHost) -> None:
    host.at(hosts.INSTALL_TOML).unlink()
    found = host.ask_all()
    assert [row.check for row in found.rows if row.status is FAIL] == ["installed"]


@pytest.mark.parametrize(
    ("service", "unseen"),
    [("bangerd", {"versions", "leftovers", "dns"}), ("bangerd-root", {"versions", "leftovers"})],
)
def test_without_a_service_the_rest_is_seen(host: fakes.FakeHost, service: str, unseen: set[str]) -> None:
    (host.api if service == "bangerd" else host.helper).stop()
    host.api.inventory = None  # type: ignore[assignment]  # without the helper the daemon has but an error
    found = {row.check: row.status for row in host.ask_all().rows}
    assert {name for name, status in found.items() if status is FAIL} == {service, f"{service} socket"}
    assert {name for name, status in found.items() if status is SKIP} == unseen


@pytest.mark.parametrize(
    ("problem", "wanted"), [("", PASS), ("systemd-resolved does not run", WARN)], ids=["routed", "not"]
)
def test_names_that_are_answered(host: fakes.FakeHost, problem: str, wanted: report.Status) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))

        def answer() -> None:
            question, asker = server.recvfrom(512)
            server.sendto(question[:2] + b"\x84\0" + question[4:], asker)

        answering = threading.Thread(target=answer, daemon=True)
        answering.start()
        names_at(f"127.0.0.1:{server.getsockname()[1]}", problem=problem)(host)
        (row,) = [row for row in host.ask_all().rows if row.check == "dns"]
        answering.join(10)
    assert row.status is wanted
    assert problem in row.detail


def test_who_may_not_look_is_told_who_may(host: fakes.FakeHost) -> None:
    def denied(_: scene.Scene) -> report.Finding:
        raise PermissionError(13, "Permission denied", "/dev/kvm")

    check = report.Check("kvm", "VMs", denied)
    user = scene.Scene(host.root, scene.Viewer(uid=1000, root_uid=0))
    found = report.judge(check, user)
    assert (found.status, found.remedy) == (SKIP, "sudo banger doctor")
    assert "/dev/kvm: Permission denied" in found.detail
    # Root that may not look is no matter of rights.
    assert report.judge(check, scene.Scene(host.root, scene.Viewer(uid=0))).status is FAIL


def test_the_probe_of_kvm_tells_a_refusal_from_a_failure(host: fakes.FakeHost) -> None:
    host.program("/usr/bin/fake-python", "echo Permission denied >&2", status=77)
    host.viewer = scene.Viewer(uid=1000, root_uid=0, machine="x86_64", python=host.viewer.python)
    assert host.ask("kvm").status is SKIP


def test_a_daemon_that_closes_instead_of_answering_is_silent(host: fakes.FakeHost) -> None:
    host.api.stop()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(host.at(hosts.API_SOCKET)))
        listener.listen()
        closer = threading.Thread(target=lambda: listener.accept()[0].close())
        closer.start()
        row = host.ask("bangerd")
        closer.join()
    assert row.status is FAIL
    assert "does not answer" in row.detail
    assert "bangerd.service is active" in row.detail
