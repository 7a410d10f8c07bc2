# SPDX-License-Identifier: MIT
"""/v1/vms, but for exec."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final, Literal

import litestar
from litestar import response

from banger.contract import resources
from banger.owner import routes

_CHUNK_BYTES: Final = 64 * 1024
_FOLLOW_S: Final = 0.5


@litestar.get("/v1/vms")
async def list_vms(services: routes.Services) -> list[resources.Vm]:
    return await services.vms.list()


@litestar.post("/v1/vms", status_code=202)
async def create_vm(data: resources.CreateVm, services: routes.Services) -> resources.Operation:
    return await services.vms.create(data)


@litestar.get("/v1/vms/{ref:str}")
async def get_vm(ref: str, services: routes.Services) -> resources.Vm:
    return await services.vms.get(ref)


@litestar.patch("/v1/vms/{ref:str}")
async def set_vm(ref: str, data: resources.SetVm, services: routes.Services) -> resources.Vm:
    return await services.vms.set(ref, data)


@litestar.delete("/v1/vms/{ref:str}", status_code=202)
async def delete_vm(ref: str, services: routes.Services) -> resources.Operation:
    return await services.vms.delete(ref)


@litestar.post("/v1/vms/{ref:str}/{verb:str}", status_code=202)
async def act_on_vm(
    ref: str, verb: Literal["start", "stop", "restart", "kill"], services: routes.Services
) -> resources.Operation:
    actions = {
        "start": services.vms.start,
        "stop": services.vms.stop,
        "restart": services.vms.restart,
        "kill": services.vms.kill,
    }
    return await actions[verb](ref)


@litestar.get("/v1/vms/{ref:str}/stats")
async def get_stats(ref: str, services: routes.Services) -> resources.VmStats:
    return await services.vms.stats(ref)


@litestar.get("/v1/vms/{ref:str}/logs", media_type="text/plain")
async def get_logs(
    ref: str,
    services: routes.Services,
    source: Literal["console", "vmm"] = "console",
    follow: bool = False,
) -> response.Stream:
    path = await services.vms.log_file(ref, source)
    return response.Stream(_tail(path, follow=follow), media_type="text/plain; charset=utf-8")


async def _tail(path: Path, *, follow: bool) -> AsyncIterator[bytes]:
    """What the log holds, and what is added while the client stays. A missing log is an empty one."""
    position = 0
    while True:
        data = await asyncio.to_thread(_read, path, position)
        position += len(data)
        if data:
            yield data
        elif not follow:
            return
        else:
            # inotify would need a watch for each reader; half a second is quick enough for eyes.
            await asyncio.sleep(_FOLLOW_S)


def _read(path: Path, position: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(position)
            return file.read(_CHUNK_BYTES)
    except FileNotFoundError:
        return b""


HANDLERS: Final = (
    list_vms,
    create_vm,
    get_vm,
    set_vm,
    delete_vm,
    act_on_vm,
    get_stats,
    get_logs,
)
