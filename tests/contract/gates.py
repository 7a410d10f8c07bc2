# SPDX-License-Identifier: MIT
"""Root works for as long as a test likes."""

from __future__ import annotations

import asyncio
from typing import Any

from banger.contract import privileged
from tests.fakes import world as worlds


class Gate:
    """Holds the first request of a kind until it is opened."""

    def __init__(self, world: worlds.World, kind: type[privileged.Request[Any]]) -> None:
        self._kind = kind
        self.reached, self.go = asyncio.Event(), asyncio.Event()
        world.before = self._before

    async def _before(self, request: privileged.Request[Any]) -> None:
        if isinstance(request, self._kind):
            self.reached.set()
            await self.go.wait()
