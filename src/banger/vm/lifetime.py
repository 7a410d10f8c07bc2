# SPDX-License-Identifier: MIT
"""How long a VM runs: its time to live, and how long it may be idle. Pure, but for reading a clock.

A time to live is measured on CLOCK_BOOTTIME, which counts while the host is suspended and which nobody sets.
A row may keep it: a VM never outlives the boot of its host.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

import msgspec

from banger.contract import errors, resources, sizes
from banger.vm import record

_LEAD_S: Final = 300.0
_SPANS: Final = ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


@dataclass(frozen=True, slots=True)
class End:
    """One of the two ways in which time ends a run."""

    limit_s: int
    left_s: float
    """Below 0 when it is over."""
    why: str
    """After the VM's name, such as `had been idle for 30 minutes`."""

    @property
    def lead_s(self) -> float:
        """So long before its end, and never for less, it is warned about."""
        return min(_LEAD_S, self.limit_s / 4)


def now_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def begun(vm: record.VmRecord) -> record.VmRecord:
    """Its time to live begins now."""
    return msgspec.structs.replace(vm, ttl_ends_s=now_s() + vm.ttl_s if vm.ttl_s else 0.0)


def limited(vm: record.VmRecord, *, idle_stop_s: int | None, ttl_s: int | None) -> record.VmRecord:
    """With other limits; None leaves one as it is, 0 takes it away. A new time to live begins now."""
    if idle_stop_s is not None:
        vm = msgspec.structs.replace(vm, idle_stop_s=idle_stop_s)
    return vm if ttl_s is None else begun(msgspec.structs.replace(vm, ttl_s=ttl_s))


def extended(vm: record.VmRecord, by_s: int | None) -> record.VmRecord:
    """Lives `by_s` longer than it would; without it, as long from now as at its start."""
    if by_s is None:
        return begun(vm)
    if not vm.ttl_s:
        anew = "without --by its idleness begins anew; " if vm.idle_stop_s else ""
        raise errors.BadRequestError(
            f"{vm.name} has no time to live that could be longer",
            hint=f"{anew}`banger vm set {vm.name} --ttl 2h` gives it one, from now on",
        )
    return msgspec.structs.replace(vm, ttl_ends_s=max(vm.ttl_ends_s, now_s()) + by_s)


def ends(vm: record.VmRecord, idle_s: float | None) -> list[End]:
    """`idle_s`: None while it is in use."""
    found = []
    if vm.state is resources.VmState.RUNNING and vm.ttl_s:
        found.append(End(vm.ttl_s, vm.ttl_ends_s - now_s(), f"had lived for its {span(vm.ttl_s)}"))
    if vm.state is resources.VmState.RUNNING and vm.idle_stop_s and idle_s is not None:
        left_s = vm.idle_stop_s - idle_s
        found.append(End(vm.idle_stop_s, left_s, f"had been idle for {span(vm.idle_stop_s)}"))
    return found


def span(seconds: float) -> str:
    """`90 minutes`, `2 hours`: the largest unit in which it is a whole number."""
    whole = max(1, round(seconds))
    size, unit = next((size, unit) for size, unit in _SPANS if whole % size == 0)
    return sizes.counted(whole // size, unit)
