# SPDX-License-Identifier: MIT
"""The events of one operation: bounded, and watched from the first on by any number of watchers."""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import AsyncIterator
from typing import Final

from banger.contract import resources

MOST_EVENTS: Final = 2000


class EventLog:
    """Adding never waits for a watcher. One that is too slow or too late misses the oldest chatter."""

    def __init__(self) -> None:
        self._events: list[resources.Event] = []
        self._changed = asyncio.Event()
        self.next_seq = 0

    def add(self, event: resources.Event) -> None:
        if len(self._events) >= MOST_EVENTS:
            self._thin_out()
        self._events.append(event)
        self.next_seq += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Returns after the next event."""
        await self._changed.wait()

    async def watch(self) -> AsyncIterator[resources.Event]:
        """Ends after the event of kind `end`."""
        seen = -1
        while True:
            changed = self._changed
            for event in self._after(seen):
                seen = event.seq
                yield event
                if event.kind == "end":
                    return
            await changed.wait()

    def _after(self, seq: int) -> list[resources.Event]:
        return self._events[bisect.bisect_right(self._events, seq, key=lambda event: event.seq) :]

    def _thin_out(self) -> None:
        """Of the older half only stages are kept, and of these only so many."""
        middle = len(self._events) // 2
        stages = [event for event in self._events[:middle] if event.kind == "stage"]
        self._events = stages[-(middle // 2) :] + self._events[middle:]
