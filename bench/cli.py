# SPDX-License-Identifier: MIT
"""The whole time of short commands, natively, beside the docker client's shortest and a bare Python.

Every command is a process of its own, by turns; `vm list` asks a real daemon over its socket. Processor time
is told besides: on a busy machine it says more of the command than the clock does.
"""

from __future__ import annotations

import asyncio
import resource
import shutil
import sys
import time
from typing import Final

from bench import host, report, served

ROUNDS: Final = 30
VMS: Final = 3
COMMANDS: Final = {
    "banger --help": ("--help",),
    "banger vm list": ("vm", "list"),
    "completion of a VM's name": (),
}
COMPLETION: Final = {
    "_BANGER_COMPLETE": "bash_complete",
    "COMP_WORDS": "banger vm stop ",
    "COMP_CWORD": "3",
}


def run(_: host.Host) -> report.Report:
    return asyncio.run(measure(rounds=ROUNDS))


async def measure(*, rounds: int) -> report.Report:
    docker = shutil.which("docker")
    python = (sys.executable, "-c", "pass")
    took: dict[str, list[float]] = {}
    used: dict[str, list[float]] = {}
    async with served.running() as (daemon, socket):
        for number in range(VMS):
            await daemon.start(f"vm-{number}")
        plain, banger = served.environment(socket), served.program(socket.parent)
        commands = {
            what: ((banger, *words), plain if words else plain | COMPLETION)
            for what, words in COMMANDS.items()
        }
        commands["python"] = (python, plain)
        if docker:
            commands["docker"] = ((docker, "--version"), plain)
        for _ in range(rounds + 1):
            for what, (argv, env) in commands.items():
                began, before = time.perf_counter(), _used_ms()
                await served.run(*argv, env=env)
                took.setdefault(what, []).append((time.perf_counter() - began) * 1000)
                used.setdefault(what, []).append(_used_ms() - before)
    medians = {what: report.median(times[1:]) for what, times in took.items()}
    processor = {what: report.median(times[1:]) for what, times in used.items()}
    return report.Report(
        name="cli",
        rival="`docker --version`" if docker else "nothing: no docker client is installed",
        rows=tuple(
            report.Row(what, medians[what], "ms", medians.get("docker"), "≤ 1.0") for what in COMMANDS
        ),
        notes=(
            f"n = {rounds}; bare `python3 -c pass`: {medians['python']:.1f} ms; in units of it (aim ≤ 5): "
            + ", ".join(f"{what} {medians[what] / medians['python']:.2f}" for what in COMMANDS),
            "processor time: "
            + ", ".join(
                f"{what} {spent:.1f} ms ({spent / processor['python']:.2f})"
                for what, spent in processor.items()
            ),
        ),
    )


def _used_ms() -> float:
    """By the processes that ended so far."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (found.ru_utime + found.ru_stime) * 1000
