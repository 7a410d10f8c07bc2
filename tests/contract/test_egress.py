# SPDX-License-Identifier: MIT
"""Packet rules follow the rows: at start, when changed on a running VM, after every kind of death."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from banger.contract import egress, errors, names, privileged, resources
from banger.owner import composition, config
from tests.contract import conftest
from tests.fakes import world as worlds

NAT = resources.SetVm(nat=True)


def rules(daemon: conftest.Daemon, vm_id: str) -> privileged.SetGuestRules | None:
    return daemon.world.vm(vm_id).rules


async def closed(daemon: conftest.Daemon, vm_id: str) -> None:
    """By the next looks of the daemon, sooner than they would come by themselves."""
    async with asyncio.timeout(30):
        while (found := rules(daemon, vm_id)) is None or found.nat:
            daemon.services.vms._host.keeper.look_again()
            await asyncio.sleep(0.005)


async def made(daemon: conftest.Daemon, **more: Any) -> resources.Vm:
    operation = await daemon.done(await daemon.services.vms.create(resources.CreateVm(**more)))
    assert operation.vm is not None, operation.error
    return operation.vm


@pytest.fixture
async def answering(paths: config.Paths, world: worlds.World) -> AsyncIterator[conftest.Daemon]:
    """A daemon that answers what guests ask."""
    composed = composition.compose(
        conftest.answering(), conftest.own_network(), paths, world, "0" * 64, bridge="lo"
    )
    async with composed as services:
        yield conftest.Daemon(services, paths, world)


async def test_a_start_sets_what_was_asked_for(answering: conftest.Daemon) -> None:
    daemon = answering
    vm = await made(
        daemon, nat=True, egress=egress.Egress.ALL, allow=("10.1.0.0/16:80", "a.org"), peer_network="x"
    )
    found = rules(daemon, vm.id)
    assert found is not None
    assert (found.nat, found.egress, found.peers) == (True, egress.Egress.ALL, "x")
    assert found.allow == (egress.Destination("10.1.0.0/16", 80),)
    assert (vm.nat, vm.egress, vm.allow, vm.peer_network) == (
        True,
        egress.Egress.ALL,
        ("10.1.0.0/16:80", "a.org"),
        "x",
    )
    create = next(each for each in daemon.world.requests if isinstance(each, privileged.CreateTap))
    assert create.peers


async def test_ipv6_is_the_guests_from_row_to_rules_name_and_command_line(daemon: conftest.Daemon) -> None:
    vm = await made(daemon, name="web", ipv6=True, nat=True, allow=("2001:db8::/32",))
    found = rules(daemon, vm.id)
    assert found is not None
    assert found.ipv6
    assert egress.Destination("2001:db8::/32") in found.allow
    launch = next(each for each in daemon.world.requests if isinstance(each, privileged.LaunchVmm))
    assert f"banger.ip6={vm.address6}/64,fd62:616e:6765:7200::1" in launch.boot_args.split()
    assert vm.address6.startswith("fd62:616e:6765:7200::")
    four = await made(daemon, name="four")
    assert four.address6 == ""
    with pytest.raises(errors.BadRequestError, match="without IPv6"):
        await daemon.services.alterations.set("four", resources.SetVm(allow=("2001:db8::/32",)))


async def test_a_vm_without_network_has_no_rules(daemon: conftest.Daemon) -> None:
    vm = await made(daemon, network=False)
    assert rules(daemon, vm.id) is None


async def test_nat_is_switched_on_a_running_vm(daemon: conftest.Daemon) -> None:
    vm = await made(daemon, name="web")
    for on in (True, False, True):
        changed = await daemon.services.alterations.set("web", resources.SetVm(nat=on))
        found = rules(daemon, vm.id)
        assert found is not None
        assert (changed.nat, found.nat) == (on, on)
    await daemon.done(await daemon.services.vms.stop("web"))
    assert rules(daemon, vm.id) is None


@pytest.mark.parametrize(
    ("made_with", "changed", "mode"),
    [
        ({"nat": True}, {"allow": ("10.1.0.0/16",)}, egress.Egress.NONE),
        ({}, {"egress": egress.Egress.NONE, "allow": ("10.1.0.0/16",)}, egress.Egress.NONE),
        ({"allow": ("10.1.0.0/16",)}, {"egress": egress.Egress.INTERNET}, egress.Egress.INTERNET),
    ],
)
async def test_what_a_change_opens_is_what_root_is_told(
    daemon: conftest.Daemon, made_with: dict[str, Any], changed: dict[str, Any], mode: egress.Egress
) -> None:
    vm = await made(daemon, name="web", **made_with)
    await daemon.services.alterations.set("web", resources.SetVm(**changed))
    found = rules(daemon, vm.id)
    assert found is not None
    assert (found.nat, found.egress, found.allow) == (True, mode, (egress.Destination("10.1.0.0/16"),))


async def test_a_list_that_is_not_to_be_widened_stays_with_root(daemon: conftest.Daemon) -> None:
    vm = await made(daemon, name="web", allow=("10.1.0.0/16",))
    before = rules(daemon, vm.id)
    with pytest.raises(errors.BadRequestError, match="NAT alone"):
        await daemon.services.alterations.set("web", NAT)
    assert rules(daemon, vm.id) == before


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"dns_listen": ""}, "dns_listen"),
        ({"dns_guests": False}, "dns_guests"),
        ({"dns_guests": False, "dns": (str(names.bridge_address(conftest.own_network())),)}, "dns_guests"),
        ({"dns": ("192.0.2.53",)}, "192.0.2.53"),
    ],
)
async def test_a_name_that_nobody_would_open_is_refused(
    settings: dict[str, Any], why: str, paths: config.Paths, world: worlds.World
) -> None:
    """It would be there in `vm show`, and reach nothing ever."""
    composed = composition.compose(
        conftest.answering(**settings), conftest.own_network(), paths, world, "0" * 64, bridge="lo"
    )
    async with composed as services:
        daemon = conftest.Daemon(services, paths, world)
        allow = ("192.0.2.0/24", "a.org:443")
        with pytest.raises(errors.BadRequestError, match=rf"a\.org.*{why}"):
            await made(daemon, name="web", allow=allow)
        assert await services.vms.list() == []
        vm = await made(daemon, name="web", allow=allow[:1])
        for runs in (True, False):
            with pytest.raises(errors.BadRequestError, match=rf"a\.org.*{why}"):
                await services.alterations.set("web", resources.SetVm(allow=allow))
            assert (await services.vms.get("web")).allow == allow[:1]
            if runs:
                await daemon.done(await services.vms.stop("web"))
        assert rules(daemon, vm.id) is None


async def test_a_name_is_allowed_where_guests_ask_us_too(paths: config.Paths, world: worlds.World) -> None:
    """The first is not reached while only names are open, and then we are asked."""
    here = str(names.bridge_address(conftest.own_network()))
    settings = conftest.answering(dns=("192.0.2.53", here))
    composed = composition.compose(settings, conftest.own_network(), paths, world, "0" * 64, bridge="lo")
    async with composed as services:
        daemon = conftest.Daemon(services, paths, world)
        vm = await made(daemon, name="web", allow=("a.org",))
        assert vm.allow == ("a.org",)


async def test_other_changes_of_a_running_vm_are_refused_whole(daemon: conftest.Daemon) -> None:
    await made(daemon, name="web")
    with pytest.raises(errors.ConflictError):
        await daemon.services.alterations.set("web", resources.SetVm(nat=True, vcpus=2))
    assert not (await daemon.services.vms.get("web")).nat


@pytest.mark.parametrize(("when", "failures"), [("before", 1), ("after", 2)])
async def test_a_change_that_fails_is_neither_remembered_nor_left_open(
    daemon: conftest.Daemon, when: str, failures: int
) -> None:
    """Also when root had opened it, as a helper has that is killed before it answers, even twice."""
    vm = await made(daemon, name="web")

    async def fail(request: privileged.Request[Any]) -> None:
        nonlocal failures
        if isinstance(request, privileged.SetGuestRules) and failures:
            failures -= 1
            raise errors.UnavailableError("no")

    setattr(daemon.world, when, fail)
    with pytest.raises(errors.UnavailableError):
        await daemon.services.alterations.set("web", NAT)
    assert not (await daemon.services.vms.get("web")).nat
    await closed(daemon, vm.id)
    assert not failures


async def test_a_daemon_that_starts_sets_what_rows_want(paths: config.Paths, world: worlds.World) -> None:
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        vm = await made(conftest.Daemon(services, paths, world), name="web", nat=True)
    world.vm(vm.id).rules = None
    orphan = "feed00000000"
    world.vm(orphan).rules = privileged.SetGuestRules(vm_id=orphan, slot=9, nat=True)
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64):
        found = world.vm(vm.id).rules
        assert found is not None
        assert found.nat
        assert world.vm(orphan).rules is None


async def test_a_starting_daemon_whom_root_does_not_answer_sets_them_later(
    paths: config.Paths, world: worlds.World
) -> None:
    """The last daemon had saved the row and died before it asked root."""
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        vm = await made(conftest.Daemon(services, paths, world), name="web", nat=True)
        row = services.vms._store.get(names.VmId(vm.id))
        services.vms._store.save(msgspec.structs.replace(row, nat=False))
    refused = asyncio.Event()

    async def refuse(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.SetGuestRules):
            refused.set()
            world.before = worlds._nothing
            raise errors.UnavailableError("the root helper does not answer")

    world.before = refuse
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        assert refused.is_set()
        await closed(conftest.Daemon(services, paths, world), vm.id)


async def test_rules_that_were_flushed_come_back_with_the_next_start(daemon: conftest.Daemon) -> None:
    vm = await made(daemon, name="web", nat=True)
    daemon.world.tables = False
    await made(daemon, name="db")
    found = rules(daemon, vm.id)
    assert found is not None
    assert found.nat


async def test_addresses_are_stable_and_never_handed_out_twice(daemon: conftest.Daemon) -> None:
    """The slot is leased with the row and goes back with it."""
    vms = [await made(daemon, name=f"vm-{n}", start=False) for n in range(6)]
    addresses = [vm.address for vm in vms]
    assert len(set(addresses)) == 6
    await daemon.done(await daemon.services.vms.delete("vm-2"))
    await daemon.done(await daemon.services.vms.start("vm-4"))
    assert (await daemon.services.vms.get("vm-4")).address == addresses[4]
    assert (await made(daemon, name="new", start=False)).address == addresses[2]
    assert str(names.guest_address(conftest.NETWORK, 1)) == addresses[0]


async def test_addresses_are_of_the_network_that_this_host_has(
    paths: config.Paths, world: worlds.World
) -> None:
    network, network6 = ipaddress.IPv4Network("172.29.64.0/19"), ipaddress.IPv6Network("fd98:7:6:5::/64")
    async with composition.compose(
        conftest.SETTINGS, network, paths, world, "0" * 64, network6=network6
    ) as services:
        vm = await made(conftest.Daemon(services, paths, world), name="web", ipv6=True)
        assert (vm.address, vm.address6) == ("172.29.64.2", "fd98:7:6:5::2")
        launch = next(each for each in world.requests if isinstance(each, privileged.LaunchVmm))
        assert "ip=172.29.64.2::172.29.64.1:255.255.224.0:web:eth0:off" in launch.boot_args
        assert "banger.ip6=fd98:7:6:5::2/64,fd98:7:6:5::1" in launch.boot_args.split()
