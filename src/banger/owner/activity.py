# SPDX-License-Identifier: MIT
"""When somebody last did something with a guest: what `--idle-stop` counts from.

Commands without a terminal, copies and workspaces are activity for as long as they run; terminals, tunnels
and published ports are when bytes go through them. Only what passes the daemon is seen: not what runs in the
guest by itself, nor a connection straight to its address.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from banger.contract import names


class Activity:
    """One VM's. On the monotonic clock: a host that is suspended makes nobody idle."""

    __slots__ = ("_busy", "last_used_s")

    def __init__(self) -> None:
        self._busy = 0
        self.last_used_s = time.monotonic()

    @property
    def is_busy(self) -> bool:
        return self._busy > 0

    @property
    def idle_s(self) -> float:
        return 0.0 if self._busy else time.monotonic() - self.last_used_s

    def touch(self) -> None:
        self.last_used_s = time.monotonic()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            self.touch()


class Activities:
    """Every VM's. A VM that is asked for first begins as one that was just used: idleness starts anew with
    the daemon, so that a VM is stopped later rather than sooner.
    """

    def __init__(self) -> None:
        self._vms: dict[names.VmId, Activity] = {}

    def of(self, vm_id: names.VmId) -> Activity:
        return self._vms.setdefault(vm_id, Activity())

    def forget(self, vm_id: names.VmId) -> None:
        self._vms.pop(vm_id, None)
