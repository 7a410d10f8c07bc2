# SPDX-License-Identifier: MIT
"""Several users want everything of the same few VMs at once, while root is slow and fails now and then."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from banger.contract import errors, ports, privileged, resources
from banger.owner import composition, config, routes
from tests.contract import conftest, publishing
from tests.fakes import world as worlds

_NAMES = ("one", "two", "three")
_USERS = 5
_ACTS = 30
_FAULTS = 0.02
_RUNNING = resources.VmState.RUNNING


class Storm:
    """What users do, by chance; every refusal is fine, and no fault of ours is."""

    def __init__(self, services: routes.Services, world: worlds.World, seed: int) -> None:
        self._services = services
        self._random = random.Random(seed)
        self._ports = [publishing.free_port() for _ in range(3)]
        world.before = self._root

    async def _root(self, _: privileged.Request[Any]) -> None:
        if self._random.random() < 0.3:
            await asyncio.sleep(self._random.random() * 0.01)
        if self._random.random() < _FAULTS:
            raise errors.UnavailableError("the helper restarts")

    async def blow(self) -> None:
        await asyncio.gather(*(self._user() for _ in range(_USERS)))

    async def _user(self) -> None:
        acts = self._acts()
        for _ in range(_ACTS):
            with contextlib.suppress(errors.BangerError):
                await self._random.choice(acts)(self._random.choice(_NAMES))
            await asyncio.sleep(self._random.random() * 0.03)

    def _acts(self) -> list[Callable[[str], Awaitable[object]]]:
        vms, alterations = self._services.vms, self._services.alterations
        return [
            self._create,
            self._create,
            vms.start,
            vms.stop,
            vms.kill,
            vms.restart,
            vms.delete,
            lambda name: vms.delete(name, unless_up=True),
            lambda name: alterations.set(name, resources.SetVm(nat=self._maybe())),
            lambda name: alterations.set(name, resources.SetVm(name=self._random.choice(_NAMES))),
            lambda name: alterations.extend(name, resources.ExtendVm()),
            self._publish,
            self._collect,
            self._cancel,
            self._time_is_over,
        ]

    def _maybe(self) -> bool:
        return self._random.random() < 0.5

    def _port(self) -> str:
        return f"{self._random.choice(self._ports)}:80{'/udp' if self._maybe() else ''}"

    async def _create(self, name: str) -> None:
        published = (self._port(),) if self._maybe() else ()
        body = resources.CreateVm(name=name, publish=published, ttl_s=60, remove_on_failure=self._maybe())
        await self._services.vms.create(body)

    async def _publish(self, name: str) -> None:
        asked = (self._port(),)
        change = ports.ChangePorts(publish=asked) if self._maybe() else ports.ChangePorts(unpublish=asked)
        await self._services.alterations.change_ports(name, change)

    async def _collect(self, _: str) -> None:
        self._services.inventory.begin_collecting()

    async def _cancel(self, _: str) -> None:
        running = [each for each in self._services.operations.list() if not each.status.is_final]
        if running:
            self._services.operations.request_cancel(self._random.choice(running).id)

    async def _time_is_over(self, name: str) -> None:
        vm = self._services.vms._store.find(name)
        await self._services.vms.stop_when_due(vm, "had lived", lambda _: True)


async def calm(services: routes.Services, world: worlds.World) -> None:
    """Everything has ended, and no more is tried again."""
    world.before = worlds._nothing
    async with asyncio.timeout(30):
        for each in services.operations.list():
            ended = await services.operations.wait(each.id)
            assert ended.error is None or "fault in banger" not in ended.error.hint, ended
        while services.vms.endings.leftovers._tasks:  # noqa: ASYNC110 - it tells nobody that it is done
            await asyncio.sleep(0.02)
        while len(services.vms.endings.live._watchers) > sum(vm.runs for vm in world.vms.values()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def assert_true(services: routes.Services, paths: config.Paths, world: worlds.World) -> None:
    """Rows say what is so, and nobody holds or remembers anything for nothing."""
    vms = services.vms
    rows = {vm.id: vm for vm in vms._store.list()}
    running = {vm_id for vm_id, vm in rows.items() if vm.state is _RUNNING}
    assert running == {vm_id for vm_id, vm in world.vms.items() if vm.runs}
    assert set(world.leftovers()) <= running
    assert set(vms.endings.live._watchers) == set(vms.endings.live._pids) == running
    held = {vm_id: {str(each.publish) for each in some} for vm_id, some in vms._publisher._ports.items()}
    assert {vm_id: some for vm_id, some in held.items() if some} == {
        vm_id: set(rows[vm_id].publish) for vm_id in running if rows[vm_id].publish
    }
    assert vms._lifecycle.is_unused
    assert not vms._memory._starting
    assert set(vms.activities._vms) <= set(rows)
    disks = paths.state / "vms"
    assert not disks.exists() or {path.name for path in disks.iterdir()} <= set(rows)
    for vm in rows.values():
        assert vm.last_error is None or "no longer running" not in vm.last_error.message, (
            "none ended by itself"
        )


@pytest.mark.parametrize("seed", range(3))
async def test_after_a_storm_everything_is_so(daemon: conftest.Daemon, seed: int) -> None:
    await Storm(daemon.services, daemon.world, seed).blow()
    await calm(daemon.services, daemon.world)
    assert_true(daemon.services, daemon.paths, daemon.world)


@pytest.mark.parametrize("seed", range(3))
async def test_a_daemon_that_is_stopped_in_a_storm_leaves_what_is_so(
    paths: config.Paths, world: worlds.World, seed: int
) -> None:
    compose = composition.compose
    async with compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        await Storm(services, world, seed).blow()
    world.before = worlds._nothing
    async with compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        await calm(services, world)
        assert_true(services, paths, world)
