# SPDX-License-Identifier: MIT
"""Resident memory, in the lab: the services and the agent; Firecracker under banger beside a bare one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from bench import host, report

PROCESSES: Final = {
    "bangerd": "bangerd",
    "bangerd-root": "bangerd-root",
    "log writer": "log writer, for each VM",
    "agent": "agent, in the guest",
}


def run(machine: host.Host) -> report.Report:
    return summed_up(next(iter(machine.measure("memory"))))


def summed_up(found: Mapping[str, Any]) -> report.Report:
    """What bench/inside/memory.py printed, one VM running."""
    rows = [
        report.Row(f"{what}, {kind.upper()}", found[name][kind] / 1024, "MiB")
        for name, what in PROCESSES.items()
        for kind in ("pss", "rss")
    ]
    ours, theirs = found["firecracker"], found["bare firecracker"]
    for kind, what in (("own", "RSS without the guest's memory"), ("pss", "PSS"), ("rss", "RSS")):
        rows.append(report.Row(f"Firecracker, {what}", ours[kind] / 1024, "MiB", theirs[kind] / 1024))
    return report.Report(
        name="memory", rival="a bare Firecracker that boots the same kernel and image", rows=tuple(rows)
    )
