# SPDX-License-Identifier: MIT
"""Holds the clocks of the guests that run to the host's: soon after that one jumped, and now and then.

Between the wall clock and the monotonic one lies more or less than before when the host was suspended or its
clock was set. What a guest's own clock loses or gains besides, nothing on the host shows: it is asked.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from banger.contract import errors, names
from banger.vm import clock, record

_log = logging.getLogger(__name__)

_NS: Final = 1_000_000_000
_LOOK_S: Final = 5.0
_AGAIN_NS: Final = 600 * _NS
"""An oscillator that is off by 100 ppm, which is a bad one, makes 0.06 s of it."""
_JUMP_NS: Final = _NS // 2
_AT_ONCE: Final = 8

Life = tuple[names.VmId, str]
"""One boot of a VM."""


class Clocks:
    """`look` is one look at all that run; `start` looks every few seconds. Most looks ask nobody.

    No look waits for another's guests: one that hangs takes seconds to be given up.
    """

    def __init__(
        self,
        running: Callable[[], Sequence[record.VmRecord]],
        agent: Callable[[names.VmId], clock.Agent],
        *,
        wall_ns: clock.Clock = time.time_ns,
        steady_ns: clock.Clock = time.monotonic_ns,
    ) -> None:
        self._running = running
        self._agent = agent
        self._wall_ns = wall_ns
        self._steady_ns = steady_ns
        self._between_ns = wall_ns() - steady_ns()
        self._next_ns: dict[Life, int] = {}
        """When each is asked again; one that is missing, now."""
        self._asking: dict[Life, asyncio.Task[None]] = {}
        self._turn = asyncio.Semaphore(_AT_ONCE)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="clocks")

    async def close(self) -> None:
        tasks = [task for task in (self._task, *self._asking.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def look(self) -> None:
        await asyncio.gather(*self._begin())

    def _begin(self) -> list[asyncio.Task[None]]:
        """Asks all whose time it is, and whom nobody waits for yet."""
        now_ns = self._steady_ns()
        between_ns = self._wall_ns() - now_ns
        lives = {(vm.id, vm.boot_id) for vm in self._running()}
        if abs(between_ns - self._between_ns) > _JUMP_NS:
            self._between_ns = between_ns
            self._next_ns.clear()
            outdated = set(self._asking)  # what they answer is of before
        else:
            outdated = self._asking.keys() - lives
        for life in outdated:
            self._asking[life].cancel()
        self._next_ns = {life: at for life, at in self._next_ns.items() if life in lives}
        due = [life for life in lives - self._asking.keys() if self._next_ns.get(life, now_ns) <= now_ns]
        for life in due:
            task = self._asking[life] = asyncio.create_task(self._hold(life), name=f"clock-{life[0]}")
            # Not the task's own last word: one that is cancelled before it begins has none.
            task.add_done_callback(functools.partial(self._asked, life))
        return [self._asking[life] for life in due]

    def _asked(self, life: Life, _: asyncio.Task[None]) -> None:
        del self._asking[life]

    async def _hold(self, life: Life) -> None:
        vm_id, _ = life
        try:
            async with self._turn:
                off_ns = await clock.hold(self._agent(vm_id), self._wall_ns)
            if off_ns:
                _log.info("a guest's clock was set", extra={"vm": vm_id, "off_s": off_ns / _NS})
        except (errors.UnavailableError, errors.DeadlineError):
            return  # that it is silent is others' to say; the next look asks again
        except Exception as error:
            _log.warning("a guest's clock is not ours to set", extra={"vm": vm_id, "error": str(error)})
        self._next_ns[life] = self._steady_ns() + _AGAIN_NS

    async def _watch(self) -> None:
        while True:
            try:
                self._begin()
            except Exception as error:
                # Whatever it was, such as a disk: this task ends with the daemon alone.
                _log.warning("the guests' clocks could not be looked at", extra={"error": str(error)})
            await asyncio.sleep(_LOOK_S)
