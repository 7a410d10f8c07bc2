# SPDX-License-Identifier: MIT
"""What packages bring runs in the builder's unit: it reaches nothing of banger's, and nothing of it stays.

The lab reaches no mirror, so `mmdebstrap` is what an attacker would have of it: it tries what it can, and
says so in the tar that it makes. That the real one works as such a uid is in `tests/root`.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import pytest

from banger.contract import names
from lab.session import Lab
from tests.lab import user

pytestmark = pytest.mark.timeout(300)
PLACE: Final = "/usr/local/bin"
HOME: Final = f"/home/{user.NAME}"
PAIR: Final = ("probe-pair-a", "probe-pair-b")
ATTACKER: Final = r"""
#!/usr/bin/python3
import contextlib, ctypes, glob, io, json, os, resource, signal, socket, struct, subprocess, sys, tarfile
PTRACE_ATTACH = 16

def outcome(what):
    try:
        return f"did: {what()!r}"[:200]
    except Exception as error:
        return type(error).__name__

def connect(path):
    socket.socket(socket.AF_UNIX).connect(path)

def make_setuid():
    with open("suid", "w"):
        os.chmod("suid", 0o4755)
    return oct(os.stat("suid").st_mode)

def other():
    # Another build's connection: who comes first waits for the second, in the network that they share.
    ours = socket.socket(socket.AF_UNIX)
    ours.settimeout(100)
    while True:
        try:
            ours.bind("\0probe")
            ours.listen()
            return ours.accept()[0]
        except OSError:
            with contextlib.suppress(ConnectionRefusedError):
                ours.connect("\0probe")
                return ours

def attack(connection):
    # The other of two builds. Each ends when both have tried.
    pid, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    libc = ctypes.CDLL(None, use_errno=True)
    def traced():
        if libc.ptrace(PTRACE_ATTACH, pid, None, None):
            raise OSError(ctypes.get_errno(), "ptrace")
    found = {
        "its uids": [uid, gid],
        "to see it": outcome(lambda: os.stat(f"/proc/{pid}")),
        "its files": outcome(lambda: os.listdir(f"/proc/{pid}/root/var/tmp")),
        "a signal": outcome(lambda: os.kill(pid, 0)),
        "a signal by pidfd": outcome(lambda: signal.pidfd_send_signal(os.pidfd_open(pid), 0)),
        "to trace it": outcome(traced),
        "its limits": outcome(lambda: resource.prlimit(pid, resource.RLIMIT_CORE)),
        "its priority": outcome(lambda: os.setpriority(os.PRIO_PROCESS, pid, 5)),
        "in sight": sorted({os.stat(each).st_uid for each in glob.glob("/proc/[0-9]*")} - {os.getuid()}),
    }
    connection.sendall(b".")
    connection.recv(1)
    return found

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
    "a setuid file": outcome(make_setuid),
    "to stay": outcome(stay),
    "its input": os.readlink("/proc/self/fd/0"),
    "ids": [[int(each) for each in status[kind].split()] for kind in ("Uid", "Gid", "Groups")],
    "rights": f'{int(status["CapPrm"], 16)} {int(status["CapEff"], 16)} {status["NoNewPrivs"].strip()}',
    "other": attack(other()),
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
    "daemon's socket": "PermissionError",
    "helper's socket": "PermissionError",
    "builder's socket": "PermissionError",
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
}
ALLOWED: Final = {
    "a setuid file": "did: '0o104755'",
    "to stay": "did: None",
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
GONE: Final = f"""
for turn in $(seq 100); do
  left="$(ps -eo uid=,args= | awk '$1 >= {names.BUILD_UIDS[0]} && $1 <= {names.UID_BASE}'
systemctl list-units --all --plain --no-legend 'bangerd-build@*')
$(ls -d /var/tmp/*bangerd-build* 2>/dev/null)"
  [ -n "$(echo $left)" ] || break
  sleep 0.1
done
echo "$left"
"""


class Built(NamedTuple):
    """How a build ended, and what the attacker in it found."""

    said: str
    ids: list[list[int]]
    found: dict[str, str]
    other: dict[str, Any]


@pytest.fixture(scope="module")
def builds(installed_host: Lab) -> Iterator[tuple[Built, Built]]:
    """Two builds that went on at the same time, on a host whose mmdebstrap is the attacker."""
    forward = b'#!/bin/sh\nexec "$@"\n'
    programs = {
        "mmdebstrap": textwrap.dedent(ATTACKER).lstrip().encode(),
        "fakeroot": forward,
        "fakechroot": forward,
    }
    for name, text in programs.items():
        installed_host.write(f"{PLACE}/{name}", text, mode=0o755)
    for name in PAIR:
        recipe = f'extends = "busybox"\nname = "{name}"\nmore_packages = ["{name}"]\n'
        installed_host.write(f"{HOME}/{name}.toml", recipe.encode())
    installed_host.run(
        ["sh", "-c", "touch /var/tmp/of-the-host; systemctl show -P MainPID bangerd >/etc/probe-daemon"]
    )
    commands = [("image", "build", f"{HOME}/{name}.toml") for name in PAIR]
    one, two = user.at_once(installed_host, commands, timeout_s=240)
    yield reported(installed_host, PAIR[0], one), reported(installed_host, PAIR[1], two)
    user.banger(installed_host, "image", "delete", *PAIR, check=False)
    made = [f"{PLACE}/{name}" for name in (*programs, "new")]
    made += [f"{HOME}/{name}.toml" for name in PAIR]
    installed_host.run(["rm", "-f", "/var/tmp/of-the-host", "/etc/probe-daemon", *made])
    user.banger(installed_host, "image", "cache", "prune")


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
