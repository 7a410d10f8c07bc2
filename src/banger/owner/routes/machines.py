# SPDX-License-Identifier: MIT
"""/v1/vms, but for exec."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final, Literal

import litestar
from litestar import params, response

from banger.contract import ports, resources
from banger.owner import routes

_CHUNK_BYTES: Final = 64 * 1024
_FOLLOW_S: Final = 0.5


@litestar.get("/v1/vms")
async def list_vms(services: routes.Injected) -> list[resources.Vm]:
    """All VMs, the oldest first."""
    return await services.vms.list()


@litestar.post("/v1/vms", status_code=202)
async def create_vm(
    data: params.JSONBody[resources.CreateVm], services: routes.Injected
) -> resources.Operation:
    """Creates a VM and, unless told otherwise, starts it."""
    return await services.vms.create(data)


@litestar.get("/v1/vms/{ref:str}")
async def get_vm(ref: params.FromPath[str], services: routes.Injected) -> resources.Vm:
    """One VM, with the timings of its last start."""
    return await services.vms.get(ref)


@litestar.patch("/v1/vms/{ref:str}")
async def set_vm(
    ref: params.FromPath[str], data: params.JSONBody[resources.SetVm], services: routes.Injected
) -> resources.Vm:
    """Changes a VM; one that runs only in what it reaches and how long it lives."""
    return await services.alterations.set(ref, data)


@litestar.delete("/v1/vms/{ref:str}", status_code=202)
async def delete_vm(
    ref: params.FromPath[str], services: routes.Injected, unless_up: params.FromQuery[bool] = False
) -> resources.Operation:
    """Deletes a VM with its disks; stops it first; with `unless_up` one that runs is refused."""
    return await services.vms.delete(ref, unless_up=unless_up)


@litestar.post("/v1/vms/{ref:str}/{verb:str}", status_code=202)
async def act_on_vm(
    ref: params.FromPath[str],
    verb: params.FromPath[Literal["start", "stop", "restart", "kill"]],
    services: routes.Injected,
) -> resources.Operation:
    """Starts, stops, restarts or kills a VM."""
    actions = {
        "start": services.vms.start,
        "stop": services.vms.stop,
        "restart": services.vms.restart,
        "kill": services.vms.kill,
    }
    return await actions[verb](ref)


@litestar.post("/v1/vms/{ref:str}/extend", status_code=200)
async def extend_vm(
    ref: params.FromPath[str], data: params.JSONBody[resources.ExtendVm], services: routes.Injected
) -> resources.Vm:
    """Lets a running VM live on, and begins its idleness anew."""
    return await services.alterations.extend(ref, data)


@litestar.get("/v1/vms/{ref:str}/stats")
async def get_stats(ref: params.FromPath[str], services: routes.Injected) -> resources.VmStats:
    """What a running VM uses, as the host's kernel and the guest see it."""
    return await services.vms.stats(ref)


@litestar.get("/v1/vms/{ref:str}/ports")
async def list_ports(ref: params.FromPath[str], services: routes.Injected) -> list[ports.GuestPort]:
    """The ports on which a running VM listens."""
    return list(await services.sessions.listening(ref))


@litestar.patch("/v1/vms/{ref:str}/ports")
async def change_ports(
    ref: params.FromPath[str], data: params.JSONBody[ports.ChangePorts], services: routes.Injected
) -> resources.Vm:
    """Publishes ports of a VM on the host, and takes back others."""
    return await services.alterations.change_ports(ref, data)


@litestar.get("/v1/vms/{ref:str}/logs", responses=routes.answer(str, "text/plain"))
async def get_logs(
    ref: params.FromPath[str],
    services: routes.Injected,
    source: params.FromQuery[Literal["console", "vmm"]] = "console",
    follow: params.FromQuery[bool] = False,
    previous: params.FromQuery[bool] = False,
    tail: params.FromQuery[int] = -1,
) -> response.Stream:
    """The VM's serial console, or what its VMM said; with `follow`, also what is added while there is a VM,
    or until this daemon stops.

    With `previous` what came before that: of the start before, or of this one when it said very much.
    `tail` leaves out all but the last so many lines of what is there; a negative one, none.
    """
    path, is_there = await services.vms.log_file(ref, source, previous=previous)
    begin = 0 if tail < 0 else await asyncio.to_thread(_begin_of_last, path, tail)

    def goes_on() -> bool:
        return follow and is_there() and not services.operations.is_closing

    read = _read_on(path, begin, goes_on=goes_on)
    return response.Stream(read, media_type="text/plain; charset=utf-8")


async def _read_on(path: Path, position: int, *, goes_on: Callable[[], bool]) -> AsyncIterator[bytes]:
    """What the log holds, and what is added while the client stays. A missing log is an empty one."""
    while True:
        position, data = await asyncio.to_thread(_read, path, position)
        if data:
            yield data
        elif not goes_on():
            return
        else:
            # inotify would need a watch for each reader; half a second is quick enough for eyes.
            await asyncio.sleep(_FOLLOW_S)


def _read(path: Path, position: int) -> tuple[int, bytes]:
    """The next piece and the position after it; a log that was cut short is read from its start."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = position if position <= size else 0
            file.seek(start)
            data = file.read(_CHUNK_BYTES)
    except FileNotFoundError:
        return 0, b""
    return start + len(data), data


def _begin_of_last(path: Path, lines: int) -> int:
    """Where the last so many lines begin, read from the end; one that is not finished counts."""
    try:
        with path.open("rb") as file:
            size = end = file.seek(0, os.SEEK_END)
            while lines and end:
                begin = file.seek(max(0, end - _CHUNK_BYTES))
                # The last line's own end is no other's beginning.
                data, at = file.read(end - begin), min(end, size - 1) - begin
                while (at := data.rfind(b"\n", 0, at)) >= 0:
                    lines -= 1
                    if not lines:
                        return begin + at + 1
                end = begin
    except FileNotFoundError:
        return 0
    return end


HANDLERS: Final = (
    list_vms,
    create_vm,
    get_vm,
    set_vm,
    delete_vm,
    act_on_vm,
    extend_vm,
    get_stats,
    list_ports,
    change_ports,
    get_logs,
)
