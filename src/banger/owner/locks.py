# SPDX-License-Identifier: MIT
"""Keyed locks that exist only while somebody wants them, and know which operation holds them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Entry:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    wanted: int = 0
    holder: str = ""


class Lifecycle:
    """One lock per key. A VM's is held by its operation from first step to last, and by nothing else."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def holder(self, key: str) -> str | None:
        """The operation that holds it now; None when nobody does."""
        entry = self._entries.get(key)
        return entry.holder if entry is not None and entry.lock.locked() else None

    @property
    def is_unused(self) -> bool:
        return not self._entries

    @asynccontextmanager
    async def hold(self, key: str, operation: str) -> AsyncIterator[None]:
        entry = self._entries.setdefault(key, _Entry())
        entry.wanted += 1
        try:
            async with entry.lock:
                entry.holder = operation
                yield
        finally:
            entry.wanted -= 1
            if entry.wanted == 0:
                self._entries.pop(key, None)
