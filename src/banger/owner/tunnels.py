# SPDX-License-Identifier: MIT
"""Connections to ports of a guest for the API, with a bounded wait for a service that is still starting."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from banger.contract import errors, guest, reach
from banger.owner import guest as guests

_PAUSE_S: Final = 0.1
_AFTER_BOOT_S: Final = 2.0
"""What finishes booting has started its services; the slowest get this much longer."""
_SSH: Final = 22


@contextlib.asynccontextmanager
async def opened(
    client: guests.GuestClient, name: str, request: reach.ConnectRequest
) -> AsyncIterator[guests.Tunnel]:
    """Raises RefusedError, which says where to look, when nobody listens in time."""
    spec = guest.ConnectSpec(port=request.port, address=request.address, protocol=request.protocol)
    async with contextlib.AsyncExitStack() as stack:
        loop = asyncio.get_running_loop()
        began = loop.time()
        deadline = began + request.wait_s
        finished = False
        while True:
            try:
                tunnel = await stack.enter_async_context(client.connect(spec))
                break
            except errors.RefusedError as error:
                if not finished and request.wait_s and await _has_booted(client):
                    finished, deadline = True, min(deadline, loop.time() + _AFTER_BOOT_S)
                if loop.time() >= deadline:
                    raise _explained(name, request.port, loop.time() - began) from error
            await asyncio.sleep(_PAUSE_S)
        yield tunnel


async def _has_booted(client: guests.GuestClient) -> bool:
    """An image without an init of its own has nothing that could still start."""
    health = await client.health()
    return health.init_finished or health.init_kind == "own"


def _explained(name: str, port: int, waited_s: float) -> errors.RefusedError:
    waited = f" after {waited_s:.0f} s" if waited_s >= 1 else ""
    if port != _SSH:
        return errors.RefusedError(
            f"nothing listens on port {port} of {name}{waited}",
            hint=f"`banger vm ports {name}` shows where something does",
        )
    return errors.RefusedError(
        f"no ssh server listens in {name}{waited}",
        hint=f"has its image one? `banger vm logs {name}` shows its console, and "
        f"`banger vm exec {name}` gives a shell without ssh",
    )
