# SPDX-License-Identifier: MIT
"""Whether the host has the memory for one more VM.

Guests take memory bit by bit and give none back: many start well beside each other and fill the host hours
later, and then the kernel ends one, with the work in it. So a start looks at what all that run may come to.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from banger.contract import errors, names, resources, sizes
from banger.owner import usage
from banger.vm import record

_MIB: Final = 1 << 20


def host_memory_mib() -> int:
    """What this host has, without swap."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _MIB


def _has_mib(vm: record.VmRecord) -> int:
    """Of one whose row is corrupt nothing else says any more how much that is."""
    return usage.limit_mib(vm.id) if isinstance(vm, record.Salvaged) else vm.memory_mib


class Memory:
    """What VMs may have together, in MiB. For the event loop only: nothing comes between look and claim."""

    def __init__(self, total_mib: int, rows: Callable[[], Iterable[record.VmRecord]]) -> None:
        self._total_mib = total_mib
        self._rows = rows
        self._starting: dict[names.VmId, int] = {}

    @contextlib.contextmanager
    def claimed(self, vm: record.VmRecord) -> Iterator[None]:
        """For a start; after it, the row says that the VM runs. Raises UnavailableError without room."""
        self._require_room(vm)
        self._starting[vm.id] = vm.memory_mib
        try:
            yield
        finally:
            del self._starting[vm.id]

    def _require_room(self, vm: record.VmRecord) -> None:
        running = {
            each.id: _has_mib(each) for each in self._rows() if each.state is resources.VmState.RUNNING
        }
        others = running | self._starting
        others.pop(vm.id, None)
        left_mib = self._total_mib - sum(others.values())
        if vm.memory_mib <= left_mib:
            return
        more = "or let VMs have more than this host: `vms_memory_mib` in /etc/banger/config.toml"
        if not others:
            raise errors.UnavailableError(
                f"{vm.name} has {vm.memory_mib} MiB of memory, "
                f"and VMs here have {self._total_mib} MiB together",
                hint=f"`banger vm set {vm.name} --memory {left_mib}M` gives it less; {more}",
            )
        raise errors.UnavailableError(
            f"no memory for {vm.name}: it has {vm.memory_mib} MiB, and of the {self._total_mib} MiB for VMs "
            f"{sizes.counted(len(others), 'VM')} may use {sum(others.values())} MiB",
            hint=f"stop one (`banger vm list`), give this one less, {more}",
        )
