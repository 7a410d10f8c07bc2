# SPDX-License-Identifier: MIT
"""Workspaces that were sent read-only are so again after each start: a kernel forgets its mounts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from banger.vm import capabilities, record

Guard = Callable[[record.VmRecord], Awaitable[None]]


class ReadOnly:
    """Meets `capabilities.Capability`. Before the row says that it runs, nobody else is let in."""

    name = "read_only"

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def check(self, context: capabilities.Context) -> None:
        """Nothing of it is on the host."""

    async def uncheck(self, context: capabilities.Context) -> None:
        """Looking took nothing."""

    async def prepare(self, context: capabilities.Context) -> None:
        """The guest does it, once it runs."""

    async def after_start(self, context: capabilities.Context) -> None:
        await self._guard(context.vm)

    async def clean_up(self, context: capabilities.Context) -> None:
        """Nothing of it is on the host."""
