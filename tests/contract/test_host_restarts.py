# SPDX-License-Identifier: MIT
"""A host goes down and comes back: its VMs are stopped in order, and those with autostart start again."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import warnings
from collections.abc import AsyncIterator
from typing import Any

import pytest

from banger.contract import privileged, resources
from banger.owner import composition, config, vms
from tests.contract import api_served, cli_process, conftest
from tests.fakes import world as worlds

_STOPPED, _RUNNING, _ERROR = resources.VmState.STOPPED, resources.VmState.RUNNING, resources.VmState.ERROR


@contextlib.asynccontextmanager
async def booted(
    paths: config.Paths,
    world: worlds.World,
    boot: str,
    settings: config.Config = conftest.SETTINGS,
) -> AsyncIterator[conftest.Daemon]:
    """The daemon in this boot of the host."""
    async with composition.compose(
        settings, conftest.NETWORK, paths, world, "0" * 64, host_boot_id=boot
    ) as services:
        yield conftest.Daemon(services, paths, world)
    with warnings.catch_warnings():  # asyncio loses a socket whose connecting is cancelled
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


async def settled(daemon: conftest.Daemon) -> dict[str, resources.Vm]:
    """What there is once no operation is under way."""
    for operation in daemon.services.operations.list():
        await daemon.done(operation)
    return {vm.name: vm for vm in await daemon.services.vms.list()}


async def create(daemon: conftest.Daemon, name: str, *, autostart: bool) -> None:
    body = resources.CreateVm(name=name, autostart=autostart)
    assert (await daemon.done(await daemon.services.vms.create(body))).error is None


async def tried_again() -> None:
    """A daemon that has just started has tried all that it wants to."""
    for task in asyncio.all_tasks():
        if task.get_name() == "restarts":
            await asyncio.wait_for(asyncio.shield(task), 20)


def held(world: worlds.World, kind: type[privileged.Request[Any]]) -> tuple[asyncio.Event, asyncio.Event]:
    """Has the helper wait with each such request: one has come, and they may go on."""
    come, release = asyncio.Event(), asyncio.Event()

    async def slow(request: privileged.Request[Any]) -> None:
        if isinstance(request, kind):
            come.set()
            await release.wait()

    world.before = slow
    return come, release


async def started_again(daemon: conftest.Daemon) -> list[str]:
    """Which VMs a daemon has started by itself, once it has."""
    await tried_again()
    begun = [each for each in daemon.services.operations.list() if each.kind == "vm.start"]
    for operation in begun:
        assert (await daemon.done(operation)).error is None
    return sorted(each.target for each in begun)


async def test_all_are_stopped_in_order_and_those_with_autostart_start_again(
    paths: config.Paths, world: worlds.World
) -> None:
    async with booted(paths, world, "first") as daemon:
        await create(daemon, "again", autostart=True)
        await create(daemon, "once", autostart=False)
        await create(daemon, "off", autostart=True)
        await daemon.done(await daemon.services.vms.stop("off"))
        done = await daemon.done(daemon.services.restarts.begin_stopping())
        assert done.error is None
        found = await settled(daemon)
        assert {vm.state for vm in found.values()} == {_STOPPED}
        assert {name for name, vm in found.items() if vm.stopped_with_host} == {"again", "once"}
    async with booted(paths, world, "first") as daemon:  # restarted while the host goes down
        assert await started_again(daemon) == []
    async with booted(paths, world, "second") as daemon:
        assert await started_again(daemon) == ["again"]
        found = await settled(daemon)
        assert {name: vm.state for name, vm in found.items()} == {
            "again": _RUNNING,
            "once": _STOPPED,
            "off": _STOPPED,
        }
        assert not found["again"].stopped_with_host
        await daemon.done(await daemon.services.vms.stop("again"))
    async with booted(paths, world, "third") as daemon:  # its user stopped it
        assert await started_again(daemon) == []


async def test_a_host_that_lost_its_power_starts_them_too(paths: config.Paths, world: worlds.World) -> None:
    async with booted(paths, world, "first") as daemon:
        await create(daemon, "again", autostart=True)
        await create(daemon, "once", autostart=False)
        addresses = {name: vm.address for name, vm in (await settled(daemon)).items()}
    await world.lose_power()
    async with booted(paths, world, "second") as daemon:
        assert await started_again(daemon) == ["again"]
        found = await settled(daemon)
        assert {name: vm.address for name, vm in found.items()} == addresses
        assert (found["again"].state, found["once"].state) == (_RUNNING, _ERROR)
        assert found["once"].last_error is not None
        assert "the host restarted" in found["once"].last_error.message


async def test_one_that_cannot_start_says_why_and_is_not_tried_for_ever(
    paths: config.Paths, world: worlds.World
) -> None:
    async with booted(paths, world, "first") as daemon:
        await create(daemon, "again", autostart=True)
        await daemon.done(daemon.services.restarts.begin_stopping())
    world.behaviour.silent = True
    async with booted(paths, world, "second", conftest.IMPATIENT) as daemon:
        await tried_again()
        found = await settled(daemon)
        assert found["again"].state is _ERROR
        assert found["again"].last_error is not None
    async with booted(paths, world, "second") as daemon:
        assert await started_again(daemon) == []


async def test_one_that_its_user_is_starting_is_not_started_twice(
    paths: config.Paths, world: worlds.World
) -> None:
    """The second start would fail, and the journal say that it could not be started with its host."""
    every = [f"vm{number}" for number in range(5)]
    async with booted(paths, world, "first") as daemon:
        for name in every:
            await create(daemon, name, autostart=True)
        last = (await daemon.services.vms.get("vm4")).id
        await daemon.done(daemon.services.restarts.begin_stopping())
    come, release, late = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def slow(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.LaunchVmm):
            come.set()
            await (late if request.vm_id == last else release).wait()

    world.before = slow
    async with booted(paths, world, "second") as daemon:
        await asyncio.wait_for(come.wait(), 30)
        await daemon.services.vms.start("vm4")
        release.set()
        asyncio.get_running_loop().call_later(0.3, late.set)
        await tried_again()
        assert {vm.state for vm in (await settled(daemon)).values()} == {_RUNNING}
        begun = [each.target for each in daemon.services.operations.list() if each.kind == "vm.start"]
        assert sorted(begun) == every


async def test_one_that_fails_as_none_should_keeps_no_other_down(
    paths: config.Paths, world: worlds.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with booted(paths, world, "first") as daemon:
        for name in ("one", "two", "three"):
            await create(daemon, name, autostart=True)
        unlucky = (await daemon.services.vms.get("one")).id
        await daemon.done(daemon.services.restarts.begin_stopping())
    start = vms.VmService.start

    async def without_memory(service: vms.VmService, ref: str) -> resources.Operation:
        if ref == unlucky:
            raise MemoryError
        return await start(service, ref)

    monkeypatch.setattr(vms.VmService, "start", without_memory)
    async with booted(paths, world, "second") as daemon:
        assert await started_again(daemon) == ["three", "two"]


async def test_one_that_is_being_started_is_not_forgotten(paths: config.Paths, world: worlds.World) -> None:
    launched = asyncio.Event()

    async def after(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.LaunchVmm):
            launched.set()

    world.after = after
    async with booted(paths, world, "first") as daemon:
        world.behaviour.silent = True
        starting = await daemon.services.vms.create(resources.CreateVm(name="again", autostart=True))
        await asyncio.wait_for(launched.wait(), 30)
        done = await daemon.done(daemon.services.restarts.begin_stopping())
        assert done.error is None
        assert (await daemon.done(starting)).status is resources.OperationStatus.CANCELLED
        world.behaviour.silent = False
    async with booted(paths, world, "first") as daemon:  # restarted while the host goes down
        assert await started_again(daemon) == []
    async with booted(paths, world, "second") as daemon:
        assert await started_again(daemon) == ["again"]


async def test_a_host_that_goes_down_at_once_again_starts_no_more_of_them(
    paths: config.Paths, world: worlds.World
) -> None:
    """More than are started at a time: some are being started, the others wait for their turn."""
    every = [f"vm{number}" for number in range(6)]
    async with booted(paths, world, "first") as daemon:
        for name in every:
            await create(daemon, name, autostart=True)
        await daemon.done(daemon.services.restarts.begin_stopping())
    launched = asyncio.Event()

    async def after(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.LaunchVmm):
            launched.set()

    world.after = after
    world.behaviour.silent = True
    async with booted(paths, world, "second") as daemon:
        await asyncio.wait_for(launched.wait(), 30)
        assert (await daemon.done(daemon.services.restarts.begin_stopping())).error is None
        world.behaviour.silent = False
        await tried_again()
        found = await settled(daemon)
        assert not any(vm.state is _RUNNING for vm in found.values())
        assert world.leftovers() == {}
    async with booted(paths, world, "second") as daemon:
        assert await started_again(daemon) == []
    async with booted(paths, world, "third") as daemon:
        assert await started_again(daemon) == every


async def test_a_daemon_that_is_restarted_meanwhile_forgets_none(
    paths: config.Paths, world: worlds.World
) -> None:
    launched = asyncio.Event()

    async def after(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.LaunchVmm):
            launched.set()

    async with booted(paths, world, "first") as daemon:
        await create(daemon, "again", autostart=True)
        await daemon.done(daemon.services.restarts.begin_stopping())
    world.after = after
    world.behaviour.silent = True
    async with booted(paths, world, "second"):
        await asyncio.wait_for(launched.wait(), 30)
    world.behaviour.silent = False
    async with booted(paths, world, "second") as daemon:
        assert await started_again(daemon) == ["again"]


async def test_what_its_user_decided_since_counts(paths: config.Paths, world: worlds.World) -> None:
    """Before its turn came, or long after its host was back."""
    every = [f"vm{number}" for number in range(6)]
    async with booted(paths, world, "first") as daemon:
        await create(daemon, "once", autostart=False)
        for name in every:
            await create(daemon, name, autostart=True)
        await daemon.done(daemon.services.restarts.begin_stopping())
    entered, release = held(world, privileged.LaunchVmm)
    async with booted(paths, world, "second") as daemon:
        await asyncio.wait_for(entered.wait(), 30)
        assert (await daemon.done(await daemon.services.vms.stop("vm5"))).error is None
        await daemon.services.alterations.set("vm4", resources.SetVm(autostart=False))
        await daemon.services.alterations.set("once", resources.SetVm(autostart=True))
        release.set()
        assert await started_again(daemon) == every[:4]
    async with booted(paths, world, "second") as daemon:
        assert await started_again(daemon) == []
    async with booted(paths, world, "third") as daemon:
        assert await started_again(daemon) == []


async def test_one_that_its_user_stops_as_the_host_goes_down_stays_down(
    paths: config.Paths, world: worlds.World
) -> None:
    async with booted(paths, world, "first") as daemon:
        await create(daemon, "again", autostart=True)
        stopping, release = held(world, privileged.KillVmm)
        await daemon.services.vms.stop("again")
        await asyncio.wait_for(stopping.wait(), 30)
        going_down = daemon.services.restarts.begin_stopping()
        await asyncio.sleep(0)
        release.set()
        assert (await daemon.done(going_down)).error is None
        assert not (await settled(daemon))["again"].stopped_with_host
    async with booted(paths, world, "second") as daemon:
        assert await started_again(daemon) == []


@pytest.mark.parametrize("asked", [("restart",), ("stop", "start"), ("restart", "stop")])
async def test_one_that_is_to_run_again_as_the_host_goes_down_starts_with_it(
    paths: config.Paths, world: worlds.World, asked: tuple[str, ...]
) -> None:
    """Its end cannot be called back any more, and its start is: what its user said last counts."""
    async with booted(paths, world, "first") as daemon:
        await create(daemon, "again", autostart=True)
        stopping, release = held(world, privileged.KillVmm)
        for each in asked:
            await getattr(daemon.services.vms, each)("again")
        await asyncio.wait_for(stopping.wait(), 30)
        going_down = daemon.services.restarts.begin_stopping()
        asyncio.get_running_loop().call_later(0.01, release.set)
        assert (await daemon.done(going_down)).error is None
        assert (await settled(daemon))["again"].state is _STOPPED
    async with booted(paths, world, "second") as daemon:
        assert await started_again(daemon) == (["again"] if asked[-1] != "stop" else [])


async def test_one_that_powered_off_as_the_power_failed_ran_too(
    paths: config.Paths, world: worlds.World
) -> None:
    async with booted(paths, world, "first") as daemon:
        await create(daemon, "again", autostart=True)
        again = await daemon.services.vms.get("again")
    await world.lose_power()
    (paths.layout.logs / again.id / "ending.log").write_text("with status 0;\n")
    async with booted(paths, world, "second") as daemon:
        assert await started_again(daemon) == ["again"]


async def test_one_that_begins_to_run_as_the_others_are_stopped_is_stopped_too(
    paths: config.Paths, world: worlds.World
) -> None:
    async with booted(paths, world, "first") as daemon:
        await create(daemon, "slow", autostart=False)
        stopping, release = held(world, privileged.KillVmm)
        going_down = daemon.services.restarts.begin_stopping()
        await asyncio.wait_for(stopping.wait(), 30)
        await create(daemon, "late", autostart=True)
        release.set()
        assert (await daemon.done(going_down)).error is None
        assert {vm.state for vm in (await settled(daemon)).values()} == {_STOPPED}


async def test_a_user_sees_it_and_changes_it(daemon: conftest.Daemon) -> None:
    async with api_served.serving(daemon) as served:
        cli = cli_process.Cli(served.path)

        async def banger(*words: str, status: int = 0) -> cli_process.Done:
            done = await asyncio.to_thread(cli.run, *words)
            assert done.status == status, (done.err, done.out)
            return done

        await banger("vm", "create", "web", "--autostart")
        assert "autostart:" in (await banger("vm", "show", "web")).text
        await banger("vm", "set", "web", "--autostart", "off")
        assert "autostart" not in (await banger("vm", "show", "web")).text
        await banger("system", "stop-vms")
        assert "stopped:" in (await banger("vm", "show", "web")).text
        explained = (await banger("vm", "explain", "web")).text
        assert "was stopped with its host" in explained
        assert "banger vm set web --autostart on" in explained
        refused = await banger("vm", "run", "--rm", "--autostart", status=2)
        assert "exclude each other" in refused.err
