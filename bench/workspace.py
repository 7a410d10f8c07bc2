# SPDX-License-Identifier: MIT
"""A repository of 10,000 files into a guest, in the lab, beside git and tar over the same `vm exec`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from bench import host, report

FILES: Final = 10_000
ROUNDS: Final = 3


def run(machine: host.Host) -> report.Report:
    return summed_up(tuple(machine.measure("repository", str(FILES), str(ROUNDS))))


def summed_up(rounds: Sequence[Mapping[str, Any]]) -> report.Report:
    """The medians of what bench/inside/repository.py printed."""
    rows = []
    for which, what in (("first", "the first time"), ("again", "again, ten files changed")):
        ours, theirs = (report.median(found[which][who] for found in rounds) for who in (0, 1))
        rows.append(report.Row(what, ours, "s", theirs, "≤ 1" if which == "first" else ""))
    return report.Report(
        name="workspace",
        rival="a bundle that git clones in the guest, then a tar of changed files, each through `vm exec`",
        rows=tuple(rows),
        notes=(f"n = {len(rounds)}; {FILES} files; the CLI's own start is in both",),
    )
