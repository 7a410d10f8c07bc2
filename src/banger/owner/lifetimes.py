# SPDX-License-Identifier: MIT
"""Stops VMs whose time is over: idle for as long as they may be, or at the end of their time to live.

Never without a warning at least its lead before: in the log, and in the commands that run in the VM. A
daemon that starts, or a host that wakes up, finds times that are over already and warns first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final

from banger.contract import names
from banger.owner import activity
from banger.vm import lifetime, record

_log = logging.getLogger(__name__)

_LOOK_S: Final = 1.0
_KEPT_NOTICES: Final = 16
IsDue = Callable[[record.VmRecord], bool]


class Notices:
    """What the users of a VM are told while they are connected. One who does not listen loses the oldest."""

    def __init__(self) -> None:
        self._listeners: dict[names.VmId, set[asyncio.Queue[str]]] = {}

    @contextlib.contextmanager
    def heard(self, vm_id: names.VmId) -> Iterator[asyncio.Queue[str]]:
        queue: asyncio.Queue[str] = asyncio.Queue(_KEPT_NOTICES)
        listeners = self._listeners.setdefault(vm_id, set())
        listeners.add(queue)
        try:
            yield queue
        finally:
            listeners.discard(queue)
            if not listeners:
                self._listeners.pop(vm_id, None)

    def tell(self, vm_id: names.VmId, text: str) -> None:
        for queue in self._listeners.get(vm_id, ()):
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(text)


class Lifetimes:
    """`look` is one look at all that run; `start` looks every second."""

    def __init__(
        self,
        running: Callable[[], Sequence[record.VmRecord]],
        activities: activity.Activities,
        notices: Notices,
        stop: Callable[[record.VmRecord, str, IsDue], Awaitable[None]],
    ) -> None:
        """`stop` ends a VM, with the reason, if it is still due when it comes to it."""
        self._running = running
        self._activities = activities
        self._notices = notices
        self._stop = stop
        self._warned: dict[tuple[names.VmId, str], float] = {}
        self._stopping: dict[names.VmId, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="lifetimes")

    async def close(self) -> None:
        tasks = [task for task in (self._task, *self._stopping.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def ends(self, vm: record.VmRecord) -> list[lifetime.End]:
        used = self._activities.of(vm.id)
        return lifetime.ends(vm, None if used.is_busy else used.idle_s)

    def look(self) -> None:
        """Warns of what comes, stops what is over and was warned about."""
        warned: dict[tuple[names.VmId, str], float] = {}
        for vm in self._running():
            if vm.id in self._stopping:
                continue
            for end in self._near(vm):
                key = (vm.id, end.why)
                warned[key] = self._warned.get(key) or self._warn(vm, end)
                if end.left_s <= 0 and time.monotonic() - warned[key] >= end.lead_s:
                    self._end(vm, end)
                    break
        self._warned = warned

    def _near(self, vm: record.VmRecord) -> list[lifetime.End]:
        return [end for end in self.ends(vm) if end.left_s <= end.lead_s]

    def _warn(self, vm: record.VmRecord, end: lifetime.End) -> float:
        in_s = max(end.left_s, end.lead_s)
        _log.warning("vm stops soon", extra={"vm": vm.id, "why": end.why, "in_s": round(in_s)})
        when = lifetime.span(60 * round(in_s / 60) if in_s >= 120 else in_s)
        text = f"{vm.name} stops in {when}: it will then have {end.why.removeprefix('had ')}"
        self._notices.tell(vm.id, f"{text}; `banger vm extend {vm.name}` keeps it running")
        return time.monotonic()

    def _end(self, vm: record.VmRecord, end: lifetime.End) -> None:
        """In a task: a guest that is slow to stop keeps no other from being looked at."""
        self._notices.tell(vm.id, f"{vm.name} is being stopped: it {end.why}")
        task = asyncio.create_task(self._stop_one(vm, end), name=f"end-{vm.id}")
        self._stopping[vm.id] = task
        task.add_done_callback(lambda _: self._stopping.pop(vm.id, None))

    async def _stop_one(self, vm: record.VmRecord, end: lifetime.End) -> None:
        try:
            await self._stop(vm, end.why, self._is_due)
        except Exception as error:
            _log.error("could not stop a vm", extra={"vm": vm.id, "why": end.why, "error": str(error)})

    def _is_due(self, vm: record.VmRecord) -> bool:
        return any(end.left_s <= 0 for end in self.ends(vm))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                self.look()
            except Exception as error:
                # Whatever it was, such as a disk: this task ends with the daemon alone.
                _log.error("lifetimes could not be looked at", extra={"error": str(error) or repr(error)})
