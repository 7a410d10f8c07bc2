# SPDX-License-Identifier: MIT
"""Runs on the lab's host as root: a random walk of operations and kills, judged after each kill.

`python3 crash_walk.py SEED FIRST END AFTER IMAGE...` does the kills FIRST to END - 1, with VMs of the
last of all the images that there are; AFTER is the kill before these when it was the host's, else -1.
What is drawn for a kill follows from the seed and its number alone, whatever was so before. It speaks to
the daemon's socket itself: starting `banger` takes a second here. Prints a line for each kill, and ends
with status 1 at the first that is not survived; with POWER when the host is to die next, which is for
whoever runs this.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

API = "/run/banger/bangerd.sock"
CGROUPS = "/sys/fs/cgroup/banger.slice/banger-vms.service"
DISKS = "/var/lib/banger/vms"
JAILS = "/var/lib/banger-root/jails/firecracker"
REPOSITORY = "/root/walked"
NAMES = ("one", "two")
COPY = "copy"
VICTIMS = (("daemon",), ("helper",), ("daemon", "helper"), ("vmm",))
POWER = 75
EVERY_PROOF = 5
EVERY_POWER = 50
BACK_WITHIN_S = 480
GONE_WITHIN_S = 240
TRUE_WITHIN_S = 240
IDLE_WITHIN_S = 360
UP_WITHIN_S = 480
CLIENT_WITHIN_S = 480
IMAGES_SHARE = 0.1
CANCELLED = 0.75
LONGEST_WAIT_S = 2.5
SIZES = {"vcpus": 1, "memory_mib": 64, "disk_size_mib": 16}


class Draws(NamedTuple):
    """All that chance says about one kill, each from 0 to 1."""

    name: float
    image: float
    act: float
    wait: float
    victims: float
    cancel: float

    @classmethod
    def of(cls, seed: int, number: int) -> Draws:
        dice = random.Random(f"{seed} {number}")
        return cls(*(dice.random() for _ in cls._fields))


def pick(draw: float, among: Sequence[Any]) -> Any:
    return among[int(draw * len(among))]


def ask(method: str, path: str, body: object = None, timeout_s: float = 120) -> Any:
    connection = http.client.HTTPConnection("banger", timeout=timeout_s)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(timeout_s)
    try:
        connection.sock.connect(API)
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
        return json.loads(connection.getresponse().read() or b"null")
    finally:
        connection.close()


def unit_pid(unit: str) -> int:
    shown = subprocess.run(["systemctl", "show", "-P", "MainPID", unit], capture_output=True, check=True)
    return int(shown.stdout)


def vmm_pids() -> dict[str, list[int]]:
    """Of each VM's cgroup, which root alone can fill: what really runs, whatever anybody says."""
    found = {}
    for name in entries(CGROUPS):
        path = f"{CGROUPS}/{name}/cgroup.procs"
        if len(name) == 12 and os.path.exists(path):
            with open(path) as procs:
                found[name] = [int(line) for line in procs.read().split()]
    return {name: pids for name, pids in found.items() if pids}


def kill(victims: tuple[str, ...]) -> int:
    """All at once, as far as that goes; returns whom it met, once these are gone.

    Emulated, a VMM takes seconds to die, and as long as it is there it runs by everybody's word.
    """
    pids: list[int] = []
    for victim in victims:
        if victim == "vmm":
            pids += [pid for pids in vmm_pids().values() for pid in pids]
        else:
            pids.append(unit_pid("bangerd" if victim == "daemon" else "bangerd-root"))
    met = [pid for pid in pids if pid > 0]
    for pid in met:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
    until("the killed", GONE_WITHIN_S, lambda: (f"{left} go on" if (left := remaining(met)) else "", None))
    return len(met)


def remaining(pids: Sequence[int]) -> list[int]:
    """Those that are more than a name; and whoever has a thread left in a VM's cgroup."""
    inside = {pid for of in vmm_pids().values() for pid in of}
    states = {pid: read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[:1] for pid in pids}
    return [pid for pid, state in states.items() if pid in inside or state not in ([], ["Z"], ["X"])]


def until(what: str, deadline_s: float, look: Callable[[], tuple[str, Any]]) -> Any:
    """What `look` returns, once it does not raise and finds nothing wrong."""
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            wrong, value = look()
        except (OSError, http.client.HTTPException, ValueError) as error:
            wrong, value = repr(error), None
        if not wrong:
            return value
        if time.monotonic() > deadline:
            sys.exit(f"{what}: {wrong}")
        time.sleep(0.1)


# --- what is so ---


def judged() -> tuple[str, Any]:
    """Everything has an owner, and each row says what is so, by the daemon's word and by the kernel's."""
    things = ask("GET", "/v1/inventory")["things"]
    left = [each for each in things if not each["owner"] and not each["foreign"]]
    if left:
        return f"nobody owns {left}", None
    vms = ask("GET", "/v1/vms")
    running = {vm["id"] for vm in vms if vm["state"] == "running"}
    # A VM whose agent is silent is shown as an error, and its VMM runs.
    silent = {vm["id"] for vm in vms if vm["state"] == "error" and vm["pid"]}
    alive = set(vmm_pids())
    if not running <= alive <= running | silent:
        return f"rows: {running}, really: {alive}", None
    seen = {of for of in had_while_running() if of[1] not in running | silent}
    seen |= {("disks", name) for name in entries(DISKS) if name not in {vm["id"] for vm in vms}}
    return (f"the daemon is content, and there is {sorted(seen)}" if seen else ""), vms


def had_while_running() -> set[tuple[str, str]]:
    """What only a VM that runs has, and whose it is, without asking banger."""
    links = {
        ("tap", read(path).removeprefix("banger/")) for path in Path("/sys/class/net").glob("*/ifalias")
    }
    devices = {("device", read(path)) for path in Path("/sys/block").glob("dm-*/dm/name")}
    files = {("loop", read(path)) for path in Path("/sys/block").glob("loop*/loop/backing_file")}
    return {
        *((kind, text) for kind, text in links if is_id(text)),
        *(
            (kind, text.removeprefix("fc-rootfs-"))
            for kind, text in devices
            if text.startswith("fc-rootfs-")
        ),
        *((kind, text[len(DISKS) + 1 :][:12]) for kind, text in files if text.startswith(f"{DISKS}/")),
        *(("jail", name) for name in entries(JAILS)),
        *(("cgroup", name) for name in entries(CGROUPS) if is_id(name)),
    }


def entries(directory: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return os.listdir(directory)
    return []


def read(path: Path) -> str:
    """Nothing of what has just gone."""
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def is_id(text: str) -> bool:
    return len(text) == 12 and not text.strip("0123456789abcdef")


def idle() -> tuple[str, Any]:
    """Nothing is under way; and what has ended has a reason that somebody thought of."""
    operations = ask("GET", "/v1/operations")
    for each in operations:
        if (each.get("error") or {}).get("message", "").startswith("unexpected error"):
            sys.exit(f"{each['kind']} {each['target']}: {each['error']}")
    busy = [each["kind"] for each in operations if each["status"] == "running"]
    return f"{busy} under way" if busy else "", None


# --- what is done ---


class Client:
    """The one `banger` that is under way, whatever becomes of it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self, *words: str) -> None:
        self._process = subprocess.Popen(
            ["banger", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def ended(self) -> tuple[str, Any]:
        if self._process is None or self._process.poll() is not None:
            return "", None
        return f"{self._process.args!r} hangs", None


def begin(draws: Draws, name: str, vms: Any, image: str, client: Client) -> str:
    """An operation that makes sense now, mostly on this VM; not waited for."""
    states = {vm["name"]: vm["state"] for vm in vms}
    if draws.image < IMAGES_SHARE:
        ask("DELETE", f"/v1/images/{COPY}")  # or there is none
        act, answer = f"promote {COPY}", ask("POST", f"/v1/images/{image}/promote", {"name": COPY})
    elif name not in states:
        act, answer = f"create {name}", ask("POST", "/v1/vms", {"name": name, "image": image, **SIZES})
    else:
        running = ("stop", "kill", "restart", "delete", "prepare")
        verb = pick(draws.act, running if states[name] == "running" else ("start", "start", "delete"))
        act = f"{verb} {name}"
        if verb == "prepare":
            client.begin("vm", "workspace", "prepare", name, REPOSITORY, "--mode", "full-copy", "--discard")
            return act
        path = f"/v1/vms/{name}" if verb == "delete" else f"/v1/vms/{name}/{verb}"
        answer = ask("DELETE" if verb == "delete" else "POST", path)
    if "status" not in answer:
        sys.exit(f"{act} is refused: {answer}")
    return act


def cancel() -> None:
    """A boot takes long here, and is not what this is about: those that are proven get theirs."""
    for each in ask("GET", "/v1/operations"):
        if each["status"] == "running":
            ask("DELETE", f"/v1/operations/{each['id']}", timeout_s=240)


def bring_up(where: str, name: str, image: str) -> None:
    """Whatever was before: now it is asked for and nobody kills, so it has to succeed."""

    def settled() -> tuple[str, Any]:
        vm = next((vm for vm in ask("GET", "/v1/vms") if vm["name"] == name), {"state": "", "pid": 0})
        return "it is silent" if vm["state"] == "error" and vm["pid"] else "", vm["state"]

    state = until(f"{where}: {name}", UP_WITHIN_S, settled)
    if state == "running":
        return
    if state:
        answer = ask("POST", f"/v1/vms/{name}/start")
    else:
        answer = ask("POST", "/v1/vms", {"name": name, "image": image, **SIZES})

    def ended() -> tuple[str, Any]:
        operation = ask("GET", f"/v1/operations/{answer['id']}")
        return "it has not ended" if operation["status"] == "running" else "", operation

    if "status" not in answer:
        sys.exit(f"{where}: bringing up {name} is refused: {answer}")
    operation = until(f"{where}: bringing up {name}", UP_WITHIN_S, ended)
    if operation["status"] != "succeeded":
        sys.exit(f"{where}: {name} does not start any more: {operation.get('error')}")


def inside(where: str, name: str, script: str) -> str:
    argv = ["banger", "vm", "exec", name, "--", "sh", "-c", script]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=CLIENT_WITHIN_S)
    if done.returncode:
        sys.exit(f"{where}: in {name}, {script!r}: {done.stderr.decode()}")
    return done.stdout.decode()


# --- the walk ---


class Walk:
    def __init__(self, seed: int, images: Sequence[str]) -> None:
        self._seed = seed
        self._images = images
        self._image = images[-1]
        self._client = Client()
        self._met = 0

    def go(self, first: int, end: int, after: int) -> bool:
        """False when the host is next to die."""
        before = f"before kill {first}"
        vms = self._settle(before)
        if after >= 0:
            vms = self._proven(before, after)
        for number in range(first, end):
            draws = Draws.of(self._seed, number)
            act = self._begin(number, draws, vms)
            waited = draws.wait * LONGEST_WAIT_S
            time.sleep(waited)
            where = f"kill {number}: {act}; after {waited:.2f} s "
            if is_power(number):
                print(where + "the host", flush=True)
                return False
            victims = pick(draws.victims, VICTIMS if vmm_pids() else VICTIMS[:-1])
            count = kill(victims)
            self._met += bool(count)
            where += f"{'+'.join(victims)} ({count} processes)"
            print(where, flush=True)
            vms = self._settle(where, cancelling=draws.cancel < CANCELLED)
            if is_proof(number):
                vms = self._proven(where, number)
        self._leave_nothing(vms)
        print(f"{self._met} of {end - first} kills met somebody")
        if self._met * 2 < end - first:
            sys.exit("too few kills met somebody")
        return True

    def _begin(self, number: int, draws: Draws, vms: Any) -> str:
        """Where something is to be proven: on the other VM, when this one has what is to last."""
        name = pick(draws.name, NAMES)
        if is_proof(number):
            where, text = f"kill {number}", str(number)
            bring_up(where, name, self._image)
            # On both disks, flushed.
            inside(where, name, f"echo {text} > /root/kept; echo {text} > /kept; sync")
            name = next(other for other in NAMES if other != name)
        return begin(draws, name, vms, self._image, self._client)

    def _proven(self, where: str, number: int) -> Any:
        """The next operation works, and what was flushed before this kill is there; returns the rows."""
        name = pick(Draws.of(self._seed, number).name, NAMES)
        bring_up(where, name, self._image)
        found = inside(where, name, "cat /root/kept /kept")
        if found != f"{number}\n{number}\n":
            sys.exit(f"{where}: {name} had {number} on both its disks, and has {found!r}")
        return self._settle(where)

    def _settle(self, where: str, *, cancelling: bool = False) -> Any:
        """The rows, when all is quiet and true again."""
        until(where, BACK_WITHIN_S, lambda: ("", ask("GET", "/v1/info")))
        if cancelling:
            cancel()
        until(where, IDLE_WITHIN_S, idle)
        until(where, CLIENT_WITHIN_S, self._client.ended)
        images = sorted({image["name"] for image in ask("GET", "/v1/images")} - {COPY})
        if images != sorted(self._images):
            sys.exit(f"{where}: the images are {images}")
        return until(where, TRUE_WITHIN_S, judged)

    def _leave_nothing(self, vms: Any) -> None:
        for vm in vms:
            ask("DELETE", f"/v1/vms/{vm['name']}")
        until("deleting", TRUE_WITHIN_S, idle)
        ask("DELETE", f"/v1/images/{COPY}")
        left = until("at the end", TRUE_WITHIN_S, judged)
        if left or had_while_running():
            sys.exit(f"left over: {left}, {had_while_running()}")


def is_proof(number: int) -> bool:
    return number % EVERY_PROOF == EVERY_PROOF - 1


def is_power(number: int) -> bool:
    """Seldom: a boot of the host takes as long as ten kills. Each is a proof as well."""
    return number % EVERY_POWER == EVERY_POWER - 1


def main(numbers: Sequence[int], images: Sequence[str]) -> int:
    seed, first, end, after = numbers
    subprocess.run(["git", "init", "-q", REPOSITORY], check=True)
    Path(REPOSITORY, "file").write_text("walked\n" * 10_000)
    identity = ("-c", "user.name=walker", "-c", "user.email=walker@example.com")
    for words in (["add", "file"], [*identity, "commit", "-q", "--allow-empty", "-m", "walked"]):
        subprocess.run(["git", "-C", REPOSITORY, *words], check=True)
    return 0 if Walk(seed, images).go(first, end, after) else POWER


if __name__ == "__main__":
    sys.exit(main([int(word) for word in sys.argv[1:5]], sys.argv[5:]))
