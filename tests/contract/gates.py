# SPDX-License-Identifier: MIT
"""Root works for as long as a test likes."""

from __future__ import annotations

import asyncio
from typing import Any

from banger.contract import privileged
from tests.fakes import world as worlds


class Gate:
    """Holds requests of a kind until it is opened; then they fail, if they are to."""

    def __init__(
        self,
        world: worlds.World,
        kind: type[privileged.Request[Any]],
        failure: Exception | None = None,
    ) -> None:
        self._kind = kind
        self._failure = failure
        self.reached, self.go = asyncio.Event(), asyncio.Event()
        world.before = self._before

    async def _before(self, request: privileged.Request[Any]) -> None:
        if isinstance(request, self._kind):
            self.reached.set()
            await self.go.wait()
            if self._failure is not None:
                raise self._failure
