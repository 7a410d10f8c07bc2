# SPDX-License-Identifier: MIT
"""Lives of a VM, banger's and a bare Firecracker's by turns; each round is one line of JSON on stdout.

`python -m bench.inside.start ROUNDS`. One more round goes first and is not reported: it fills the caches.
Boots differ more than anything else here, so they need the rounds; whole processes and the smallest image
are taken in every third.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from banger.cli import client
from bench.inside import bare, ours

RUN: Final = (
    "banger", "vm", "run", "--rm", "--kernel", ours.KERNEL, "--vcpu", "1", "--memory", f"{bare.MEMORY_MIB}M",
    "--", "true",
)  # fmt: skip
_OTHERS_EVERY: Final = 3


def main(rounds: int) -> None:
    api = client.Client(ours.API)
    ours.prepare_bare(api)
    lives: dict[str, Callable[[], dict[str, Any]]] = {"bare": _bare, "banger": lambda: _banger(api)}
    for number in range(rounds + 1):
        # Who came second was often slower on a software processor, and why is not known: so they take turns.
        order = sorted(lives, reverse=bool(number % 2))
        found = {who: lives[who]() for who in order}
        if number % _OTHERS_EVERY == 0:
            bare.renew_disk()
            found["bare"]["process_s"] = _timed_s([sys.executable, "-m", "bench.inside.bare"])
            bare.renew_disk()
            found["banger"]["process_s"] = _timed_s(RUN)
            found["smallest"] = _smallest(api)
        if number > 0:
            print(json.dumps(found), flush=True)


def _bare() -> dict[str, Any]:
    began: list[float] = []
    bare.renew_disk()
    times = bare.live(lambda _, inside: began.append(inside.init_began()))
    times.init = began[0]
    return _clocks(times)


def _banger(api: client.Client) -> dict[str, Any]:
    """The instance starts when Firecracker has made its sockets, which ends the step that launches it."""
    bare.renew_disk()  # as before the rival's lives, though nothing here reads it
    times = bare.Times(began=time.time())
    with ours.running(api) as vm:
        times.agent = time.time()
        ours.execute(api, "true")
        times.command = time.time()
        times.init = ours.agent_of(vm).init_began()
    steps = {step.name: step for step in vm.last_start}
    launch, last = steps["firecracker_launch"], steps["persist"]
    ended_ms = last.started_ms + last.elapsed_ms - launch.started_ms - launch.elapsed_ms
    times.instance_start = times.agent - ended_ms / 1000
    return {**_clocks(times), "steps_ms": {name: step.elapsed_ms for name, step in steps.items()}}


def _smallest(api: client.Client) -> dict[str, float]:
    """The smallest image; nobody's rival, and without a tool that says when its init began."""
    began = time.time()
    with ours.running(api, ours.SMALLEST):
        return {"agent_s": time.time() - began}


def _clocks(times: bare.Times) -> dict[str, float]:
    """In seconds, each from its own beginning."""
    return {
        "boot_s": times.init - times.instance_start,
        "agent_s": times.agent - times.began,
        "command_s": times.command - times.began,
        "before_boot_s": times.instance_start - times.began,
        "init_to_agent_s": times.agent - times.init,
    }


def _timed_s(argv: list[str] | tuple[str, ...]) -> float:
    began = time.monotonic()
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


if __name__ == "__main__":
    main(int(sys.argv[1]))
