# SPDX-License-Identifier: MIT
"""Bytes through `banger vm exec`, in the lab, beside a raw vsock stream of the same VM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from bench import host, report

SIZE_MIB: Final = 256
ROUNDS: Final = 3


def run(machine: host.Host) -> report.Report:
    return summed_up(tuple(machine.measure("transfer", str(SIZE_MIB), str(ROUNDS))))


def summed_up(rounds: Sequence[Mapping[str, Any]]) -> report.Report:
    """The medians of what bench/inside/transfer.py printed."""
    rows = []
    for way, what in (("in", "into the guest"), ("out", "out of the guest")):
        ours, theirs = (report.median(found[way][who] for found in rounds) for who in (0, 1))
        rows.append(report.Row(f"{SIZE_MIB} MiB {what}", ours, "s", theirs))
    return report.Report(
        name="exec",
        rival="a raw vsock stream to a loop of perl in the same guest",
        rows=tuple(rows),
        notes=(f"n = {len(rounds)}; the CLI's own start is in banger's time",),
    )
