# SPDX-License-Identifier: MIT
"""A workspace arrives in a row, without the lifecycle lock, while something else changes that row."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from banger.contract import errors, names, privileged, resources
from banger.vm import start
from tests.contract import conftest

WORKSPACE = resources.Workspace(
    path="/root/shop",
    source="shop",
    head="",
    branch="",
    worktree="",
    index="",
    prepared_at=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    options=(),
)
OTHER = msgspec.structs.replace(WORKSPACE, path="/root/other")


async def dies(daemon: conftest.Daemon, vm: resources.Vm) -> None:
    fake = daemon.world.vm(vm.id).vmm
    assert fake is not None
    await fake.kill()
    async with asyncio.timeout(30):
        while (await daemon.services.vms.get("web")).state is resources.VmState.RUNNING:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def is_set_in_vain(daemon: conftest.Daemon, vm: resources.Vm) -> None:
    with pytest.raises(errors.OperationFailedError):
        await daemon.services.alterations.set("web", resources.SetVm(nat=True))


async def is_started_again(daemon: conftest.Daemon, vm: resources.Vm) -> None:
    await daemon.done(await daemon.services.vms.restart("web"))


async def is_started_in_vain(daemon: conftest.Daemon, vm: resources.Vm) -> None:
    async def broken(plan: start.Start) -> None:
        raise errors.OperationFailedError("no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start.Start, "_persist", broken)
        await daemon.done(await daemon.services.vms.restart("web"))


@pytest.mark.parametrize(
    ("change", "during", "fails"),
    [
        (dies, privileged.TearDown, False),
        (is_set_in_vain, privileged.SetGuestRules, True),
        (is_started_again, privileged.PrepareJail, False),
        (is_started_in_vain, privileged.PrepareJail, False),
    ],
)
async def test_a_workspace_that_arrives_meanwhile_stays(
    daemon: conftest.Daemon,
    change: Callable[[conftest.Daemon, resources.Vm], Awaitable[None]],
    during: type[privileged.Request[Any]],
    fails: bool,
) -> None:
    created = (await daemon.create()).vm
    assert created is not None
    rows = daemon.services.vms._store

    async def meanwhile(request: privileged.Request[Any]) -> None:
        if isinstance(request, during):
            latest = rows.get(names.VmId(created.id))
            latest = latest.with_workspace(WORKSPACE).with_workspace(OTHER)
            rows.save(msgspec.structs.replace(latest, placing="/root/third"))
            if fails:
                raise errors.OperationFailedError("no")

    daemon.world.before = meanwhile
    await change(daemon, created)
    row = rows.get(names.VmId(created.id))
    assert (row.workspaces, row.placing) == ((OTHER, WORKSPACE), "/root/third")


async def test_what_is_set_before_a_create_begins_stays(daemon: conftest.Daemon) -> None:
    """Its row is there as soon as it was asked for; the operation comes to it a moment later."""
    begun, _ = await asyncio.gather(
        daemon.services.vms.create(resources.CreateVm(name="web")),
        daemon.services.alterations.set("web", resources.SetVm(vcpus=3)),
    )
    assert (await daemon.done(begun)).error is None
    assert (await daemon.services.vms.get("web")).vcpus == 3
