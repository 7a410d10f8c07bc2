# SPDX-License-Identifier: MIT
"""What packages bring runs in the builder's unit: it reaches nothing of banger's, and nothing of it stays.

The lab reaches no mirror, so `mmdebstrap` is what an attacker would have of it: it tries what it can, and
says so in the tar that it makes. That the real one works as such a uid is in `tests/root`.
"""

from __future__ import annotations

import contextlib
import json
import textwrap
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import pytest

from banger.contract import names
from lab.session import Lab
from tests.lab import served, user

pytestmark = pytest.mark.timeout(300)
PLACE: Final = "/usr/local/bin"
HOME: Final = f"/home/{user.NAME}"
PAIR: Final = ("probe-pair-a", "probe-pair-b")
SEEN: Final = "/usr/local/share/probe"
"""What the host tells the attackers, who see nothing of it themselves: its sockets, and who builds."""
PORT: Final = 8099
ATTACKER: Final = r"""
#!/usr/bin/python3
import contextlib, ctypes, glob, io, json, os, resource, signal, socket, subprocess, sys, tarfile, time
import urllib.request
PR_SET_NAME, PTRACE_ATTACH, IO_URING_SETUP = 15, 16, 425
SEEN, PORT = "/usr/local/share/probe", 8099
LIBC = ctypes.CDLL(None, use_errno=True)

def outcome(what):
    try:
        return f"did: {what()!r}"[:200]
    except Exception as error:
        return type(error).__name__

def asked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "asked")

def connect(path, kind=socket.SOCK_STREAM):
    socket.socket(socket.AF_UNIX, kind).connect(path)

def services():
    # Of the host, by the sockets that have a name.
    found = set()
    for path in open(f"{SEEN}/sockets").read().split():
        for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
            with contextlib.suppress(OSError):
                connect(path, kind)
                found.add(path)
    return sorted(found)

def make_setuid():
    with open("suid", "w"):
        os.chmod("suid", 0o4755)
    return oct(os.stat("suid").st_mode)

def others():
    # Pid, uid, gid and name of each. They share nothing by which one could find another.
    lines = [line.split() for line in open(f"{SEEN}/builds")]
    found = [(*map(int, line[:3]), line[3]) for line in lines]
    return [each for each in found if each[1] != os.getuid()]

def await_other(is_it):
    for _ in range(1000):
        found = [each for each in others() if is_it(each)]
        if found:
            return found[0]
        time.sleep(0.1)
    sys.exit("no other build")

def attack():
    # The other of two builds. Each ends when both know that both have tried.
    LIBC.prctl(PR_SET_NAME, b"probe-here")
    pid, uid, gid, _ = await_other(lambda each: each[3].startswith("probe-"))
    found = {
        "its uids": [uid, gid],
        "to see it": outcome(lambda: os.stat(f"/proc/{pid}")),
        "its files": outcome(lambda: os.listdir(f"/proc/{pid}/root/var/tmp")),
        "a signal": outcome(lambda: os.kill(pid, 0)),
        "a signal by pidfd": outcome(lambda: signal.pidfd_send_signal(os.pidfd_open(pid), 0)),
        "to trace it": outcome(lambda: asked(LIBC.ptrace(PTRACE_ATTACH, pid, None, None))),
        "its limits": outcome(lambda: resource.prlimit(pid, resource.RLIMIT_CORE)),
        "its priority": outcome(lambda: os.setpriority(os.PRIO_PROCESS, pid, 5)),
        "in sight": sorted({os.stat(each).st_uid for each in glob.glob("/proc/[0-9]*")} - {os.getuid()}),
    }
    LIBC.prctl(PR_SET_NAME, b"probe-done")
    await_other(lambda each: each[3] in ("probe-done", "probe-seen"))
    LIBC.prctl(PR_SET_NAME, b"probe-seen")
    while any(each[3] in ("probe-here", "probe-done") for each in others()):
        time.sleep(0.1)
    return found

def fetched(url):
    return urllib.request.urlopen(url, timeout=20).read()

def stay():
    # In a session of its own, an orphan, with nothing of the scratch directory in its environment.
    subprocess.run(["setsid", "--fork", "/bin/sleep", "1001"], env={}, cwd="/", check=True,
                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

os.chdir(os.environ["TMPDIR"])
daemon = int(open("/etc/probe-daemon").read())
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
found = {
    "daemon's socket": outcome(lambda: connect("/run/banger/bangerd.sock")),
    "helper's socket": outcome(lambda: connect("/run/banger-root/bangerd-root.sock")),
    "builder's socket": outcome(lambda: connect("/run/banger-build/bangerd-build.sock")),
    "owner's home": outcome(lambda: os.listdir("/home/dev")),
    "root's home": outcome(lambda: os.listdir("/root")),
    "state": outcome(lambda: os.listdir("/var/lib/banger")),
    "cache": outcome(lambda: os.listdir("/var/cache/banger")),
    "root's state": outcome(lambda: os.listdir("/var/lib/banger-root")),
    "host's /var/tmp": outcome(lambda: os.stat("/var/tmp/of-the-host")),
    "daemon's process": outcome(lambda: os.stat(f"/proc/{daemon}")),
    "a signal to the daemon": outcome(lambda: os.kill(daemon, signal.SIGTERM)),
    "root again": outcome(lambda: os.setresuid(0, 0, 0)),
    "a namespace": outcome(lambda: subprocess.run(["unshare", "-r", "true"], check=True)),
    "the system": outcome(lambda: open("/usr/local/bin/new", "w")),
    "a device": outcome(lambda: open("/dev/kvm")),
    "the builder's memory": outcome(lambda: open(f"/proc/{os.getppid()}/mem", "r+b")),
    "io_uring": outcome(lambda: asked(LIBC.syscall(IO_URING_SETUP, 1, None))),
    "shared memory": outcome(lambda: os.mkdir("/dev/shm/of-a-build")),
    "services": services(),
    "the host's loopback": outcome(lambda: socket.create_connection(("127.0.0.1", PORT), timeout=20)),
    "the same by the way out": outcome(lambda: fetched(f"http://127.0.0.1:{PORT}/")),
    "metadata": outcome(lambda: socket.create_connection(("169.254.169.254", 80), timeout=20)),
    "the same through the daemon": outcome(lambda: fetched("http://169.254.169.254/")),
    "to resolve a name": outcome(lambda: subprocess.run(
        ["getent", "-s", "dns", "hosts", "x.localhost"], check=True, capture_output=True).stdout.split()[0]),
    "a setuid file": outcome(make_setuid),
    "to stay": outcome(stay),
    "its input": os.readlink("/proc/self/fd/0"),
    "ids": [[int(each) for each in status[kind].split()] for kind in ("Uid", "Gid", "Groups")],
    "rights": f'{int(status["CapPrm"], 16)} {int(status["CapEff"], 16)} {status["NoNewPrivs"].strip()}',
    "other": attack(),
}
tar = next(word for word in sys.argv if word.endswith("/root.tar"))
with tarfile.open(tar, "w") as file:
    report = json.dumps(found).encode()
    entry = tarfile.TarInfo("./report")
    entry.size = len(report)
    file.addfile(entry, io.BytesIO(report))
print("the attacker was here", file=sys.stderr)
"""
REFUSED: Final = {
    "daemon's socket": "FileNotFoundError",
    "helper's socket": "FileNotFoundError",
    "builder's socket": "FileNotFoundError",
    "owner's home": "PermissionError",
    "root's home": "PermissionError",
    "state": "PermissionError",
    "cache": "PermissionError",
    "root's state": "PermissionError",
    "host's /var/tmp": "FileNotFoundError",
    "daemon's process": "FileNotFoundError",
    "a signal to the daemon": "PermissionError",
    "root again": "PermissionError",
    "a namespace": "CalledProcessError",
    "the system": "OSError",
    "a device": "FileNotFoundError",
    "the builder's memory": "FileNotFoundError",
    "io_uring": "PermissionError",
    "the host's loopback": "ConnectionRefusedError",
    "the same by the way out": "HTTPError",
    "metadata": "OSError",
    "the same through the daemon": "HTTPError",
    "to resolve a name": "CalledProcessError",
}
ALLOWED: Final = {
    "a setuid file": "did: '0o104755'",
    "to stay": "did: None",
    "shared memory": "did: None",
    "services": ["/run/systemd/notify"],
    "its input": "/dev/null",
    "rights": "0 0 1",
}
OTHER: Final = {
    "to see it": "FileNotFoundError",
    "its files": "FileNotFoundError",
    "a signal": "PermissionError",
    "a signal by pidfd": "PermissionError",
    "to trace it": "PermissionError",
    "its limits": "PermissionError",
    "its priority": "PermissionError",
    "in sight": [],
}
STOPPER: Final = """
#!/bin/sh
kill -STOP $PPID
exec sleep 1002
"""
SOON: Final = "/run/systemd/system/bangerd-build@.service.d/soon.conf"
TELLS: Final = f"""
mkdir -p {SEEN}
awk '$NF ~ "^/" {{print $NF}}' /proc/net/unix >{SEEN}/sockets
while :; do
  ps -eo pid=,uid=,gid=,comm= | awk '$2 >= {names.BUILD_UIDS[0]} && $2 < {names.UID_BASE}' >{SEEN}/new
  mv {SEEN}/new {SEEN}/builds
  sleep 0.1
done
"""
GONE: Final = f"""
for turn in $(seq 100); do
  left="$(ps -eo uid=,args= | awk '$1 >= {names.BUILD_UIDS[0]} && $1 <= {names.UID_BASE}'
systemctl list-units --all --plain --no-legend 'bangerd-build@*')
$(ls -d /var/tmp/*bangerd-build* /dev/shm/of-a-build 2>/dev/null)"
  [ -n "$(echo $left)" ] || break
  sleep 0.1
done
echo "$left"
"""


class Built(NamedTuple):
    """How a build ended, and what the attacker in it found."""

    said: str
    ids: list[list[int]]
    found: dict[str, Any]
    other: dict[str, Any]


@contextlib.contextmanager
def attacked(host: Lab, attacker: str, *recipes: str) -> Iterator[None]:
    """Builds of these recipes run this as mmdebstrap, inside the block."""
    forward = b'#!/bin/sh\nexec "$@"\n'
    programs = {
        "mmdebstrap": textwrap.dedent(attacker).lstrip().encode(),
        "fakeroot": forward,
        "fakechroot": forward,
    }
    for name, text in programs.items():
        host.write(f"{PLACE}/{name}", text, mode=0o755)
    for name in recipes:
        recipe = f'extends = "busybox"\nname = "{name}"\nmore_packages = ["{name}"]\n'
        host.write(f"{HOME}/{name}.toml", recipe.encode())
    try:
        yield
    finally:
        made = [f"{PLACE}/{name}" for name in (*programs, "new")]
        made += [f"{HOME}/{name}.toml" for name in recipes]
        host.run(["rm", "-f", *made])
        user.banger(host, "image", "cache", "prune")


@pytest.fixture(scope="module")
def builds(installed_host: Lab) -> Iterator[tuple[Built, Built]]:
    """Two builds that went on at the same time, on a host whose mmdebstrap is the attacker."""
    installed_host.run(
        ["sh", "-c", "touch /var/tmp/of-the-host; systemctl show -P MainPID bangerd >/etc/probe-daemon"]
    )
    installed_host.run(["systemd-run", "--quiet", "--unit=probe-tells", "sh", "-c", TELLS])
    commands = [("image", "build", f"{HOME}/{name}.toml") for name in PAIR]
    try:
        with (
            served.directory(installed_host, "/usr/share", PORT),
            attacked(installed_host, ATTACKER, *PAIR),
        ):
            one, two = user.at_once(installed_host, commands, timeout_s=240)
        yield reported(installed_host, PAIR[0], one), reported(installed_host, PAIR[1], two)
    finally:
        user.banger(installed_host, "image", "delete", *PAIR, check=False)
        installed_host.run(["systemctl", "stop", "probe-tells"])
        installed_host.run(["rm", "-rf", "/var/tmp/of-the-host", "/etc/probe-daemon", SEEN])


def reported(host: Lab, name: str, ended: user.Ended) -> Built:
    assert ended.status == 0, ended.error_text
    image = json.loads(user.banger(host, "image", "show", name, "--json").text)["id"]
    rootfs = f"/var/lib/banger/images/{image}/rootfs.ext4"
    found = json.loads(host.run(["debugfs", "-R", "cat /report", rootfs]).text)
    return Built(ended.text + ended.error_text, found.pop("ids"), found, found.pop("other"))


def test_what_packages_bring_reaches_nothing_and_does_not_stay(
    installed_host: Lab, builds: tuple[Built, Built]
) -> None:
    for build in builds:
        assert "the attacker was here" in build.said
        assert build.found == REFUSED | ALLOWED
    assert installed_host.run(["sh", "-c", GONE], timeout_s=60).text.strip() == ""


def test_builds_at_the_same_time_cannot_reach_each_other(
    installed_host: Lab, builds: tuple[Built, Built]
) -> None:
    one, two = builds
    assert one.ids != two.ids
    for here, there in ((one, two), (two, one)):
        uids, gids, groups = there.ids
        [uid] = set(uids) | set(gids)
        assert uid in names.BUILD_UIDS
        assert groups == []
        assert here.other == OTHER | {"its uids": [uid, uid]}


@pytest.mark.long
def test_who_stops_the_builder_is_ended_all_the_same(installed_host: Lab) -> None:
    """It has the builder's uid. The watchdog is that of the unit, and shorter."""
    host = installed_host
    host.write(SOON, b"[Service]\nWatchdogSec=30\n")
    host.run(["systemctl", "daemon-reload"])
    with attacked(host, STOPPER, "probe"):
        said = user.banger(host, "image", "build", f"{HOME}/probe.toml", check=False, timeout_s=150)
    host.run(["sh", "-c", f"rm -r {SOON.rpartition('/')[0]} && systemctl daemon-reload"])
    assert said.status != 0
    assert "the builder ended before its work did" in said.error_text
    assert host.run(["sh", "-c", GONE], timeout_s=60).text.strip() == ""
