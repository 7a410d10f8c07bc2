# SPDX-License-Identifier: MIT
"""What a test does as the user of an installed host: run `banger`, and look at what VMs left on the host."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from banger.contract import names
from lab import command, limits, provision
from lab.session import Lab

NAME = provision.OWNER
CONFIG = "/etc/banger/config.toml"
# Two processors of a guest wait for each other, which in an emulated one takes long and has been for ever.
ONE_CPU = ("--vcpu", "1")
SMALL = (*ONE_CPU, "--memory", "128M", "--disk-size", "64M")
# Where the guest's system is not what is looked at: one of systemd takes a dozen times as long to boot.
TINY = ("--image", "busybox", *SMALL)

# The agent answers before the image's init has made a bus to ask.
BOOTED = """
until [ -S /run/systemd/private ]; do sleep 0.2; done
systemctl is-system-running --wait
systemctl --failed --no-legend
systemctl list-jobs --no-legend
. /etc/os-release
echo $ID $VERSION_ID
"""

_LEFTOVERS = f"""
dmsetup ls 2>/dev/null | grep fc-
losetup -l -n -O BACK-FILE | grep /var/lib/banger/
for link in /sys/class/net/tap-*; do
  grep -sq '^banger/' $link/ifalias && echo $link
done
ls /var/lib/banger-root/jails/firecracker 2>/dev/null
find /sys/fs/cgroup/banger.slice -mindepth 2 -type d -regextype egrep -regex '.*/[0-9a-f]{{12}}' 2>/dev/null
ps -eo uid=,args= | awk '$1 >= {names.BUILD_UIDS[0]} && $1 <= {names.UID_BASE + names.MAX_SLOTS}'
pgrep -a firecracker
true
"""


# By hand: `banger` takes a second to start, `http.client` half of one. This is asked after every test.
_INVENTORY = """
import os, socket
asking = socket.socket(socket.AF_UNIX)
try:
    asking.connect("/run/banger/bangerd.sock")
    asking.sendall(b"GET /v1/inventory HTTP/1.0\\r\\nHost: banger\\r\\n\\r\\n")
    print(asking.makefile().read())
except (FileNotFoundError, ConnectionError):
    if os.path.exists("/etc/systemd/system/bangerd.service"):
        print("silent")
"""
_SETTLES_S = limits.patient(60)
_ENDS_S = limits.patient(60)


# Files and not pipes: nobody reads the second command's output while the first one runs.
_AT_ONCE = """
import json, subprocess, sys, tempfile
running = []
for argv in json.load(sys.stdin):
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
    running.append((process, (out, err)))
ended = []
for process, files in running:
    status = process.wait()
    for file in files:
        file.seek(0)
    ended.append([status, *(file.read().decode() for file in files)])
json.dump(ended, sys.stdout)
"""


class Ended(NamedTuple):
    """How one of many commands ended."""

    status: int
    text: str
    error_text: str


def banger(
    host: Lab, *words: str, check: bool = True, timeout_s: float = 180, stdin: bytes = b""
) -> command.Result:
    """Runs `banger` as the owner."""
    return host.run(["banger", *words], user=NAME, check=check, timeout_s=timeout_s, stdin=stdin)


def shown(host: Lab, name: str) -> dict[str, Any]:
    """What `vm show` says of a VM."""
    document: dict[str, Any] = json.loads(banger(host, "vm", "show", name, "--json").text)
    return document


def ended(host: Lab, name: str) -> dict[str, Any]:
    """What `vm show` says of a VM that ends by itself, once it has."""
    deadline = time.monotonic() + _ENDS_S
    while (row := shown(host, name))["state"] == "running":
        assert time.monotonic() < deadline, f"{name} runs on"
    return row


def leftovers(host: Lab) -> str:
    """What only a VM or a build of banger's can have made, as it runs: devices, links, jails, processes."""
    return host.run(["sh", "-c", _LEFTOVERS]).text


def unowned(host: Lab) -> str:
    """What nobody owns, as `banger gc` shows it; nothing on a host where banger is not installed.

    A log writer ends a moment after its VMM, so what is left over has a moment to go, and a daemon to start.
    """
    deadline = time.monotonic() + _SETTLES_S
    while True:
        left = _left(host.run(["python3", "-S", "-c", _INVENTORY]).text)
        if not left or time.monotonic() > deadline:
            return left


def _left(said: str) -> str:
    if said == "silent\n":
        return "bangerd does not answer, so nothing is owned\n"
    things = json.loads(said.partition("\n\n")[2])["things"] if said else []
    # A mount of nobody's is left alone by `gc`, as somebody may have made it; here nobody has.
    left = [
        each for each in things if not each["owner"] and (not each["foreign"] or each["kind"] == "mount")
    ]
    return "".join(f"{each['kind']} {each['name']}: {each['why']}\n" for each in left)


def at_once(host: Lab, commands: Sequence[Sequence[str]], *, timeout_s: float) -> list[Ended]:
    """Runs many `banger` commands side by side; how each of them ended, in the order given."""
    asked = json.dumps([["banger", *words] for words in commands]).encode()
    said = host.run(["python3", "-c", _AT_ONCE], user=NAME, stdin=asked, timeout_s=timeout_s).stdout
    return [Ended(*each) for each in json.loads(said)]


@contextmanager
def configured(host: Lab, setting: str) -> Iterator[None]:
    """The daemon runs with one more line in its configuration, inside the block."""
    before = host.run(["cat", CONFIG]).stdout
    host.write(CONFIG, before + setting.encode() + b"\n")
    host.run(["systemctl", "restart", "bangerd"])
    try:
        yield
    finally:
        host.write(CONFIG, before)
        host.run(["systemctl", "restart", "bangerd"])
