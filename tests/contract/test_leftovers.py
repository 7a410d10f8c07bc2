# SPDX-License-Identifier: MIT
"""What cannot be taken away at once is taken away later, by the daemon that runs."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import msgspec
import pytest

from banger.contract import errors, names, privileged, resources
from banger.owner import composition, config, routes
from tests.contract import conftest, gates
from tests.fakes import world as worlds

CREATED, ERROR, STOPPED = resources.VmState.CREATED, resources.VmState.ERROR, resources.VmState.STOPPED
AT_THE_START = (privileged.TearDown, privileged.KillVmm)
IN_A_ROLLBACK = (privileged.GrantVsock, privileged.KillVmm, privileged.DeleteJail)


def refusing(world: worlds.World, kinds: tuple[type[privileged.Request[Any]], ...]) -> asyncio.Event:
    """Root does none of these until the world is mended; set when it was asked to."""
    asked = asyncio.Event()

    async def refuse(request: privileged.Request[Any]) -> None:
        if isinstance(request, kinds):
            asked.set()
            raise errors.UnavailableError("the root helper does not answer")

    world.before = refuse
    return asked


async def nothing_is_left(services: routes.Services) -> None:
    async with asyncio.timeout(30):
        while services.vms.endings.leftovers._tasks:  # noqa: ASYNC110 - it tells nobody that it is done
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("left", [CREATED, ERROR, STOPPED, "orphan", "throw-away"])
async def test_what_a_daemon_that_starts_cannot_take_away(
    paths: config.Paths, world: worlds.World, left: str
) -> None:
    compose = composition.compose
    async with compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        daemon = conftest.Daemon(services, paths, world)
        body = resources.CreateVm(name="web", remove_on_failure=True, for_command=left == "throw-away")
        await daemon.done(await services.vms.create(body))
        rows = services.vms._store
        vm = rows.find("web")
        if left == "orphan":
            rows.delete(names.VmId(vm.id))
        elif left != "throw-away":
            rows.save(msgspec.structs.replace(vm, state=resources.VmState(left)))
    asked = refusing(world, AT_THE_START)
    async with compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        assert asked.is_set()
        assert world.vm(vm.id).runs
        world.before = worlds._nothing
        await nothing_is_left(services)
        assert world.leftovers() == {}
        states = [vm.state for vm in await services.vms.list()]
    assert states == ([] if left in ("orphan", "throw-away") else [left])


@pytest.mark.parametrize("remove", [True, False], ids=["throw-away", "kept"])
async def test_what_a_rollback_could_not_take_back(daemon: conftest.Daemon, *, remove: bool) -> None:
    refusing(daemon.world, IN_A_ROLLBACK)
    body = resources.CreateVm(name="web", remove_on_failure=remove)
    operation = await daemon.done(await daemon.services.vms.create(body))
    assert operation.status is resources.OperationStatus.FAILED
    assert daemon.world.leftovers()
    daemon.world.before = worlds._nothing
    await nothing_is_left(daemon.services)
    assert daemon.world.leftovers() == {}
    assert [vm.state for vm in await daemon.services.vms.list()] == ([] if remove else [ERROR])


async def test_one_that_was_started_meanwhile_is_left_alone(daemon: conftest.Daemon) -> None:
    refusing(daemon.world, IN_A_ROLLBACK)
    await daemon.create()
    assert daemon.services.vms.endings.leftovers._tasks
    daemon.world.before = worlds._nothing
    started = await daemon.done(await daemon.services.vms.start("web"))
    assert started.status is resources.OperationStatus.SUCCEEDED, started.error
    await nothing_is_left(daemon.services)
    vm = await daemon.services.vms.get("web")
    assert vm.state is resources.VmState.RUNNING
    assert daemon.world.vm(vm.id).runs


async def test_one_that_runs_and_cannot_be_looked_at_is_watched(
    paths: config.Paths, world: worlds.World
) -> None:
    compose = composition.compose
    async with compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        await conftest.Daemon(services, paths, world).create()
    refusing(world, (privileged.FindVmm,))
    async with compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        vm = await services.vms.get("web")
        fake = world.vm(vm.id).vmm
        assert fake is not None
        assert (vm.state, vm.pid) == (resources.VmState.RUNNING, fake.pid)
        world.before = worlds._nothing
        await fake.kill()
        async with asyncio.timeout(30):
            while (await services.vms.get("web")).state is resources.VmState.RUNNING:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert world.leftovers() == {}


@pytest.mark.parametrize(
    ("refused", "running"),
    [
        (privileged.KillVmm, True),
        (privileged.TearDown, True),
        (privileged.TearDown, False),
        (privileged.PurgeLogs, True),
        (None, False),
    ],
)
async def test_a_delete_that_fails_keeps_the_row_by_which_it_is_done_again(
    daemon: conftest.Daemon,
    monkeypatch: pytest.MonkeyPatch,
    refused: type[privileged.Request[Any]] | None,
    running: bool,
) -> None:
    """Whoever refuses: root, or for None the disk. Without its row nobody could name what is left of it."""
    await daemon.create()
    if not running:
        await daemon.done(await daemon.services.vms.stop("web"))

    async def refuse(request: privileged.Request[Any]) -> None:
        if refused is not None and isinstance(request, refused):
            raise errors.ConflictError("busy")

    def busy(*_: object, **__: object) -> None:
        raise OSError(errno.EBUSY, "busy")

    with monkeypatch.context() as patch:
        if refused is None:
            patch.setattr("shutil.rmtree", busy)
        daemon.world.before = refuse
        operation = await daemon.done(await daemon.services.vms.delete("web"))
        assert operation.error is not None
        assert "busy" in operation.error.message
        assert "unexpected" not in operation.error.message
        assert [vm.name for vm in await daemon.services.vms.list()] == ["web"]
        daemon.world.before = worlds._nothing
    operation = await daemon.done(await daemon.services.vms.delete("web"))
    assert operation.status is resources.OperationStatus.SUCCEEDED, operation.error
    assert daemon.world.leftovers() == {}
    assert await daemon.services.vms.list() == []
    assert not any((daemon.paths.state / "vms").glob("*"))


async def test_one_whose_deletion_fails_while_its_rest_is_taken_away_goes_too(
    daemon: conftest.Daemon,
) -> None:
    """The command that it was made for has ended: nobody else would delete it before the next daemon."""
    vms = daemon.services.vms
    created = (await daemon.create()).vm
    assert created is not None
    vm_id = names.VmId(created.id)
    gate = gates.Gate(daemon.world, privileged.PurgeLogs, errors.UnavailableError("the helper restarts"))
    vms._store.set_throw_away(vm_id, throw_away=True)
    deleting = await vms.delete("web")
    await gate.reached.wait()
    vms.endings.leftovers.add(vm_id)
    async with asyncio.timeout(30):
        while len(vms._lifecycle._entries[vm_id].wanted) < 2:  # noqa: ASYNC110 - it tells nobody that it waits
            await asyncio.sleep(0.01)
    gate.go.set()
    assert (await daemon.done(deleting)).status is resources.OperationStatus.FAILED
    daemon.world.before = worlds._nothing
    await nothing_is_left(daemon.services)
    assert await vms.list() == []


async def test_a_vm_whose_create_fails_at_its_very_end_goes_at_once(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was to go with its request; the next daemon would take it, with what was done in it since."""
    rows = daemon.services.vms._store

    def full(vm_id: names.VmId, *, throw_away: bool, lasts: bool = False) -> None:
        raise errors.NoSpaceError("no space left for banger's database")

    with monkeypatch.context() as patch:
        patch.setattr(rows, "set_throw_away", full)
        body = resources.CreateVm(name="web", remove_on_failure=True)
        operation = await daemon.done(await daemon.services.vms.create(body))
    assert operation.error is not None
    assert operation.error.code == "no_space"
    await nothing_is_left(daemon.services)
    assert await daemon.services.vms.list() == []
    assert daemon.world.leftovers() == {}
