# SPDX-License-Identifier: MIT
"""What packages bring runs in the builder's unit: it reaches nothing of banger's, and nothing of it stays.

The lab reaches no mirror, so `mmdebstrap` is what an attacker would have of it: it tries what it can, and
says so in the tar that it makes. That the real one works as such a uid is in `tests/root`.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Final

import pytest

from banger.contract import names
from lab.session import Lab
from tests.lab import user

pytestmark = pytest.mark.timeout(300)
PLACE: Final = "/usr/local/bin"
RECIPE: Final = f"/home/{user.NAME}/probe.toml"
ATTACKER: Final = r"""
#!/usr/bin/python3
import io, json, os, signal, socket, subprocess, sys, tarfile

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
    "ids": f'{status["Uid"].split()} {status["Gid"].split()} {status["Groups"].split()}',
    "rights": f'{int(status["CapPrm"], 16)} {int(status["CapEff"], 16)} {status["NoNewPrivs"].strip()}',
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
UID: Final = str(names.UID_BASE)
ALLOWED: Final = {
    "a setuid file": "did: '0o104755'",
    "to stay": "did: None",
    "its input": "/dev/null",
    "ids": f"{[UID] * 4} {[UID] * 4} []",
    "rights": "0 0 1",
}
GONE: Final = f"""
for turn in $(seq 100); do
  left="$(pgrep -a -U {UID}; systemctl list-units --all --plain --no-legend 'bangerd-build@*')
$(ls -d /var/tmp/*bangerd-build* 2>/dev/null)"
  [ -n "$(echo $left)" ] || break
  sleep 0.1
done
echo "$left"
"""


@pytest.fixture
def attacked_host(installed_host: Lab) -> Iterator[Lab]:
    """The installed host, whose mmdebstrap is the attacker."""
    forward = b'#!/bin/sh\nexec "$@"\n'
    for name, text in {
        "mmdebstrap": textwrap.dedent(ATTACKER).lstrip().encode(),
        "fakeroot": forward,
        "fakechroot": forward,
    }.items():
        installed_host.write(f"{PLACE}/{name}", text, mode=0o755)
    installed_host.write(RECIPE, b'extends = "busybox"\nname = "probe"\n')
    installed_host.run(
        ["sh", "-c", "touch /var/tmp/of-the-host; systemctl show -P MainPID bangerd >/etc/probe-daemon"]
    )
    yield installed_host
    user.banger(installed_host, "image", "delete", "probe", check=False)
    made = [f"{PLACE}/{name}" for name in ("mmdebstrap", "fakeroot", "fakechroot", "new")]
    installed_host.run(["rm", "-f", RECIPE, "/var/tmp/of-the-host", "/etc/probe-daemon", *made])
    user.banger(installed_host, "image", "cache", "prune")


def test_what_packages_bring_reaches_nothing_and_does_not_stay(attacked_host: Lab) -> None:
    host = attacked_host
    said = user.banger(host, "image", "build", RECIPE)
    assert "the attacker was here" in said.error_text + said.text
    image = json.loads(user.banger(host, "image", "show", "probe", "--json").text)["id"]
    rootfs = f"/var/lib/banger/images/{image}/rootfs.ext4"
    report = json.loads(host.run(["debugfs", "-R", "cat /report", rootfs]).text)
    assert report == REFUSED | ALLOWED
    assert host.run(["sh", "-c", GONE], timeout_s=60).text.strip() == ""
