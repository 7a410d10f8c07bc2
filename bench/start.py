# SPDX-License-Identifier: MIT
"""A first start, in the lab, beside a bare Firecracker that boots the same kernel and image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from bench import host, report

ROUNDS: Final = 24
AIM: Final = "≤ 1.25"
CLOCKS: Final = {
    "boot_s": ("VMM boot: instance start to init", ""),
    "agent_s": ("create to agent", AIM),
    "command_s": ("create to first command returned", ""),
    "process_s": ("whole process: create, `true`, delete", ""),
}
PARTS: Final = {
    "before_boot_s": "of create to agent: before the instance starts",
    "init_to_agent_s": "of create to agent: from init on",
}
_SHOWN_STEPS: Final = 8
Rounds = Sequence[Mapping[str, Any]]


def run(machine: host.Host) -> report.Report:
    return summed_up(tuple(machine.measure("start", str(ROUNDS))))


def summed_up(rounds: Rounds) -> report.Report:
    """The medians of what bench/inside/start.py printed."""
    rows = [_row(rounds, clock, what, aim) for clock, (what, aim) in CLOCKS.items()]
    rows += [_row(rounds, clock, what, "") for clock, what in PARTS.items()]
    smallest = report.median(found["smallest"]["agent_s"] for found in rounds if "smallest" in found)
    rows.append(report.Row("image busybox: create to agent", smallest, "s"))
    agent = [found["banger"]["agent_s"] for found in rounds]
    rival = [found["bare"]["agent_s"] for found in rounds]
    ratios = [one / other for one, other in zip(agent, rival, strict=True)]
    return report.Report(
        name="start",
        rival="a bare Firecracker with tap and vsock, of the same kernel, image and size",
        rows=tuple(rows),
        notes=(
            f"create to agent: {report.spread(agent, 's')}; rival: {report.spread(rival, 's')}",
            f"ratio by round: {report.spread(ratios, '')}; median {report.median(ratios):.2f}",
            f"steps: {_steps(rounds)}",
        ),
    )


def _row(rounds: Rounds, clock: str, what: str, aim: str) -> report.Row:
    ours, theirs = (
        report.median(found[who][clock] for found in rounds if clock in found[who])
        for who in ("banger", "bare")
    )
    return report.Row(what, ours, "s", theirs, aim)


def _steps(rounds: Rounds) -> str:
    """Medians of the longest, in the order they run."""
    names = rounds[0]["banger"]["steps_ms"]
    medians = {name: report.median(found["banger"]["steps_ms"][name] for found in rounds) for name in names}
    shortest = sorted(medians.values(), reverse=True)[:_SHOWN_STEPS][-1]
    return ", ".join(f"{name} {ms:.0f} ms" for name, ms in medians.items() if ms >= shortest)
