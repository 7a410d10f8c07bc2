# SPDX-License-Identifier: MIT
"""Whether the agents of the guests that run still answer: each is asked every few seconds.

One connection per guest at most, at moments that are spread, whatever the guests do; a line in the log when
one falls silent and one when it answers again.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import datetime
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from banger.contract import names

_log = logging.getLogger(__name__)

_ASKED_WITHIN: Final = 3
"""How often an agent is asked in the time after which it counts as silent."""


@dataclass(slots=True)
class _Guest:
    answered: float
    """On the monotonic clock, which a suspended host does not move."""
    is_silent: bool = False
    task: asyncio.Task[None] | None = None


class Probe(Protocol):
    async def ask(self) -> None:
        """Once; raises BangerError when no answer comes."""

    def close(self) -> None: ...


class SilenceWatch:
    """For showing only: nothing is done to a guest that is silent."""

    def __init__(
        self,
        probe: Callable[[names.VmId], Probe],
        *,
        silent_after_s: float,
        tell: Callable[[names.VmId, bool], None] = lambda vm_id, is_silent: None,
    ) -> None:
        """`tell` hears when a guest falls silent, True, and when it answers again."""
        self._probe = probe
        self._silent_after_s = silent_after_s
        self._tell = tell
        self._guests: dict[names.VmId, _Guest] = {}

    def silent_since(self, vm_id: names.VmId) -> datetime.datetime | None:
        """When it last answered, if that is too long ago; None while it answers."""
        guest = self._guests.get(vm_id)
        if guest is None:
            return None
        silence_s = time.monotonic() - guest.answered
        if silence_s < self._silent_after_s:
            return None
        return datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=silence_s)

    def add(self, vm_id: names.VmId) -> None:
        """It has just answered, or is given the benefit of the doubt."""
        before = self._guests.get(vm_id)
        if before is not None and before.task is not None:
            before.task.cancel()
        guest = self._guests[vm_id] = _Guest(time.monotonic())
        guest.task = asyncio.create_task(
            self._watch(vm_id, guest), name=f"ask-{vm_id}", context=contextvars.Context()
        )

    async def forget(self, vm_id: names.VmId) -> None:
        guest = self._guests.pop(vm_id, None)
        if guest is not None and guest.task is not None:
            guest.task.cancel()
            await asyncio.gather(guest.task, return_exceptions=True)

    async def close(self) -> None:
        for vm_id in list(self._guests):
            await self.forget(vm_id)

    async def _watch(self, vm_id: names.VmId, guest: _Guest) -> None:
        pause_s = self._silent_after_s / _ASKED_WITHIN
        await asyncio.sleep(random.uniform(0, pause_s))  # noqa: S311 - spreads those adopted at once
        with contextlib.closing(self._probe(vm_id)) as probe:
            while True:
                await self._ask(vm_id, guest, probe, deadline_s=2 * pause_s)
                await asyncio.sleep(pause_s)

    async def _ask(self, vm_id: names.VmId, guest: _Guest, probe: Probe, *, deadline_s: float) -> None:
        try:
            async with asyncio.timeout(deadline_s):
                await probe.ask()
        except Exception as error:  # whatever it was: this task ends with its VM alone
            if not guest.is_silent and self.silent_since(vm_id) is not None:
                guest.is_silent = True
                is_late = isinstance(error, TimeoutError)
                why = f"no answer within {deadline_s:g} s" if is_late else str(error) or repr(error)
                _log.warning("the agent is silent", extra={"vm": vm_id, "error": why})
                self._tell(vm_id, True)
            return
        guest.answered = time.monotonic()
        if guest.is_silent:
            guest.is_silent = False
            _log.info("the agent answers again", extra={"vm": vm_id})
            self._tell(vm_id, False)
