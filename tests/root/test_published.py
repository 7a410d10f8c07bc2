# SPDX-License-Identifier: MIT
"""Published ports of a guest with network, straight to its address, beside the way through its agent."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from banger.contract import errors, ports
from banger.owner import guest as guests
from banger.owner import publish
from banger.vm import record
from tests.contract import agent, publishing
from tests.root import helper_world, network_world
from tests.root.network_world import Guest, Net

pytestmark = pytest.mark.usefixtures("own_network")
MIB = 1 << 20


@pytest.fixture
def net(helper_world_here: helper_world.HelperWorld, own_network: None) -> Iterator[Net]:
    with network_world.networks(helper_world_here) as made:
        yield made


@contextlib.contextmanager
def echoing(net: Net, guest: Guest, port: int) -> Iterator[list[str]]:
    """A service in the guest, TCP and UDP, that says everything back; who asked."""
    tcp = net.tcp_server("0.0.0.0", port, guest.space)  # noqa: S104 - in a namespace of the test's own
    udp = net.udp_server("0.0.0.0", port, guest.space)  # noqa: S104 - the same
    udp.settimeout(0.1)
    ended, peers = threading.Event(), list[str]()

    def streams() -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError):
                wire, peer = tcp.accept()
                peers.append(peer[0])
                with wire:
                    while data := wire.recv(65536):
                        wire.sendall(data)

    def datagrams() -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError):
                data, peer = udp.recvfrom(2000)
                peers.append(peer[0])
                udp.sendto(data.upper(), peer)

    threads = [threading.Thread(target=each) for each in (streams, datagrams)]
    tcp.settimeout(0.1)
    for thread in threads:
        thread.start()
    try:
        yield peers
    finally:
        ended.set()
        for thread in threads:
            thread.join(timeout=network_world.DEADLINE_S)


@contextlib.asynccontextmanager
async def served(net: Net, guest: Guest, vm: record.VmRecord) -> AsyncIterator[publish.Publisher]:
    """Published, with an agent in the guest for those who need one."""
    with guest.space.entered():
        running = agent.running("shipped")
        socket_path = running.__enter__()
    connect = guests.GuestClient(lambda: asyncio.open_unix_connection(str(socket_path)))
    made = publish.Publisher(net.world.policy.prefix, lambda _: connect)
    try:
        await made.serve(vm)
        yield made
    finally:
        await made.close()
        running.__exit__(None, None, None)


async def exchanged(port: int) -> None:
    """A megabyte there and back, and a datagram."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(bytes(MIB))
        assert await reader.readexactly(MIB) == bytes(MIB)
        writer.close()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.setblocking(False)
            asking.connect(("127.0.0.1", port))
            await loop.sock_sendall(asking, b"one")
            assert await loop.sock_recv(asking, 100) == b"ONE"


@pytest.mark.parametrize(("network", "asks_from"), [(True, network_world.BRIDGE), (False, "127.0.0.1")])
def test_tcp_and_udp_reach_the_guest_and_come_back(net: Net, network: bool, asks_from: str) -> None:
    """A guest with network is asked from the bridge, one without by its own agent."""
    guest = net.guest(1)
    port = publishing.free_port()
    vm = publishing.row(f"{port}:7007", f"{port}:7007/udp", network=network)

    async def go() -> None:
        async with served(net, guest, vm):
            await exchanged(port)

    with echoing(net, guest, 7007) as peers:
        asyncio.run(go())
    assert set(peers) == {asks_from}


def test_a_port_that_another_has_is_refused_and_stays_his(net: Net) -> None:
    port = publishing.free_port()
    his = net.udp_server("127.0.0.1", port)
    vm = publishing.row(f"{port + 1}:80", f"{port}:80/udp", network=True)
    made = publish.Publisher(net.world.policy.prefix, lambda _: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(errors.AlreadyExistsError, match=str(port)):
        made.take(vm)
    publish.bound(ports.parse(f"{port + 1}:80")).close()
    assert his.getsockname()[1] == port


def test_what_is_published_is_for_this_host_unless_others_are_named(net: Net) -> None:
    guest = net.guest(1)
    one, two = publishing.free_port(), publishing.free_port()
    vm = publishing.row(f"{one}:7007", f"{network_world.UPLINK}:{two}:7007", network=True)

    async def go() -> tuple[bool, bool]:
        async with served(net, guest, vm):
            connects = functools.partial(network_world.connects, net.internet, network_world.UPLINK)
            return (
                await asyncio.to_thread(connects, one, timeout_s=2),
                await asyncio.to_thread(connects, two),
            )

    with echoing(net, guest, 7007):
        assert asyncio.run(go()) == (False, True)
