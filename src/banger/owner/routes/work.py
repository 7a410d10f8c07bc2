# SPDX-License-Identifier: MIT
"""/v1/operations and /v1/info."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Final

import litestar
import msgspec
from litestar import response

import banger
from banger.contract import errors, privileged, resources
from banger.owner import routes


@litestar.get("/v1/info")
async def get_info(services: routes.Services) -> resources.DaemonInfo:
    host = privileged.HostInfo(version="", protocol=0)
    try:
        host = await services.ops.call(privileged.GetHost())
    except errors.BangerError:
        # The empty versions say so; a daemon without its helper still answers.
        host = privileged.HostInfo(version="", protocol=0)
    return resources.DaemonInfo(
        version=banger.__version__,
        api_version=resources.API_VERSION,
        pid=os.getpid(),
        started_at=services.started_at,
        helper_version=host.version,
        firecracker_version=host.firecracker_version,
    )


@litestar.get("/v1/operations", sync_to_thread=False)
def list_operations(services: routes.Services) -> list[resources.Operation]:
    return services.operations.list()


@litestar.get("/v1/operations/{operation_id:str}", sync_to_thread=False)
def get_operation(operation_id: str, services: routes.Services) -> resources.Operation:
    return services.operations.get(operation_id)


@litestar.delete("/v1/operations/{operation_id:str}", status_code=200)
async def cancel_operation(operation_id: str, services: routes.Services) -> resources.Operation:
    """Answers when it has ended, with everything rolled back."""
    return await services.operations.cancel(operation_id)


@litestar.get("/v1/operations/{operation_id:str}/events")
async def watch_operation(
    operation_id: str,
    services: routes.Services,
    cancel_on_disconnect: bool = False,
) -> response.Stream:
    services.operations.get(operation_id)
    events = _events(services, operation_id, cancel_on_disconnect=cancel_on_disconnect)
    return response.Stream(events, media_type="text/event-stream")


async def _events(
    services: routes.Services, operation_id: str, *, cancel_on_disconnect: bool
) -> AsyncIterator[bytes]:
    ended = False
    try:
        async for event in services.operations.events(operation_id):
            ended = event.kind == "end"
            yield b"data: " + msgspec.json.encode(event) + b"\n\n"
    finally:
        if cancel_on_disconnect and not ended:
            # This generator is itself being cancelled, and must not wait here.
            _background.add(task := asyncio.create_task(_cancel(services, operation_id)))
            task.add_done_callback(_background.discard)


async def _cancel(services: routes.Services, operation_id: str) -> None:
    await services.operations.cancel(operation_id)


# Strong references: the event loop keeps only weak ones to tasks.
_background: set[asyncio.Task[None]] = set()

HANDLERS: Final = (get_info, list_operations, get_operation, cancel_operation, watch_operation)
