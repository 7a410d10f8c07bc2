# SPDX-License-Identifier: MIT
"""A connection to a port of the guest where nobody listens never becomes one of the agent with itself.

A service in a guest may have a port that the kernel also gives to those who connect.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.contract import errors, guest
from banger.owner import guest as guests
from tests.contract import agent

PORTS = range(40000, 40004)
"""All that the kernel may choose from for who connects."""


@pytest.fixture(params=agent.KINDS)
def client(request: pytest.FixtureRequest, own_network: None) -> Iterator[guests.GuestClient]:
    """A client of an agent whose host has these ports for clients."""
    del own_network
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=10)
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(f"{PORTS[0]} {PORTS[-1]}")
    with agent.running(request.param) as path:
        yield guests.GuestClient(lambda: asyncio.open_unix_connection(str(path)))


@pytest.mark.parametrize("address", ["", "127.0.0.1", "::1"])
async def test_a_port_where_nobody_listens_is_refused_also_among_those_of_clients(
    client: guests.GuestClient, address: str
) -> None:
    """TCP joins two that connect to each other, also when both are the same socket."""
    for _ in range(10):
        for port in PORTS:
            with pytest.raises(errors.RefusedError):
                async with client.connect(guest.ConnectSpec(port, address)):
                    pass
    for port in PORTS:
        with socket.socket(socket.AF_INET6 if address == "::1" else socket.AF_INET) as service:
            service.bind((address or "127.0.0.1", port))


def wait_until_nobody_is_served(agent_pid: int) -> None:
    """Nothing tells of it."""
    deadline = time.monotonic() + 20
    while agent.children(agent_pid):
        assert time.monotonic() < deadline, "the agent still serves somebody"
        time.sleep(0.01)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_a_service_s_datagram_port_is_left_to_it(client: guests.GuestClient, address: str) -> None:
    family = socket.AF_INET6 if address == "::1" else socket.AF_INET
    agent_pid = (await client.health()).agent_pid
    for port in [*PORTS] * 5:
        await asyncio.to_thread(wait_until_nobody_is_served, agent_pid)  # the last one had one of the ports
        async with client.connect(guest.ConnectSpec(port, address, "udp")) as tunnel:
            with socket.socket(family, socket.SOCK_DGRAM) as service:
                service.bind((address, port))
                service.settimeout(20)
                await tunnel.write(b"asked")
                said, asker = await asyncio.to_thread(service.recvfrom, 100)
                service.sendto(said, asker)
                assert await tunnel.read() == b"asked"


@pytest.mark.parametrize("address", ["224.0.0.1", "ff02::1", "::ffff:224.0.0.1"])
async def test_a_group_is_no_address_of_the_guest(client: guests.GuestClient, address: str) -> None:
    """Datagrams to one leave the guest. The kernel would let us bind to it."""
    add_route = ("ip", "route", "add", "224.0.0.0/4", "dev", "lo")
    await asyncio.to_thread(subprocess.run, add_route, check=True, timeout=10)
    with pytest.raises(errors.BadRequestError):
        async with client.connect(guest.ConnectSpec(80, address, "udp")):
            pass
