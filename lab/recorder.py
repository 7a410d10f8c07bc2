# SPDX-License-Identifier: MIT
"""Runs in the lab as root: the kernel counts what the helper's unit, and all that it starts, ask of it.

`python3 recorder.py record` sets up tracefs and then waits for mains of the unit: each asks here before it
becomes the helper (see lab/rights.py), so nothing of its life is missed. The kernel follows a process to its
children; its histograms (Documentation/trace/histogram.rst) count in place, so nothing is traced that could
be lost, no process is stopped, and no other process is looked at. `python3 recorder.py report` prints the
counts, one fact a line.

For x86_64: arguments are named by its registers. Counted are arguments of functions of the kernel: every
system call that a filter judges, every one that passes, Linux capabilities, nodes of devices, namespaces,
and families of sockets.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

TRACING = Path("/sys/kernel/tracing")
INSTANCE = TRACING / "instances" / "rights"
PLACE = Path("/run/rights")
ASKING, GO = PLACE / "asking", PLACE / "go"
UNIT = "bangerd-root.service"
NOBODY = 99_999_999
"""More than a pid can be: an empty list of pids would mean every process."""

PROBES = (
    "call __seccomp_filter nr=%di:s32",
    # cap_effective of struct cred in Debian's 6.1; `report` knows it from anything else.
    "cap cap_capable cap=%dx:s32 opts=%cx:x32 eff=+60(%di):x64",
    "device devcgroup_check_permission type=%di:s16 major=%si:u32 minor=%dx:u32 access=%cx:s16",
    "clone kernel_clone flags=+0(%di):x64",
    "unshare ksys_unshare flags=%di:x64",
    "socket __sys_socket family=%di:s32",
    "pair __sys_socketpair family=%di:s32",
)
# Three keys are the most that a histogram has.
TRIGGERS = (
    ("rights/call", "hist:keys=nr,comm:size=16384"),
    ("raw_syscalls/sys_enter", "hist:keys=id:size=2048"),
    # CAP_OPT_NOAUDIT is 2: the kernel only wants to know, and goes on without.
    ("rights/cap", "hist:keys=cap,eff.hex,comm:size=2048 if opts == 0 || opts == 4"),
    *(
        (
            "rights/device",
            f"hist:keys=major,minor,comm:size=2048 if type == {number} && access & {bit}",
        )
        for number in (1, 2)
        for bit in (1, 2, 4)
    ),
    ("rights/clone", "hist:keys=flags.hex,comm:size=2048"),
    ("rights/unshare", "hist:keys=flags.hex,comm:size=2048"),
    ("rights/socket", "hist:keys=family,comm:size=2048"),
    ("rights/pair", "hist:keys=family,comm:size=2048"),
)
AUDIT_ARCH_X86_64 = 0xC000003E
NAMESPACES = {
    0x00000080: "time",
    0x00020000: "mnt",
    0x02000000: "cgroup",
    0x04000000: "uts",
    0x08000000: "ipc",
    0x10000000: "user",
    0x20000000: "pid",
    0x40000000: "net",
}
FAMILIES = {1: "unix", 2: "inet", 10: "inet6", 16: "netlink", 17: "packet", 40: "vsock"}
ACCESS = {"1": "mknod", "2": "read", "4": "write"}

_ENTRY = re.compile(r"^\{ (.+?) *\} hitcount: +([0-9]+)")
_KEY = re.compile(r"(?:^|, )([a-z]+): +")
_DROPPED = re.compile(r"Dropped: ([0-9]+)")


def record() -> None:
    """Until it is ended. What is counted stays in the kernel."""
    if not (TRACING / "kprobe_events").exists():
        subprocess.run(["mount", "-t", "tracefs", "tracefs", TRACING], check=True)
    for probe in PROBES:
        add(TRACING / "kprobe_events", f"p:rights/{probe} comm=$comm")
    INSTANCE.mkdir()
    (INSTANCE / "options" / "event-fork").write_text("1")
    (INSTANCE / "set_event_pid").write_text(str(NOBODY))
    for event, trigger in TRIGGERS:
        add(INSTANCE / "events" / event / "trigger", trigger)
    PLACE.mkdir(mode=0o700)
    for path in (ASKING, GO):
        os.mkfifo(path, 0o600)
    # Open for writing too: so it has no end when one that asked has gone.
    with open(os.open(ASKING, os.O_RDWR)) as asking:
        for line in asking:
            follow(int(line))


def add(path: Path, line: str) -> None:
    """By hand: these files have no position, which Python's want to know."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def follow(pid: int) -> None:
    """Count for it and for what it starts, and let it go on."""
    add(INSTANCE / "set_event_pid", str(pid))
    while os.path.exists(f"/proc/{pid}"):
        try:
            go = os.open(GO, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # ENXIO: it does not wait there yet
            time.sleep(0.005)
            continue
        try:
            os.write(go, b"go\n")
        except BrokenPipeError:  # killed meanwhile
            continue
        finally:
            os.close(go)
        return


# --- what was counted ---


def entries(event: str) -> Iterator[tuple[str, dict[str, str], int]]:
    """Of each histogram of an event: its filter, the keys and how often."""
    condition = ""
    for line in (INSTANCE / "events" / event / "hist").read_text().splitlines():
        if line.startswith("# trigger info: "):
            condition = line.partition(" if ")[2].partition(" [")[0]
        elif dropped := _DROPPED.search(line):
            if int(dropped[1]):
                sys.exit(f"{event}: {dropped[1]} entries had no room")
        elif entry := _ENTRY.match(line):
            parts = _KEY.split(entry[1])[1:]
            keys = {name: value.strip() for name, value in zip(parts[::2], parts[1::2], strict=True)}
            if keys.get("comm") != "sh":  # the wait before the helper begins
                yield condition, keys, int(entry[2])


def who(keys: dict[str, str]) -> str:
    """The program, or what its thread calls itself, without a number."""
    return re.sub(r"[ _-]*[0-9]*$", "", keys["comm"]).replace(" ", "_")


def bounding_set() -> int:
    """What the unit's processes have of Linux capabilities, when they have any."""
    shown = subprocess.run(
        ["systemctl", "show", "-P", "CapabilityBoundingSet", UNIT],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return sum(1 << capabilities().index(name.removeprefix("cap_")) for name in shown.split())


@functools.cache
def capabilities() -> list[str]:
    """Their names, by number."""
    library = ctypes.CDLL("libcap.so.2")
    library.cap_to_name.restype = ctypes.c_char_p
    return [library.cap_to_name(number).decode().removeprefix("cap_") for number in range(64)]


def call_names() -> dict[int, str]:
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_syscall_resolve_num_arch.argtypes = [ctypes.c_uint32, ctypes.c_int]
    library.seccomp_syscall_resolve_num_arch.restype = ctypes.c_char_p
    named = ((nr, library.seccomp_syscall_resolve_num_arch(AUDIT_ARCH_X86_64, nr)) for nr in range(512))
    return {nr: name.decode() for nr, name in named if name}


def device(kind: str, major: str, minor: str) -> str:
    """The driver's name for a block device, the node's for another."""
    if kind == "block":
        rows = (
            line.split() for line in Path("/proc/devices").read_text().partition("Block")[2].splitlines()
        )
        return next((row[1] for row in rows if row and row[0] == major), f"{major}:*")
    try:
        said = Path(f"/sys/dev/char/{major}:{minor}/uevent").read_text()
    except OSError:
        return f"{major}:{minor}"
    return dict(line.split("=") for line in said.splitlines())["DEVNAME"]


def facts() -> Counter[str]:
    found: Counter[str] = Counter()
    names, judged = call_names(), Counter[int]()
    for _, keys, count in entries("rights/call"):
        judged[int(keys["nr"])] += count
        found[f"call {who(keys)} {names.get(int(keys['nr']), keys['nr'])}"] += count
    passed = {int(keys["id"]): count for _, keys, count in entries("raw_syscalls/sys_enter")}
    for nr, count in judged.items():
        if count > passed.get(nr, 0):
            found[f"refused-call {names.get(nr, nr)}"] += count - passed.get(nr, 0)
    bounded = bounding_set()
    for _, keys, count in entries("rights/cap"):
        number, effective = int(keys["cap"]), int(keys["eff"], 16)
        if effective not in (0, bounded):
            sys.exit(f"{effective:x} are not the unit's Linux capabilities: struct cred of another kernel")
        kind = "capability" if effective >> number & 1 else "refused-capability"
        found[f"{kind} {who(keys)} {capabilities()[number]}"] += count
    for condition, keys, count in entries("rights/device"):
        kind = "block" if "type == 1" in condition else "char"
        name = device(kind, keys["major"], keys["minor"])
        found[f"device {who(keys)} {kind}-{name} {ACCESS[condition.rpartition(' ')[2]]}"] += count
    for event in ("rights/clone", "rights/unshare"):
        for _, keys, count in entries(event):
            for bit, name in NAMESPACES.items():
                if int(keys["flags"], 16) & bit:
                    found[f"namespace {who(keys)} {name}"] += count
    for event in ("rights/socket", "rights/pair"):
        for _, keys, count in entries(event):
            family = int(keys["family"])
            found[f"family {who(keys)} {FAMILIES.get(family, family)}"] += count
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["record"]:
        record()
    else:
        sys.stdout.writelines(f"{fact} {count}\n" for fact, count in sorted(facts().items()))
