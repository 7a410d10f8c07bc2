# SPDX-License-Identifier: MIT
"""Keyed locks that exist only while somebody wants them, and know which operation holds them; and work
that is done once for all who ask for it at the same time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from banger.contract import errors

T = TypeVar("T")


@dataclass(slots=True)
class _Entry:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    wanted: list[str] = field(default_factory=list)
    holder: str = ""


class Lifecycle:
    """One lock per key. A VM's is held by its operation from first step to last, and by nothing else."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def holder(self, key: str) -> str | None:
        """The operation that holds it now; None when nobody does."""
        entry = self._entries.get(key)
        return entry.holder if entry is not None and entry.lock.locked() else None

    def wanting(self, key: str) -> tuple[str, ...]:
        """The operation that holds it now, and those that wait for it; whoever is none is left out."""
        entry = self._entries.get(key)
        return tuple(filter(None, entry.wanted)) if entry is not None else ()

    @property
    def is_unused(self) -> bool:
        return not self._entries

    @asynccontextmanager
    async def hold(self, key: str, operation: str) -> AsyncIterator[None]:
        """Whoever comes first holds it first."""
        entry = self._entries.setdefault(key, _Entry())
        entry.wanted.append(operation)
        try:
            async with entry.lock:
                entry.holder = operation
                yield
        finally:
            entry.wanted.remove(operation)
            if not entry.wanted:
                self._entries.pop(key, None)


@dataclass(slots=True)
class _Making(Generic[T]):
    what: object
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    wanted: int = 0
    holder: str = ""
    made: T | None = None
    failure: Exception | None = None


class Shared(Generic[T]):
    """Making something under a name: whoever asks for the same meanwhile waits, and shares the outcome.

    When the one who makes it is cancelled, the next who waits makes it.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Making[T]] = {}

    @property
    def is_unused(self) -> bool:
        return not self._entries

    def check(self, name: str, what: object) -> None:
        """Raises ConflictError while something else is being made under that name."""
        entry = self._entries.get(name)
        if entry is not None and entry.what != what:
            raise errors.ConflictError(
                f"operation {entry.holder} is making another {name} now",
                hint="wait until it has ended, or choose another name",
                operation=entry.holder,
            )

    async def make(
        self,
        name: str,
        what: object,
        work: Callable[[], Awaitable[T]],
        *,
        operation: str,
        on_wait: Callable[[str], None],
    ) -> T:
        """`on_wait` hears whose work is waited for."""
        self.check(name, what)
        entry = self._entries.setdefault(name, _Making(what))
        entry.wanted += 1
        try:
            if entry.lock.locked():
                on_wait(f"operation {entry.holder} is making {name} already, waiting for it")
            entry.holder = entry.holder or operation
            async with entry.lock:
                if entry.failure is not None:
                    raise entry.failure
                if entry.made is None:
                    entry.holder = operation
                    entry.made = await _recorded(entry, work)
                return entry.made
        finally:
            entry.wanted -= 1
            if entry.wanted == 0:
                self._entries.pop(name, None)


async def _recorded(entry: _Making[T], work: Callable[[], Awaitable[T]]) -> T:
    try:
        return await work()
    except Exception as error:
        entry.failure = error
        raise
