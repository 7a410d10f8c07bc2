# SPDX-License-Identifier: MIT
"""/v1/operations and /v1/info."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Final

import litestar
import msgspec
from litestar import params, response

import banger
from banger.contract import errors, privileged, resources
from banger.owner import routes


@litestar.get("/v1/info")
async def get_info(services: routes.Injected) -> resources.DaemonInfo:
    """Versions of the daemon, its helper and Firecracker."""
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
        firecracker_version=await services.runtime.firecracker_version(),
        dns=services.naming.status(),
        can_build=services.images.can_build(),
    )


@litestar.get("/v1/operations", sync_to_thread=False)
def list_operations(services: routes.Injected) -> list[resources.Operation]:
    """Operations that run, and those that ended lately."""
    return services.operations.list()


@litestar.get("/v1/operations/{operation_id:str}", sync_to_thread=False)
def get_operation(operation_id: params.FromPath[str], services: routes.Injected) -> resources.Operation:
    """One operation."""
    return services.operations.get(operation_id)


@litestar.delete("/v1/operations/{operation_id:str}", status_code=200)
async def cancel_operation(
    operation_id: params.FromPath[str], services: routes.Injected
) -> resources.Operation:
    """Cancels an operation; answers when it has ended and all it made is taken back."""
    return await services.operations.cancel(operation_id)


@litestar.get(
    "/v1/operations/{operation_id:str}/events",
    responses=routes.answer(resources.Event, "text/event-stream"),
)
async def watch_operation(
    operation_id: params.FromPath[str],
    services: routes.Injected,
    cancel_on_disconnect: params.FromQuery[bool] = False,
) -> response.Stream:
    """Server-sent events, each an Event, from the first on; the last is of kind `end`."""
    services.operations.get(operation_id)
    events = _events(services, operation_id, cancel_on_disconnect=cancel_on_disconnect)
    return response.Stream(events, media_type="text/event-stream")


async def _events(
    services: routes.Services, operation_id: str, *, cancel_on_disconnect: bool
) -> AsyncIterator[bytes]:
    try:
        async for event in services.operations.events(operation_id):
            yield b"data: " + msgspec.json.encode(event) + b"\n\n"
    finally:
        if cancel_on_disconnect and not services.operations.get(operation_id).status.is_final:
            services.operations.request_cancel(operation_id)


HANDLERS: Final = (get_info, list_operations, get_operation, cancel_operation, watch_operation)
