# SPDX-License-Identifier: MIT
"""A guest has the host's time: from its start on, when the host has slept or was set, and as days go by."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from banger.contract import errors, names, privileged, resources
from banger.owner import clocks, composition, config
from banger.owner import guest as guests
from banger.vm import clock, record
from tests.contract import agent, conftest
from tests.fakes import vmm
from tests.fakes import world as worlds

S = 1_000_000_000
HOUR = 3600 * S
NEAR = 60 * S
"""Far more than a request takes, and far less than what a clock is set by."""


@pytest.fixture(autouse=True)
def others_look_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon asks guests by itself too, whose questions are counted here."""
    monkeypatch.setattr(clocks, "_LOOK_S", 3600.0)


@dataclass(slots=True)
class Host:
    """Its clocks, as they would be had this happened at one instant."""

    now_ns: int
    passed_ns: int = 0
    set_by_ns: int = 0
    """Being suspended looks the same: the monotonic clock stands still."""

    def wall_ns(self) -> int:
        return self.now_ns + self.passed_ns + self.set_by_ns

    def steady_ns(self) -> int:
        return self.passed_ns


def _stopped_clocks(monkeypatch: pytest.MonkeyPatch) -> Host:
    """So the guests', who are in this process: how long a request takes makes no difference."""
    now_ns = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now_ns)
    return Host(now_ns)


def _vmm(daemon: conftest.Daemon, vm_id: str) -> vmm.FakeVmm:
    found = daemon.world.vm(vm_id).vmm
    assert found is not None
    return found


def _rows(daemon: conftest.Daemon) -> list[record.VmRecord]:
    running = resources.VmState.RUNNING
    return [vm for vm in daemon.services.vms._store.list() if vm.state is running]


def _watched(daemon: conftest.Daemon, host: Host) -> clocks.Clocks:
    def connect(vm_id: names.VmId) -> guests.GuestClient:
        path = Path(privileged.vsock_socket(str(daemon.world.jails), vm_id))
        return guests.GuestClient(guests.vsock_connector(path))

    return clocks.Clocks(lambda: _rows(daemon), connect, wall_ns=host.wall_ns, steady_ns=host.steady_ns)


async def _vm(daemon: conftest.Daemon) -> vmm.FakeVmm:
    made = await daemon.create()
    assert made.vm is not None, made.error
    return _vmm(daemon, made.vm.id)


@pytest.mark.parametrize("off_ns", [-72 * HOUR, HOUR])
async def test_a_clock_that_is_off_at_the_start_is_set_before_the_vm_runs(
    daemon: conftest.Daemon, off_ns: int
) -> None:
    daemon.world.behaviour.clock_off_ns = off_ns
    machine = await _vm(daemon)
    assert (machine.clock_sets, abs(machine.clock_off_ns) < NEAR) == (1, True)


async def test_a_clock_that_is_right_is_neither_set_nor_asked_for(daemon: conftest.Daemon) -> None:
    machine = await _vm(daemon)
    assert (machine.clock_sets, machine.clock_asked) == (0, 0)


async def test_a_start_goes_on_with_a_clock_that_nobody_may_set(daemon: conftest.Daemon) -> None:
    daemon.world.behaviour.clock_off_ns = -HOUR
    daemon.world.behaviour.keeps_its_clock = True
    machine = await _vm(daemon)
    assert (machine.clock_sets, machine.clock_off_ns) == (0, -HOUR)


async def test_a_daemon_that_starts_sets_the_clocks_of_those_that_run(
    paths: config.Paths, world: worlds.World
) -> None:
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        machine = await _vm(conftest.Daemon(services, paths, world))
    machine.clock_off_ns = -HOUR
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64):
        async with asyncio.timeout(20):
            await machine.clock_was_set.wait()
        assert abs(machine.clock_off_ns) < NEAR


@pytest.mark.parametrize("set_by_ns", [9 * HOUR, -HOUR, 3 * S])
async def test_guests_follow_when_the_host_has_slept_or_was_set(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch, set_by_ns: int
) -> None:
    machine, host = await _vm(daemon), _stopped_clocks(monkeypatch)
    watched = _watched(daemon, host)
    for _ in range(3):
        await watched.look()
    assert (machine.clock_asked, machine.clock_sets) == (1, 0)
    host.set_by_ns = set_by_ns
    for _ in range(3):
        await watched.look()
    assert (machine.clock_asked, machine.clock_sets) == (2, 1)
    assert machine.clock_off_ns == set_by_ns


async def test_a_clock_that_drifts_is_set_when_it_is_off_by_more_than_a_second(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, host = await _vm(daemon), _stopped_clocks(monkeypatch)
    watched = _watched(daemon, host)
    for drift_ns, sets in ((S, 0), (-S, 0), (-S - 1, 1), (S + 1, 2)):
        host.passed_ns += 2 * HOUR
        machine.clock_off_ns = host.passed_ns + drift_ns
        await watched.look()
        assert machine.clock_sets == sets
    assert machine.clock_off_ns == host.passed_ns


async def test_who_does_not_answer_is_asked_by_the_next_look_and_who_refuses_much_later(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine, host = await _vm(daemon), _stopped_clocks(monkeypatch)
    watched = _watched(daemon, host)
    host.set_by_ns = HOUR
    daemon.world.behaviour.silent = True
    await watched.look()
    daemon.world.behaviour.silent = False
    await watched.look()
    assert machine.clock_sets == 1
    host.set_by_ns = 2 * HOUR
    daemon.world.behaviour.keeps_its_clock = True
    with caplog.at_level(logging.WARNING, clocks.__name__):
        for _ in range(3):
            await watched.look()
    # Other tests in this process may have let lesser ones through.
    ours = [each for each in caplog.records if each.name == clocks.__name__]
    warned = [each for each in ours if each.levelno >= logging.WARNING]
    assert [getattr(each, "error", "") for each in warned] == ["not mine"]


async def test_who_does_not_answer_holds_up_nobody_else(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A paused VMM, say: it is waited for for seconds."""
    monkeypatch.setattr(clocks, "_LOOK_S", 0.01)
    machine = await _vm(daemon)
    await _paused(daemon, 1)
    host = _stopped_clocks(monkeypatch)
    watched = _watched(daemon, host)
    watched.start()
    try:
        for set_by_ns in (HOUR, 2 * HOUR):
            host.set_by_ns = set_by_ns
            await _follows(machine, set_by_ns)
    finally:
        await watched.close()


async def test_those_that_are_silent_hold_up_nobody_however_many_they_are(
    paths: config.Paths, world: worlds.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "_LOOK_S", 0.01)
    settings = msgspec.structs.replace(conftest.SETTINGS, agent_silence_s=0.2)
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        daemon = conftest.Daemon(services, paths, world)
        await _paused(daemon, 2 * clocks._AT_ONCE)
        machine = await _vm(daemon)
    machine.clock_off_ns = -HOUR
    async with composition.compose(settings, conftest.NETWORK, paths, world, "0" * 64):
        await _follows(machine, 0)


async def _paused(daemon: conftest.Daemon, count: int) -> None:
    for number in range(count):
        made = await daemon.create(f"paused-{number}")
        assert made.vm is not None, made.error
        _vmm(daemon, made.vm.id)._behaviour = vmm.Behaviour(hangs=True)


async def _follows(machine: vmm.FakeVmm, off_ns: int) -> None:
    async with asyncio.timeout(30):
        while abs(machine.clock_off_ns - off_ns) >= NEAR:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)


async def test_a_vm_that_was_restarted_is_asked_anew(daemon: conftest.Daemon) -> None:
    machine = await _vm(daemon)
    watched = _watched(daemon, Host(time.time_ns()))
    await watched.look()
    await daemon.done(await daemon.services.vms.restart("web"))
    await watched.look()
    (row,) = _rows(daemon)
    assert (machine.clock_asked, _vmm(daemon, row.id).clock_asked) == (1, 1)


async def test_a_real_agent_tells_its_clock_and_one_without_a_machine_keeps_it() -> None:
    with agent.running("shipped") as path:
        client = guests.GuestClient(lambda: asyncio.open_unix_connection(str(path)))
        assert await clock.hold(client) == 0
        with pytest.raises(errors.OperationFailedError, match="not the agent's to set"):
            await clock.hold(client, Host(time.time_ns() + HOUR).wall_ns)
