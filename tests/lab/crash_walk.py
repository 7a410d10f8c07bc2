# SPDX-License-Identifier: MIT
"""Runs on the lab's host as root: a random walk of operations and kills, judged after each kill.

`python3 crash_walk.py SEED KILLS IMAGE`. It speaks to the daemon's socket itself: starting `banger` takes
a second here. Prints a line for each kill, and ends with status 1 at the first that is not survived.
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
from collections.abc import Callable
from typing import Any

API = "/run/banger/bangerd.sock"
CGROUPS = "/sys/fs/cgroup/banger.slice/banger-vms.service"
NAMES = ("one", "two")
VICTIMS = (("daemon",), ("helper",), ("daemon", "helper"), ("vmm",))
BACK_WITHIN_S = 40
TRUE_WITHIN_S = 40
IDLE_WITHIN_S = 90
CANCELLED = 0.5
WORK_S = (0.0, 2.5)
SIZES = {"memory_mib": 64, "disk_size_mib": 16}


def ask(method: str, path: str, body: object = None, timeout_s: float = 30) -> Any:
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
    for name in os.listdir(CGROUPS):
        path = f"{CGROUPS}/{name}/cgroup.procs"
        if len(name) == 12 and os.path.exists(path):
            with open(path) as procs:
                found[name] = [int(line) for line in procs.read().split()]
    return {name: pids for name, pids in found.items() if pids}


def kill(victims: tuple[str, ...]) -> int:
    """All at once, as far as that goes; returns whom it met."""
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
    return len(met)


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


def judged() -> tuple[str, Any]:
    """Everything has an owner, and each row says what is so."""
    things = ask("GET", "/v1/inventory")["things"]
    left = [each for each in things if not each["owner"] and not each["foreign"]]
    if left:
        return f"nobody owns {left}", None
    vms = ask("GET", "/v1/vms")
    running = {vm["id"] for vm in vms if vm["state"] == "running"}
    # A VM whose agent is silent is shown as an error, and its VMM runs.
    silent = {vm["id"] for vm in vms if vm["state"] == "error" and vm["pid"]}
    alive = set(vmm_pids())
    wrong = "" if running <= alive <= running | silent else f"rows: {running}, really: {alive}"
    return wrong, vms


def idle() -> tuple[str, Any]:
    operations = ask("GET", "/v1/operations")
    busy = [each["kind"] for each in operations if each["status"] == "running"]
    return f"{busy} under way" if busy else "", None


def begin(dice: random.Random, vms: Any, image: str) -> str:
    """An operation that makes sense now, on one of the names; not waited for."""
    states = {vm["name"]: vm["state"] for vm in vms}
    name = dice.choice(NAMES)
    if name not in states:
        act, answer = "create", ask("POST", "/v1/vms", {"name": name, "image": image, **SIZES})
    else:
        running = ("stop", "kill", "restart", "delete")
        act = dice.choice(running if states[name] == "running" else ("start", "start", "delete"))
        path = f"/v1/vms/{name}" if act == "delete" else f"/v1/vms/{name}/{act}"
        answer = ask("DELETE" if act == "delete" else "POST", path)
    return f"{act} {name}" if "status" in answer else f"{act} {name} refused: {answer['message']}"


def cancel() -> None:
    """A boot takes long here, and is not what this is about."""
    for each in ask("GET", "/v1/operations"):
        if each["status"] == "running":
            ask("DELETE", f"/v1/operations/{each['id']}", timeout_s=60)


def walk(seed: int, kills: int, image: str) -> None:
    dice = random.Random(seed)
    vms: Any = []
    met = 0
    for number in range(kills):
        begun = begin(dice, vms, image)
        waited = dice.uniform(*WORK_S)
        time.sleep(waited)
        victims = dice.choice(VICTIMS if vmm_pids() else VICTIMS[:-1])
        count = kill(victims)
        met += bool(count)
        where = f"kill {number}: {begun}; after {waited:.2f} s {'+'.join(victims)} ({count} processes)"
        print(where, flush=True)
        until(where, BACK_WITHIN_S, lambda: ("", ask("GET", "/v1/info")))
        if dice.random() < CANCELLED:
            cancel()
        until(where, IDLE_WITHIN_S, idle)
        vms = until(where, TRUE_WITHIN_S, judged)
    print(f"{met} of {kills} kills met somebody")
    for name in {vm["name"] for vm in vms}:
        ask("DELETE", f"/v1/vms/{name}")
    until("deleting", TRUE_WITHIN_S, idle)
    left = until("at the end", TRUE_WITHIN_S, judged)
    if left or met * 2 < kills:
        sys.exit(f"left over: {left}; {met} of {kills} kills met somebody")


if __name__ == "__main__":
    walk(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
