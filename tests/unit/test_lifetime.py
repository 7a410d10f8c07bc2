# SPDX-License-Identifier: MIT
"""How long a VM runs: what counts, when it is warned about, and what it takes to be stopped."""

from __future__ import annotations

import asyncio
import datetime
from dataclasses import dataclass, field

import msgspec
import pytest

from banger.cli import lifetime as shown
from banger.cli import render
from banger.contract import errors, names, resources
from banger.owner import activity, lifetimes
from banger.vm import lifetime, record
from tests import wall_clock

VM = record.VmRecord(
    id=names.VmId("0123456789ab"),
    name=names.VmName("web"),
    slot=1,
    image_id=names.ImageId("1" * 12),
    kernel_id=names.KernelId("2" * 12),
    vcpus=1,
    memory_mib=128,
    disk_size_mib=16,
    network=False,
    state=resources.VmState.RUNNING,
    created_at=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
)


class Clock:
    """Both clocks of the product, in the test's hand. A suspended host moves only one of them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.monotonic_s, self.boot_s = 1000.0, 5000.0
        # The product reads the kernel's clocks, and there is no other way to move those.
        patch.setattr("time.monotonic", lambda: self.monotonic_s)
        patch.setattr("banger.vm.lifetime.now_s", lambda: self.boot_s)

    def run(self, seconds: float) -> None:
        self.monotonic_s += seconds
        self.boot_s += seconds

    def suspend(self, seconds: float) -> None:
        self.boot_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@dataclass
class Keeping:
    """A keeper over one VM; what it stopped and said."""

    vm: record.VmRecord
    stopped: list[str] = field(default_factory=list)
    activities: activity.Activities = field(default_factory=activity.Activities)
    notices: lifetimes.Notices = field(default_factory=lifetimes.Notices)

    def __post_init__(self) -> None:
        self.keeper = lifetimes.Lifetimes(lambda: [self.vm], self.activities, self.notices, self._stop)
        self.activities.of(self.vm.id)

    async def _stop(self, vm: record.VmRecord, why: str, is_due: lifetimes.IsDue) -> None:
        if is_due(self.vm):
            self.stopped.append(why)

    async def look(self) -> list[str]:
        """What was said at this look."""
        with self.notices.heard(self.vm.id) as queue:
            self.keeper.look()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            return [queue.get_nowait() for _ in range(queue.qsize())]


def limited(*, idle_s: int = 0, ttl_s: int = 0) -> record.VmRecord:
    return lifetime.limited(VM, idle_stop_s=idle_s, ttl_s=ttl_s)


async def test_a_vm_without_limits_is_never_stopped(clock: Clock) -> None:
    keeping = Keeping(VM)
    clock.run(1e9)
    assert await keeping.look() == []
    assert keeping.stopped == []


async def test_an_idle_vm_is_warned_about_once_and_then_stopped(clock: Clock) -> None:
    keeping = Keeping(limited(idle_s=1800))
    clock.run(1499)
    assert await keeping.look() == []
    clock.run(1)
    assert await keeping.look() == [
        "web stops in 5 minutes: it will then have been idle for 30 minutes; "
        "`banger vm extend web` keeps it running"
    ]
    clock.run(299)
    assert await keeping.look() == []
    assert keeping.stopped == []
    clock.run(1)
    assert await keeping.look() == ["web is being stopped: it had been idle for 30 minutes"]
    assert keeping.stopped == ["had been idle for 30 minutes"]


async def test_activity_at_the_last_moment_begins_it_anew(clock: Clock) -> None:
    keeping = Keeping(limited(idle_s=1800))
    clock.run(1799)
    await keeping.look()
    keeping.activities.of(VM.id).touch()
    clock.run(60)
    assert await keeping.look() == []
    clock.run(1740)
    assert len(await keeping.look()) == 1, "and warns again"
    assert keeping.stopped == []


async def test_what_runs_keeps_a_vm_however_long_it_takes(clock: Clock) -> None:
    keeping = Keeping(limited(idle_s=60))
    with keeping.activities.of(VM.id).busy():
        clock.run(1e6)
        assert await keeping.look() == []
        assert keeping.keeper.ends(keeping.vm) == []
    clock.run(59)
    await keeping.look()
    assert keeping.stopped == []


async def test_a_suspended_host_makes_nobody_idle(clock: Clock) -> None:
    keeping = Keeping(limited(idle_s=1800))
    clock.suspend(86400)
    assert await keeping.look() == []


async def test_a_time_to_live_goes_on_while_the_host_is_suspended_and_warns_first(clock: Clock) -> None:
    keeping = Keeping(limited(ttl_s=3600))
    clock.suspend(86400)
    (said,) = await keeping.look()
    assert said.startswith("web stops in 5 minutes: it will then have lived for its 1 hour")
    clock.run(299)
    await keeping.look()
    assert keeping.stopped == []
    clock.run(1)
    await keeping.look()
    assert keeping.stopped == ["had lived for its 1 hour"]


async def test_a_daemon_that_starts_again_warns_again_before_it_stops(clock: Clock) -> None:
    vm = limited(ttl_s=3600)
    clock.run(4000)
    keeping = Keeping(msgspec.json.decode(msgspec.json.encode(vm), type=record.VmRecord))
    assert len(await keeping.look()) == 1
    assert keeping.stopped == []


@pytest.mark.parametrize("jump_s", [-1e9, 1e9])
async def test_a_wall_clock_that_jumps_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    before = datetime.datetime.now(datetime.UTC)
    wall = wall_clock.WallClock(monkeypatch)
    keeping = Keeping(limited(idle_s=3600, ttl_s=3600))
    wall.jump(jump_s)
    assert abs(datetime.datetime.now(datetime.UTC) - before) > datetime.timedelta(days=10_000)
    assert await keeping.look() == []
    assert [3590 < end.left_s <= 3600 for end in keeping.keeper.ends(keeping.vm)] == [True, True]


async def test_an_extended_vm_lives_on(clock: Clock) -> None:
    keeping = Keeping(limited(ttl_s=3600))
    clock.run(3500)
    assert len(await keeping.look()) == 1
    keeping.vm = lifetime.extended(keeping.vm, 7200)
    clock.run(100)
    assert await keeping.look() == []
    assert lifetime.ends(keeping.vm, None)[0].left_s == 7200
    keeping.vm = lifetime.extended(keeping.vm, None)
    assert lifetime.ends(keeping.vm, None)[0].left_s == 3600


async def test_one_that_was_over_already_is_extended_from_now(clock: Clock) -> None:
    vm = limited(ttl_s=60)
    clock.run(1000)
    assert lifetime.ends(lifetime.extended(vm, 10), None)[0].left_s == 10


def test_what_has_no_time_to_live_cannot_live_longer() -> None:
    with pytest.raises(errors.BadRequestError, match="no time to live"):
        lifetime.extended(VM, 60)


async def test_one_that_does_not_listen_holds_nobody_up() -> None:
    notices = lifetimes.Notices()
    with notices.heard(VM.id) as queue:
        for number in range(40):
            notices.tell(VM.id, str(number))
        assert queue.get_nowait() == "24"
    notices.tell(VM.id, "nobody hears this")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(30, "30 seconds"), (90, "90 seconds"), (1800, "30 minutes"), (5400, "90 minutes"), (86400, "1 day")],
)
def test_limits_are_said_as_they_were_given(seconds: int, text: str) -> None:
    assert lifetime.span(seconds) == text


def test_the_nearest_end_is_shown() -> None:
    now = datetime.datetime.now(datetime.UTC)
    vm = resources.Vm(
        id="0123456789ab",
        name="web",
        image="tiny",
        image_id="1" * 12,
        kernel="tiny",
        kernel_id="2" * 12,
        vcpus=1,
        memory_mib=128,
        disk_size_mib=16,
        address="",
        state=resources.VmState.RUNNING,
        network=True,
        created_at=now,
        idle_stop_at=now + datetime.timedelta(hours=1, minutes=59, seconds=30),
        ttl_ends_at=now + datetime.timedelta(hours=3),
        idle_stop_s=7200,
        ttl_s=10800,
    )
    assert shown.next_end(vm) == "in 1 hour 59 minutes (idle)"
    assert [name for name, _ in shown.facts(vm)] == ["idle stop", "time to live"]
    assert render.until(now) == "0 seconds"


async def test_a_look_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that had no memory for a moment would stop no VM by time any more."""
    monkeypatch.setattr(lifetimes, "_LOOK_S", 0.001)
    failures, looked = [MemoryError(), errors.OperationFailedError("no disk")], asyncio.Event()

    def running() -> list[record.VmRecord]:
        if failures:
            raise failures.pop()
        looked.set()
        return []

    async def stop(vm: record.VmRecord, why: str, is_due: lifetimes.IsDue) -> None:
        raise AssertionError("none runs")

    keeper = lifetimes.Lifetimes(running, activity.Activities(), lifetimes.Notices(), stop)
    keeper.start()
    try:
        await asyncio.wait_for(looked.wait(), 30)
    finally:
        await keeper.close()
