# SPDX-License-Identifier: MIT
"""Who ends a VM is cancelled, cut off or fails, after the VMM has ended: the row says what is so."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from banger.contract import errors, privileged, resources
from banger.owner import composition, config, routes
from tests.contract import conftest, gates
from tests.fakes import world as worlds

STOPPED = resources.VmState.STOPPED
DURING = [privileged.KillVmm, privileged.DeleteGuestRules, privileged.TearDown]


async def cut_short(services: routes.Services, gate: gates.Gate, operation: resources.Operation) -> None:
    """Cancelled while root works; root goes on."""
    await gate.reached.wait()
    services.operations.request_cancel(operation.id)
    asyncio.get_running_loop().call_later(0.01, gate.go.set)
    async with asyncio.timeout(30):
        ended = await services.operations.wait(operation.id)
    assert ended.status is resources.OperationStatus.CANCELLED


async def settled(services: routes.Services) -> resources.Vm:
    """Once nobody watches the VMM that was."""
    async with asyncio.timeout(30):
        while services.vms.endings.live._watchers:  # noqa: ASYNC110 - it tells nobody that it is done
            await asyncio.sleep(0.01)
    return await services.vms.get("web")


@pytest.mark.parametrize("during", DURING)
@pytest.mark.parametrize("how", ["stop", "kill", "restart", "delete"])
async def test_a_vm_that_was_ended_has_stopped(
    daemon: conftest.Daemon, how: str, during: type[privileged.Request[Any]]
) -> None:
    """It would be said to have ended by itself, as its row went on saying that it runs."""
    created = (await daemon.create()).vm
    assert created is not None
    gate = gates.Gate(daemon.world, during)
    await cut_short(daemon.services, gate, await getattr(daemon.services.vms, how)("web"))
    vm = await settled(daemon.services)
    assert (vm.state, vm.last_error) == (STOPPED, None)
    assert daemon.world.leftovers() == {}
    disks = daemon.paths.state / "vms" / created.id
    assert {path.name for path in disks.iterdir()} == {"overlay.cow", "work.ext4"}


@pytest.mark.parametrize("during", DURING)
@pytest.mark.parametrize("how", ["stop", "kill", "delete"])
async def test_a_daemon_that_is_stopped_meanwhile_leaves_a_true_row(
    paths: config.Paths, world: worlds.World, how: str, during: type[privileged.Request[Any]]
) -> None:
    compose = composition.compose
    async with compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        await conftest.Daemon(services, paths, world).create()
        gate = gates.Gate(world, during)
        await getattr(services.vms, how)("web")
        await gate.reached.wait()
        asyncio.get_running_loop().call_later(0.01, gate.go.set)
    async with compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        vm = await services.vms.get("web")
        assert (vm.state, vm.last_error) == (STOPPED, None)
    assert world.leftovers() == {}


async def test_one_that_is_stopped_with_its_host_starts_with_it_all_the_same(
    paths: config.Paths, world: worlds.World
) -> None:
    """A host that goes down waits two minutes for it, and then for nobody."""
    compose = composition.compose
    settings, network = conftest.SETTINGS, conftest.NETWORK
    async with compose(settings, network, paths, world, "0" * 64, host_boot_id="1") as services:
        await conftest.Daemon(services, paths, world).create()
        await services.alterations.set("web", resources.SetVm(autostart=True))
        gate = gates.Gate(world, privileged.TearDown)
        await services.vms.stop_with_host("web")
        await gate.reached.wait()
        asyncio.get_running_loop().call_later(0.01, gate.go.set)
    async with compose(settings, network, paths, world, "0" * 64, host_boot_id="2") as services:
        async with asyncio.timeout(30):
            while (await services.vms.get("web")).state is not resources.VmState.RUNNING:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_a_full_disk_keeps_nobody_from_deleting(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it has stopped is not worth a row that shall go, and with it what fills the disk."""
    await daemon.create()
    rows = daemon.services.vms._store

    def full(vm: object) -> None:
        raise errors.NoSpaceError("no space left for banger's database")

    monkeypatch.setattr(rows, "save", full)
    operation = await daemon.done(await daemon.services.vms.delete("web"))
    assert operation.status is resources.OperationStatus.SUCCEEDED, operation.error
    assert await daemon.services.vms.list() == []


@pytest.mark.parametrize("how", ["stop", "kill", "restart", "delete"])
async def test_one_whose_rest_cannot_be_taken_away_has_stopped_too(
    daemon: conftest.Daemon, how: str
) -> None:
    """The error is told to whoever asked; what is left is tried again."""
    await daemon.create()
    gate = gates.Gate(daemon.world, privileged.TearDown, errors.ConflictError("the device is busy"))
    gate.go.set()
    operation = await daemon.done(await getattr(daemon.services.vms, how)("web"))
    assert operation.error is not None
    assert operation.error.message == "the device is busy"
    vm = await settled(daemon.services)
    assert (vm.state, vm.last_error) == (STOPPED, None)
    daemon.world.before = worlds._nothing
    async with asyncio.timeout(30):
        while daemon.world.leftovers():  # noqa: ASYNC110 - it tells nobody that it is done
            await asyncio.sleep(0.01)
    assert (await daemon.services.vms.get("web")).state is STOPPED


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_one_that_never_ran_has_not_stopped(daemon: conftest.Daemon, how: str) -> None:
    await daemon.create(start=False)
    operation = await daemon.done(await getattr(daemon.services.vms, how)("web"))
    assert operation.vm is not None
    assert operation.vm.state is resources.VmState.CREATED


@pytest.mark.parametrize("begun", [True, False])
async def test_a_delete_that_fails_is_gone_on_with_only_where_it_has_taken_something(
    paths: config.Paths, world: worlds.World, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """By the next daemon. Half a VM is of no use; a whole one is its user's, who was told that it stays."""

    def busy(path: Path) -> None:
        if begun:
            (path / "overlay.cow").unlink()
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        daemon = conftest.Daemon(services, paths, world)
        await daemon.create()
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "rmtree", busy)
            ended = await daemon.done(await services.vms.delete("web"))
        assert ended.error is not None
        assert "Device or resource busy" in ended.error.message
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        assert [vm.name for vm in await services.vms.list()] == ([] if begun else ["web"])
        if not begun:
            again = conftest.Daemon(services, paths, world)
            assert (await again.done(await services.vms.start("web"))).error is None


@pytest.mark.parametrize("how", ["stop", "kill", "restart", "delete"])
async def test_a_helper_that_ends_once_it_has_killed_ends_nothing_else(
    daemon: conftest.Daemon, how: str
) -> None:
    """Its answer is lost; the next helper sees that there is no VMM, and nobody calls that its own end."""
    await daemon.create()

    async def lost(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.KillVmm):
            daemon.world.after = worlds._nothing
            raise errors.UnavailableError("the root helper does not answer")

    daemon.world.after = lost
    ended = await daemon.done(await getattr(daemon.services.vms, how)("web"))
    assert ended.error is None
    left = {"stop": [STOPPED], "kill": [STOPPED], "restart": [resources.VmState.RUNNING], "delete": []}
    assert [vm.state for vm in await daemon.services.vms.list()] == left[how]
    assert how == "restart" or daemon.world.leftovers() == {}


async def test_a_helper_that_ends_before_it_kills_leaves_a_vm_that_runs(daemon: conftest.Daemon) -> None:
    await daemon.create()
    gate = gates.Gate(daemon.world, privileged.KillVmm, errors.UnavailableError("no answer"))
    gate.go.set()
    ended = await daemon.done(await daemon.services.vms.kill("web"))
    assert ended.error is not None
    assert ended.error.message == "no answer"
    assert [vm.state for vm in await daemon.services.vms.list()] == [resources.VmState.RUNNING]
