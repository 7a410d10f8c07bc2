# SPDX-License-Identifier: MIT
"""When time will stop a VM, as text."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

from banger.cli import render
from banger.contract import resources


def next_end(vm: resources.Vm) -> str:
    """For a column: how long until time stops it; empty when it does not."""
    moments = [(vm.idle_stop_at, " (idle)"), (vm.ttl_ends_at, "")]
    known = [(moment, note) for moment, note in moments if moment is not None]
    if not known:
        return ""
    moment, note = min(known)
    return f"in {render.until(moment)}{note}"


def extended(vm: resources.Vm) -> str:
    """What it came to, of a VM that was given more time."""
    if end := next_end(vm):
        return f"{vm.name} stops {end}"
    if vm.idle_stop_s:
        return f"{vm.name} is in use now: it stops {render.whole_span(vm.idle_stop_s)} after its last use"
    no_limit = f"{vm.name} has no time limit, so nothing was changed: it runs until it is stopped"
    return f"{no_limit}; `banger vm set {vm.name} --ttl 8h` gives it one"


def facts(vm: resources.Vm) -> Iterator[tuple[str, str]]:
    """One for each limit: what it is, and its next moment while the VM runs."""
    if vm.idle_stop_s:
        unused = "in use now" if vm.has_vmm else "when it runs"
        yield (
            "idle stop",
            f"after {render.whole_span(vm.idle_stop_s)} without use, {_moment(vm.idle_stop_at, unused)}",
        )
    if vm.ttl_s:
        yield (
            "time to live",
            f"{render.whole_span(vm.ttl_s)}, {_moment(vm.ttl_ends_at, 'from its next start')}",
        )


def _moment(moment: datetime.datetime | None, otherwise: str) -> str:
    if moment is None:
        return otherwise
    return f"at {moment:%Y-%m-%d %H:%M:%S} UTC, in {render.until(moment)}"
