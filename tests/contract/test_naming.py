# SPDX-License-Identifier: MIT
"""Names live as long as their VMs run, whoever ends them; the servers start all or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import dnslib
import msgspec
import pytest

from banger.contract import errors, names, privileged, resources
from banger.owner import composition, config, naming, routes
from tests.contract import conftest, dns_served, publishing
from tests.fakes import world as worlds


@pytest.fixture
def settings() -> config.Config:
    """With DNS on a free port, for the host alone."""
    listen = f"127.0.0.1:{publishing.free_port()}"
    return msgspec.structs.replace(conftest.SETTINGS, dns_listen=listen, dns_guests=False)


@contextlib.asynccontextmanager
async def running(
    settings: config.Config, paths: config.Paths, world: worlds.World
) -> AsyncIterator[conftest.Daemon]:
    composed = composition.compose(settings, conftest.NETWORK, paths, world, "0" * 64, bridge="lo")
    async with composed as services:
        yield conftest.Daemon(services, paths, world)


async def ask(services: routes.Services, name: str) -> str:
    """The address, or what there is instead."""
    port = int(services.naming.status().listen.rpartition(":")[2])
    query = bytes(dnslib.DNSRecord.question(name).pack())
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as client:
        client.connect((str(dns_served.LOOPBACK), port))
        client.send(query)
        async with asyncio.timeout(30):
            reply = dnslib.DNSRecord.parse(await loop.sock_recv(client, 2000))
    return str(reply.rr[0].rdata) if reply.rr else str(dnslib.RCODE[reply.header.rcode])


async def test_one_that_ends_as_the_daemon_starts_has_no_name(
    settings: config.Config, paths: config.Paths, world: worlds.World
) -> None:
    """Its row says that it runs until all of it is taken away."""
    async with running(settings, paths, world) as daemon:
        first = (await daemon.create("first")).vm
        second = (await daemon.create("second")).vm
    assert first is not None
    assert second is not None
    fake = world.vm(first.id).vmm
    assert fake is not None
    reached, go = asyncio.Event(), asyncio.Event()

    async def dies(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.SetGuestRules) and request.vm_id == second.id:
            await fake.kill()
            await reached.wait()
        elif isinstance(request, privileged.TearDown):
            reached.set()
            await go.wait()

    world.before = dies
    async with running(settings, paths, world) as daemon:
        assert reached.is_set()
        go.set()
        async with asyncio.timeout(10):
            while (await daemon.services.vms.get("first")).state is resources.VmState.RUNNING:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert await ask(daemon.services, "first.vm") == "NXDOMAIN"
        assert await ask(daemon.services, "second.vm") == "10.213.240.3"


async def test_a_name_lives_as_long_as_its_vm_runs(
    settings: config.Config, paths: config.Paths, world: worlds.World
) -> None:
    async with running(settings, paths, world) as daemon:
        services = daemon.services
        await daemon.create("web", start=False)
        assert await ask(services, "web.vm") == "NXDOMAIN"
        await daemon.done(await services.vms.start("web"))
        assert await ask(services, "web.vm") == "10.213.240.2"
        assert await ask(services, "x.web.vm") == "10.213.240.2"
        await daemon.done(await services.vms.stop("web"))
        assert await ask(services, "web.vm") == "NXDOMAIN"
        await services.alterations.set("web", resources.SetVm(name="shop"))
        await daemon.done(await services.vms.start("shop"))
        assert [await ask(services, name) for name in ("web.vm", "shop.vm")] == ["NXDOMAIN", "10.213.240.2"]
        await daemon.done(await services.vms.delete("shop"))
        assert await ask(services, "shop.vm") == "NXDOMAIN"


async def test_a_vm_that_ends_by_itself_loses_its_name(
    settings: config.Config, paths: config.Paths, world: worlds.World
) -> None:
    async with running(settings, paths, world) as daemon:
        await daemon.create("web")
        [vm] = world.vms.values()
        assert vm.vmm is not None
        await vm.vmm.kill()
        async with asyncio.timeout(30):
            while await ask(daemon.services, "web.vm") != "NXDOMAIN":  # noqa: ASYNC110 - as a client sees it
                await asyncio.sleep(0.02)


async def test_an_adopted_vm_keeps_its_name(
    settings: config.Config, paths: config.Paths, world: worlds.World
) -> None:
    async with running(settings, paths, world) as daemon:
        await daemon.create("web")
    async with running(settings, paths, world) as daemon:
        assert await ask(daemon.services, "web.vm") == "10.213.240.2"


async def test_a_start_that_fails_leaves_no_name(
    settings: config.Config, paths: config.Paths, world: worlds.World
) -> None:
    impatient = msgspec.structs.replace(settings, agent_deadline_s=1.0)
    async with running(impatient, paths, world) as daemon:
        world.behaviour.silent = True
        await daemon.create("web")
        assert await ask(daemon.services, "web.vm") == "NXDOMAIN"


async def test_a_port_in_use_ends_the_start_with_its_name(
    settings: config.Config, paths: config.Paths, world: worlds.World
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        address, port = settings.dns_endpoint or ("", 0)
        other.bind((address, port))
        with pytest.raises(errors.ConflictError, match=str(port)):
            async with running(settings, paths, world):
                pass
    async with running(settings, paths, world) as daemon:
        assert daemon.services.naming.status().listen == settings.dns_listen


async def test_it_can_be_switched_off(paths: config.Paths, world: worlds.World) -> None:
    async with running(conftest.SETTINGS, paths, world) as daemon:
        await daemon.create("web")
        status = daemon.services.naming.status()
    assert (status.listen, status.guests, status.routed) == ("", "", False)
    assert "dns_listen" in status.problem
    assert status.listen_source is resources.SizeSource.CONFIG
    assert world.asked(privileged.RouteResolver) == 0


@pytest.fixture
async def routed(world: worlds.World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[naming.Naming]:
    """A zone at the address that is routed, though not really there; the loopback plays the bridge."""
    port = publishing.free_port()
    monkeypatch.setattr(names, "DNS_PORT", port)
    settings = config.Config(dns_listen=f"127.0.0.1:{port}", dns_guests=False)
    world.bridge = True

    made = naming.Naming(settings, conftest.NETWORK, "lo", world)
    await made.start()
    yield made
    await made.close()


async def test_the_hosts_resolver_is_told_once_and_told_to_forget(
    routed: naming.Naming, world: worlds.World
) -> None:
    await routed.ensure_routed()
    await routed.ensure_routed()
    assert (routed.status().routed, world.asked(privileged.RouteResolver)) == (True, 1)
    await routed.close()
    assert (world.routed, world.asked(privileged.UnrouteResolver)) == (False, 1)


async def test_a_resolver_that_cannot_be_told_is_shown_and_tried_again(
    routed: naming.Naming, world: worlds.World
) -> None:
    world.resolver = "systemd-resolved does not run on this host"
    await routed.ensure_routed()
    assert (routed.status().routed, routed.status().problem) == (False, world.resolver)
    world.resolver = ""
    await routed.ensure_routed()
    assert (routed.status().routed, routed.status().problem) == (True, "")


async def test_a_helper_that_fails_is_shown_and_hurts_nobody(
    routed: naming.Naming, world: worlds.World
) -> None:
    async def fail(request: privileged.Request[privileged.Result]) -> None:
        raise errors.OperationFailedError("resolvectl failed")

    world.before = fail
    await routed.ensure_routed()
    assert routed.status().problem == "resolvectl failed"
