# SPDX-License-Identifier: MIT
"""The guest binary as process 1, natively: in namespaces of its own, with a root of its own in memory.

There `reboot(2)` ends the namespace, and says by the signal which end was asked for. What needs a machine is
the lab's: an agent reached over vsock (its only peer is CID 2, and here there is none, so a second agent on
a socket is asked), drives, a power-off that ends the VMM, the initramfs, and the kernel's command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from banger import guest_binary
from banger.contract import guest
from banger.owner import guest as guests

SYSTEMD = Path("/usr/lib/systemd")
AGENT = b"@banger-guest"
WATCH = b"banger-guest"
"""Our process that is not spared at the end."""
SIGTIMEDWAIT = {"x86_64": "128", "aarch64": "137"}
"""The system call's number."""
RESET = -signal.SIGHUP
"""How the namespace ends at a reset; at a power-off or halt it is SIGINT: reboot(2)."""

# The root has no file system of this machine's in it: at the end process 1 makes all of its own read-only.
SET_UP = """
root=$1 content=$2
mount -t tmpfs -o mode=755 tmpfs "$root"
cp -a "$content/." "$root/"
ip link add eth0 type veth peer name peer
ip link set peer up
exec env container=test chroot "$root" /.banger/guest
"""
# A control group of its own before the namespace: systemd takes what it sees as its root.
ENTER = """
echo $$ > "$3/cgroup.procs"
exec unshare $UNSHARED --pid --mount --net --uts --ipc --cgroup --fork --kill-child --propagation private \
        sh -ec "$SET_UP" sh "$1" "$2"
"""
# The kernel's settings are not in a namespace, and systemd writes some.
GUARDED_SYSTEMD = """
for path in /proc/sys /sys; do mount --bind $path $path && mount -o remount,bind,ro $path || exit 1; done
exec /usr/lib/systemd/real "$@"
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """A running process 1. `pid` is its number out here; `root` stays readable when it has ended."""

    process: subprocess.Popen[bytes]
    pid: int
    root: Path

    def mounts(self) -> dict[str, str]:
        """Type by mount point."""
        lines = Path(f"/proc/{self.pid}/mounts").read_text().splitlines()
        return {line.split()[1]: line.split()[2] for line in lines}

    def agent_pid(self) -> int:
        """0 while there is none."""
        return next((pid for pid, name in _children(self.pid).items() if name == AGENT), 0)

    def enter(self, *argv: str, kinds: tuple[str, ...] = ("--uts", "--net")) -> str:
        command = ["nsenter", "--target", str(self.pid), *kinds, *argv]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout

    @contextmanager
    def agent(self, directory: Path) -> Iterator[guests.GuestClient]:
        """A client of another agent in there."""
        path = directory / "agent.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(64)
            number = listener.fileno()
            argv = ["nsenter", "--target", str(self.pid), "--all", "--root", "/.banger/guest", "agent"]
            argv += ["--listen-fd", str(number), "--own-machine"]
            with subprocess.Popen(argv, pass_fds=[number], stdin=subprocess.DEVNULL) as running:
                try:
                    yield guests.GuestClient(lambda: asyncio.open_unix_connection(str(path)))
                finally:
                    self.process.kill()  # takes all its namespace along
                    running.wait(timeout=10)

    def wait_for_end(self, limit_s: float = 20) -> int:
        return self.process.wait(timeout=limit_s)


Boot = Callable[[], AbstractContextManager[Machine]]


def _children(pid: int) -> dict[int, bytes]:
    """argv[0] by pid; empty for a zombie."""
    numbers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(number): _name(int(number)) for number in numbers}


def _name(pid: int) -> bytes:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    return b""


def wait_until(condition: Callable[[], object], what: str, *, limit_s: float = 50) -> None:
    """Nothing tells us of what happens in there, so we look."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.02)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A control group for one machine, in version 2's tree wherever that is mounted."""
    lines = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    path = Path(next(line[1] for line in lines if line[2] == "cgroup2"), f"banger-test-{os.getpid()}")
    path.mkdir()
    yield path
    wait_until(lambda: not (path / "cgroup.procs").read_text(), "the control group is empty")
    for directory, _, _ in os.walk(path, topdown=False):
        os.rmdir(directory)


@pytest.fixture
def content(tmp_path: Path) -> Path:
    """The files of a small image: the guest binary, a shell and sleep."""
    path = tmp_path / "content"
    for name in (".banger", "proc", "sys", "dev", "run", "etc", "tmp"):
        (path / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (path / "usr" / name).mkdir(parents=True)
        (path / name).symlink_to(f"usr/{name}")
    shutil.copy(guest_binary.path(platform.machine()), path / ".banger/guest")
    (path / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    for program in ("sh", "sleep"):
        add_program(path, Path(shutil.which(program) or ""), Path("/bin", program))
    return path


def add_program(content: Path, program: Path, target: Path) -> None:
    """With the libraries that it needs."""
    listed = subprocess.run(["ldd", str(program)], check=True, capture_output=True, text=True, timeout=10)
    libraries = [Path(word) for word in re.findall(r"(/\S+) \(0x", listed.stdout)]
    for source, name in [(program, target), *((library, library) for library in libraries)]:
        copy = content / name.relative_to("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)


def add_script(content: Path, name: str, text: str) -> None:
    path = content / name.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def unshared() -> str:
    """What else a machine has of its own: options of unshare."""
    return ""


@pytest.fixture
def boot(tmp_path: Path, content: Path, cgroup: Path, unshared: str) -> Boot:
    """Starts process 1."""
    mount_point = tmp_path / "root"
    mount_point.mkdir()

    @contextmanager
    def booted() -> Iterator[Machine]:
        argv = ["sh", "-ec", ENTER, "sh", str(mount_point), str(content), str(cgroup)]
        environment = {"PATH": os.environ["PATH"], "SET_UP": SET_UP, "UNSHARED": unshared}
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, env=environment) as process:
            try:
                pid = _first_child(process)
                wait_until(lambda: AGENT in _children(pid).values(), "the agent is started")
                root = os.open(f"/proc/{pid}/root", os.O_DIRECTORY | os.O_PATH)
                yield Machine(process, pid, Path(f"/proc/self/fd/{root}"))
                os.close(root)
            finally:
                process.kill()

    return booted


def _first_child(process: subprocess.Popen[bytes]) -> int:
    wait_until(lambda: _children(process.pid), "unshare has a child")
    return next(iter(_children(process.pid)))


def is_staying(machine: Machine) -> bool:
    """It waits for signals."""
    return Path(f"/proc/{machine.pid}/syscall").read_text().split()[0] == SIGTIMEDWAIT[platform.machine()]


def test_the_kernel_s_file_systems_are_mounted(boot: Boot) -> None:
    with boot() as machine:
        assert machine.mounts() == {
            "/": "tmpfs",
            "/proc": "proc",
            "/sys": "sysfs",
            "/dev": "devtmpfs",
            "/dev/pts": "devpts",
            "/dev/shm": "tmpfs",
            "/run": "tmpfs",
            "/sys/fs/cgroup": "cgroup2",
        }


@pytest.mark.parametrize("unshared", ["--user --map-root-user"])
def test_a_command_s_streams_have_names(boot: Boot) -> None:
    """The kernel's /dev has none. This machine's has; a user's namespace has no such /dev."""
    with boot() as machine:
        assert machine.mounts()["/dev/shm"] == "tmpfs"
        assert "/dev" not in machine.mounts()
        names = {
            name: os.readlink(machine.root / "dev" / name) for name in ("fd", "stdin", "stdout", "stderr")
        }
    assert names == {
        "fd": "/proc/self/fd",
        "stdin": "/proc/self/fd/0",
        "stdout": "/proc/self/fd/1",
        "stderr": "/proc/self/fd/2",
    }


def test_name_and_network_are_as_configured(boot: Boot, content: Path) -> None:
    assert " ip=" not in Path("/proc/cmdline").read_text(), "an ip= of this machine's would win"
    ip = "10.7.0.2::10.7.0.1:255.255.255.0:ignored:eth0:off:10.7.0.53"
    (content / ".banger/config").write_text(f"hostname=web\nip={ip}\n")
    with boot() as machine:
        assert machine.enter("uname", "-n") == "web\n"
        links = json.loads(machine.enter("ip", "-json", "-4", "address"))
        assert {
            link["ifname"]: (link["addr_info"][0]["local"], "UP" in link["flags"]) for link in links
        } == {
            "lo": ("127.0.0.1", True),
            "eth0": ("10.7.0.2", True),
        }
        routes = json.loads(machine.enter("ip", "-json", "route"))
        assert {(route["dst"], route.get("gateway")) for route in routes} == {
            ("default", "10.7.0.1"),
            ("10.7.0.0/24", None),
        }
        assert (machine.root / "etc/resolv.conf").read_text() == "nameserver 10.7.0.53\n"


def test_ipv6_is_as_configured_at_once_and_no_router_is_heard(boot: Boot, content: Path) -> None:
    ip = "10.7.0.2::10.7.0.1:255.255.255.0::eth0:off"
    (content / ".banger/config").write_text(f"ip={ip}\nip6=fd07::2/64,fd07::1\nip6=nonsense\n")
    with boot() as machine:
        links = json.loads(machine.enter("ip", "-json", "-6", "address", "show", "dev", "eth0"))
        found = {each["local"]: each for link in links for each in link["addr_info"]}
        assert found["fd07::2"]["prefixlen"] == 64
        assert "tentative" not in found["fd07::2"]
        routes = json.loads(machine.enter("ip", "-json", "-6", "route", "show", "default"))
        assert [route["gateway"] for route in routes] == ["fd07::1"]
        accept = "/proc/sys/net/ipv6/conf/eth0/accept_ra"
        assert machine.enter("cat", accept, kinds=("--net", "--mount", "--pid")) == "0\n"


def test_the_image_s_own_resolver_is_left_alone(boot: Boot, content: Path) -> None:
    (content / ".banger/config").write_text("dns=10.7.0.53\n")
    (content / "etc/resolv.conf").write_text("nameserver 192.0.2.1\n")
    with boot() as machine:
        assert (machine.root / "etc/resolv.conf").read_text() == "nameserver 192.0.2.1\n"


@pytest.mark.parametrize("own", [None, "", "192.0.2.1 own\n"])
def test_localhost_has_a_name_unless_the_image_says_otherwise(
    boot: Boot, content: Path, own: str | None
) -> None:
    if own is not None:
        (content / "etc/hosts").write_text(own)
    with boot() as machine:
        lines = (machine.root / "etc/hosts").read_text().splitlines()
    if own:
        assert lines == ["192.0.2.1 own"]
    else:
        assert [line.split()[:2] for line in lines] == [["127.0.0.1", "localhost"], ["::1", "localhost"]]


def test_a_mount_that_fails_is_told(boot: Boot, content: Path, tmp_path: Path) -> None:
    mounts = ("/dev/no-such:/missing:ext4", "/dev/null:/wrong:ext4", "/dev/null:/right/deep:tmpfs")
    (content / ".banger/config").write_text("".join(f"mount={mount}\n" for mount in mounts))
    with boot() as machine, machine.agent(tmp_path) as client:
        assert asyncio.run(client.health()).failed_mounts == ("/missing", "/wrong")
        assert machine.mounts()["/right/deep"] == "tmpfs"


def test_without_an_init_it_stays_and_reaps_what_is_left_to_it(boot: Boot, tmp_path: Path) -> None:
    async def leave_orphans(client: guests.GuestClient) -> None:
        script = "for n in 1 2 3 4 5 6 7 8 9; do sleep 0.2 & done; exit 5"
        async with client.exec(guest.ExecSpec(argv=("/bin/sh", "-c", script))) as running:
            ends = [event async for event in running.output() if isinstance(event, guest.ExitStatus)]
        assert ends == [guest.ExitStatus(5)]

    with boot() as machine, machine.agent(tmp_path) as client:
        assert asyncio.run(client.health()).init_kind == "own"
        agent_pid = machine.agent_pid()
        asyncio.run(leave_orphans(client))
        wait_until(lambda: _children(machine.pid) == {agent_pid: AGENT}, "no orphan and no zombie is left")


def test_an_agent_that_dies_is_started_again(boot: Boot) -> None:
    with boot() as machine:
        wait_until(lambda: is_staying(machine), "it stays")
        first = machine.agent_pid()
        wait_until(lambda: WATCH in _children(first).values(), "the end is watched for")
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: machine.agent_pid() not in (0, first), "there is another agent")
        left = {machine.agent_pid(): AGENT}
        wait_until(lambda: _children(machine.pid) == left, "nobody else says that the machine goes down")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, 37, 38, 39]
)
def test_every_signal_that_asks_for_an_end_resets_the_machine(boot: Boot, number: int) -> None:
    with boot() as machine:
        wait_until(lambda: is_staying(machine), "it stays")
        os.kill(machine.pid, number)
        assert machine.wait_for_end() == RESET


def assert_read_only_at_the_end(machine: Machine, tops: list[int]) -> None:
    """Of mounts whose first directories are open here."""
    os.kill(machine.pid, signal.SIGTERM)
    assert machine.wait_for_end() == RESET
    for top in tops:
        with pytest.raises(OSError, match="Read-only file system"):
            os.mkdir("written", dir_fd=top)
        os.close(top)


def test_at_the_end_disks_are_read_only_wherever_they_are_mounted(boot: Boot, content: Path) -> None:
    targets = ("/plain", "/with blank")
    (content / ".banger/config").write_text("".join(f"mount=/dev/null:{path}:tmpfs\n" for path in targets))
    with boot() as machine:
        wait_until(lambda: is_staying(machine), "it stays")
        tops = [os.open(machine.root / path[1:], os.O_DIRECTORY) for path in targets]
        assert_read_only_at_the_end(machine, tops)


def test_at_the_end_disks_are_read_only_however_many_and_deep(boot: Boot, content: Path) -> None:
    for program in ("mkdir", "mount"):
        add_program(content, Path(shutil.which(program) or ""), Path("/bin", program))
    deep = "/".join(("", *("d" * 100,) * 4))
    script = (
        "n=0; while [ $n -lt 70 ]; do mkdir /m$n; mount -n -t tmpfs /dev/null /m$n; n=$((n + 1)); done; "
        f"mkdir -p {deep}; mount -n -t tmpfs /dev/null {deep}"
    )
    with boot() as machine:
        wait_until(lambda: is_staying(machine), "it stays")
        machine.enter("/bin/sh", "-ec", script, kinds=("--mount", "--pid", "--root"))
        tops = [os.open(machine.root / path, os.O_DIRECTORY) for path in ("m0", "m69", deep[1:])]
        assert_read_only_at_the_end(machine, tops)


@pytest.mark.parametrize("path", ["/sbin/init", "/etc/init", "/bin/init"])
def test_it_becomes_the_image_s_init(boot: Boot, content: Path, tmp_path: Path, path: str) -> None:
    add_script(content, path, 'echo "$$ $0 $*." > /seen; while :; do sleep 1; done')
    if path == "/bin/init":
        add_script(content, "/sbin/init", "")
        (content / "sbin/init").write_bytes(b"no program")
    with boot() as machine:
        seen = machine.root / "seen"
        wait_until(lambda: seen.exists() and seen.read_text(), "the image's init runs")
        assert seen.read_text() == f"1 {path} .\n"
        with machine.agent(tmp_path) as client:
            assert machine.agent_pid()
            assert asyncio.run(client.health()).init_kind == "other"


def test_a_link_to_itself_is_no_init(boot: Boot, content: Path) -> None:
    (content / "sbin/init").symlink_to("/.banger/guest")
    with boot() as machine:
        wait_until(lambda: is_staying(machine), "it stays")


@pytest.fixture
def systemd_content(content: Path) -> Path:
    """An image whose init is this machine's systemd. Its default target pulls in nothing."""
    add_program(content, SYSTEMD / "systemd", SYSTEMD / "real")
    add_program(content, SYSTEMD / "systemd-shutdown", SYSTEMD / "systemd-shutdown")
    add_script(content, "/usr/lib/systemd/systemd", GUARDED_SYSTEMD)
    for program in ("mount", "systemctl"):
        add_program(content, Path("/usr/bin", program), Path("/usr/bin", program))
    shutil.copytree(SYSTEMD / "system", content / "usr/lib/systemd/system", symlinks=True)
    (content / "sbin/init").symlink_to("/usr/lib/systemd/systemd")
    units = content / "etc/systemd/system"
    units.mkdir(parents=True)
    (units / "default.target").write_text("[Unit]\nDefaultDependencies=no\nAllowIsolate=yes\n")
    (content / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    return content


@pytest.mark.parametrize("verb", ["poweroff", "halt", "reboot"])
def test_every_end_under_systemd_resets_and_spares_the_agent(
    boot: Boot, systemd_content: Path, tmp_path: Path, verb: str
) -> None:
    """Nothing waits for it either: it ignores SIGTERM, and systemd gives others 90 s."""
    names = 'for f in /proc/[0-9]*/cmdline; do read -r line < "$f"; echo "$line"; done > /left'
    add_script(systemd_content, "/usr/lib/systemd/system-shutdown/look", names)
    with boot() as machine:
        wait_until(lambda: "init.scope" in _cgroup_of(machine), "systemd is up")
        wait_until(lambda: WATCH in _children(machine.agent_pid()).values(), "the end is watched for")
        systemctl = ("/usr/bin/systemctl", "--no-wall", verb)
        wait_until(lambda: _asked(machine, *systemctl), "systemd takes the request, or has ended by it")
        assert machine.wait_for_end() == RESET
        left = (machine.root / "left").read_bytes().split(b"\n")
        assert any(line.startswith(AGENT) for line in left)
        assert not any(line.startswith(WATCH) for line in left), "its end tells that the machine goes down"


def _cgroup_of(machine: Machine) -> str:
    return Path(f"/proc/{machine.pid}/cgroup").read_text()


def _asked(machine: Machine, *argv: str) -> bool:
    try:
        machine.enter(*argv, kinds=("--all", "--root"))
    except subprocess.CalledProcessError:
        return machine.process.poll() is not None  # who asks may be ended before it is told
    return True


@pytest.mark.parametrize("has_udev", [False, True])
def test_units_that_wait_for_nothing_are_masked(boot: Boot, systemd_content: Path, has_udev: bool) -> None:
    units = systemd_content / "usr/lib/systemd/system"
    (units / "systemd-firstboot.service").touch()
    (units / "serial-getty@.service").touch()
    (units / "systemd-networkd-wait-online.service").unlink(missing_ok=True)
    if has_udev:
        add_script(systemd_content, "/usr/lib/systemd/systemd-udevd", "")
    with boot() as machine:
        written = machine.root / "run/systemd/system"
        wait_until((written / "halt.target").is_symlink, "the links are written")
        masked = {"systemd-firstboot.service"} | (set() if has_udev else {"serial-getty@ttyS0.service"})
        found = {link.name: os.readlink(link) for link in written.iterdir()}
        assert {name for name, target in found.items() if target == "/dev/null"} == masked
        assert found.keys() - masked == {"poweroff.target", "halt.target"}
