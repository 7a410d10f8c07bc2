# SPDX-License-Identifier: MIT
"""Rules of VMs that run are what their rows say, whenever they are lost and whoever notices it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from banger.contract import errors, privileged, resources
from banger.owner import locks
from banger.owner import network as networks
from banger.vm import record
from tests.contract import conftest
from tests.fakes import world as worlds

Kind = type[privileged.Request[Any]]


async def made(daemon: conftest.Daemon, name: str, *, nat: bool = False) -> resources.Vm:
    body = resources.CreateVm(name=name, nat=nat)
    ended = await daemon.done(await daemon.services.vms.create(body))
    assert ended.vm is not None, ended.error
    return ended.vm


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_so():  # noqa: ASYNC110 - the fake world has no event for it
            await asyncio.sleep(0.005)


class Gate:
    """The first request of a kind (to a VM, if one is named) waits here until it is let go."""

    def __init__(self, kind: Kind, vm_id: str = "") -> None:
        self.reached, self._go = asyncio.Event(), asyncio.Event()
        self._kind, self._vm_id = kind, vm_id

    async def __call__(self, request: privileged.Request[Any]) -> None:
        here = isinstance(request, self._kind) and self._vm_id in getattr(request, "vm_id", "")
        if here and not self.reached.is_set():
            self.reached.set()
            await self._go.wait()

    def open(self) -> None:
        self._go.set()


def has_rules(daemon: conftest.Daemon, vm: resources.Vm) -> Callable[[], bool]:
    return lambda: daemon.world.vm(vm.id).rules is not None


async def test_a_start_that_is_cancelled_as_it_learns_of_the_loss(daemon: conftest.Daemon) -> None:
    web = await made(daemon, "web")
    daemon.world.tables = False
    gate = daemon.world.after = Gate(privileged.EnsureBridge)
    operation = await daemon.services.vms.create(resources.CreateVm(name="db"))
    await gate.reached.wait()
    daemon.services.operations.request_cancel(operation.id)
    await asyncio.sleep(0)
    gate.open()
    assert (await daemon.done(operation)).status is resources.OperationStatus.CANCELLED
    await until(has_rules(daemon, web))


async def test_a_helper_that_dies_after_it_loaded_empty_tables(daemon: conftest.Daemon) -> None:
    web = await made(daemon, "web")
    daemon.world.tables = False

    async def die(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.EnsureBridge):
            daemon.world.after = worlds._nothing
            raise errors.UnavailableError("killed after nft had loaded the tables")

    daemon.world.after = die
    await daemon.create("db")
    await made(daemon, "cache")
    await until(has_rules(daemon, web))


async def test_another_firewall_that_never_lets_a_look_end_well(daemon: conftest.Daemon) -> None:
    web = await made(daemon, "web")
    daemon.world.tables = False

    async def refuse(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.EnsureBridge):
            raise errors.OperationFailedError("firewalld lets nobody else change its table")

    daemon.world.after = refuse
    daemon.services.vms._host.keeper.look_again()
    await until(lambda: daemon.world.asked(privileged.ListWorld) > 1)
    await until(has_rules(daemon, web))


async def test_a_vm_that_boots_while_all_rules_are_lost(daemon: conftest.Daemon) -> None:
    gate = daemon.world.before = Gate(privileged.PrepareJail)
    booting = await daemon.services.vms.create(resources.CreateVm(name="web"))
    await gate.reached.wait()
    daemon.world.tables = False
    await made(daemon, "db")
    gate.open()
    web = (await daemon.done(booting)).vm
    assert web is not None
    await until(has_rules(daemon, web))


async def test_what_is_taken_back_meanwhile_stays_closed(daemon: conftest.Daemon) -> None:
    first, web = await made(daemon, "first", nat=True), await made(daemon, "web", nat=True)
    daemon.world.tables = False
    gate = daemon.world.before = Gate(privileged.SetGuestRules, first.id)
    await made(daemon, "db")
    await gate.reached.wait()
    await daemon.services.alterations.set("web", resources.SetVm(nat=False))
    daemon.world.vm(web.id).rules = None
    assert {each.nat for each in await set_from_now_on(daemon, gate, web)} == {False}


async def test_a_vm_that_is_deleted_meanwhile_leaves_no_rules(daemon: conftest.Daemon) -> None:
    """The next VM of its slot would inherit what they open."""
    first, web = await made(daemon, "first", nat=True), await made(daemon, "web", nat=True)
    daemon.world.tables = False
    gate = daemon.world.before = Gate(privileged.SetGuestRules, first.id)
    await made(daemon, "db")
    await gate.reached.wait()
    await daemon.done(await daemon.services.vms.delete("web"))
    assert await set_from_now_on(daemon, gate, web) == []


async def set_from_now_on(
    daemon: conftest.Daemon, gate: Gate, vm: resources.Vm
) -> list[privileged.SetGuestRules]:
    """What is asked for it until all that run were looked at again, after one more loss."""
    before = len(daemon.world.requests)
    gate.open()
    another = await made(daemon, "another")
    daemon.world.vm(another.id).rules = None
    daemon.services.vms._host.keeper.look_again()
    await until(has_rules(daemon, another))
    asked = [each for each in daemon.world.requests[before:] if isinstance(each, privileged.SetGuestRules)]
    return [each for each in asked if each.vm_id == vm.id]


class Rows:
    """The first look at them fails."""

    def __init__(self) -> None:
        self.looks = 0

    def list(self) -> list[record.VmRecord]:
        self.looks += 1
        if self.looks == 1:
            raise errors.OperationFailedError("disk I/O error")
        return []


async def test_a_look_that_fails_is_not_the_last(world: worlds.World) -> None:
    rows = Rows()
    keeper = networks.NetworkKeeper(world, rows, locks.Lifecycle(), again_s=0.001)
    keeper.start()
    await until(lambda: rows.looks > 2)
    await keeper.close()
