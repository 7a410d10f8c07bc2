# SPDX-License-Identifier: MIT
"""The fake VMM behaves at its sockets as Firecracker does: the lab plays the same on the real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from banger.contract import errors, names
from banger.owner import firecracker, guest
from tests.contract import vmm_cases
from tests.fakes import vmm


@pytest.fixture
async def running(short_path: Path) -> AsyncIterator[vmm.FakeVmm]:
    """A VMM whose guest answers."""
    made = new(short_path, vmm.Behaviour())
    await made.start()
    yield made
    await made.kill()


def new(directory: Path, behaviour: vmm.Behaviour) -> vmm.FakeVmm:
    return vmm.FakeVmm(directory / "api", directory / "vsock", directory / "console", behaviour)


def agent(directory: Path) -> guest.GuestClient:
    return guest.GuestClient(guest.vsock_connector(directory / "vsock", names.AGENT_PORT))


async def test_handshakes(running: vmm.FakeVmm, short_path: Path) -> None:
    got = await asyncio.to_thread(vmm_cases.play, str(short_path / "vsock"))
    assert got == {name: joins for name, (_, joins) in vmm_cases.HANDSHAKES.items()}


async def test_an_idle_connection_to_the_api_socket_stays(running: vmm.FakeVmm, short_path: Path) -> None:
    assert await asyncio.to_thread(vmm_cases.held_open, str(short_path / "api"), 0.2)


async def test_nobody_in_the_guest_means_it_hangs_up(short_path: Path) -> None:
    silent = new(short_path, vmm.Behaviour(silent=True))
    await silent.start()
    answer = await asyncio.to_thread(vmm_cases.shake, str(short_path / "vsock"), b"CONNECT 1023\n")
    await silent.kill()
    assert answer == b""


async def test_its_end_closes_the_api_connection_and_takes_the_agent_along(
    running: vmm.FakeVmm, short_path: Path
) -> None:
    assert (await agent(short_path).health()).boot_id == running.boot_id
    waiting = asyncio.create_task(firecracker.wait_gone(short_path / "api"))
    await asyncio.sleep(0)
    await running.kill()
    async with asyncio.timeout(30):
        await waiting
    with pytest.raises(errors.UnavailableError):
        await agent(short_path).health()


async def test_each_launch_has_its_own_boot_id(short_path: Path) -> None:
    seen = set()
    for _ in range(3):
        made = new(short_path, vmm.Behaviour())
        await made.start()
        seen.add((await agent(short_path).health()).boot_id)
        await made.kill()
    assert len(seen) == 3


async def test_powering_off_ends_it(running: vmm.FakeVmm, short_path: Path) -> None:
    waiting = asyncio.create_task(firecracker.wait_gone(short_path / "api"))
    await asyncio.sleep(0)
    await agent(short_path).power_off(grace_ms=10)
    async with asyncio.timeout(30):
        await waiting
    assert not running.is_running


async def test_a_panic_is_on_its_console_and_ends_it(short_path: Path) -> None:
    made = new(short_path, vmm.Behaviour(panic="no init found"))
    await made.start()
    async with asyncio.timeout(30):
        await firecracker.wait_gone(short_path / "api")
    await made.kill()
    assert "Kernel panic - not syncing: no init found" in (short_path / "console").read_text()
