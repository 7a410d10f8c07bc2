# SPDX-License-Identifier: MIT
"""No start on a host whose memory the VMs that run may need: against the real daemon over a fake world."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from banger.contract import errors, privileged, resources
from banger.owner import admission, composition, config, usage
from tests.contract import conftest
from tests.fakes import world as worlds

# Two VMs of conftest's, and half a third.
SETTINGS = msgspec.structs.replace(conftest.SETTINGS, vms_memory_mib=320)


@pytest.fixture
async def tight(paths: config.Paths, world: worlds.World) -> AsyncIterator[conftest.Daemon]:
    async with composition.compose(SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        yield conftest.Daemon(services, paths, world)


async def no_tap(request: privileged.Request[Any]) -> None:
    if isinstance(request, privileged.CreateTap):
        raise errors.ConflictError("there is a tap of that name")


async def start(daemon: conftest.Daemon, name: str) -> resources.Operation:
    return await daemon.done(await daemon.services.vms.start(name))


async def test_a_start_beyond_the_memory_is_refused_and_says_by_how_much(tight: conftest.Daemon) -> None:
    assert [(await tight.create(name)).error for name in ("a", "b")] == [None, None]
    before = len(tight.world.requests)
    refused = await tight.create("c")
    assert refused.error is not None
    assert refused.error.code == "unavailable"
    assert refused.error.message == (
        "no memory for c: it has 128 MiB, and of the 320 MiB for VMs 2 VMs may use 256 MiB"
    )
    assert "vms_memory_mib" in refused.error.hint
    assert len(tight.world.requests) == before  # root was asked nothing
    assert (await tight.services.vms.get("c")).state is resources.VmState.ERROR


async def test_what_stops_makes_room(tight: conftest.Daemon) -> None:
    for name in ("a", "b", "c"):
        await tight.create(name)
    await tight.done(await tight.services.vms.stop("a"))
    assert (await start(tight, "c")).error is None
    assert (await start(tight, "a")).error is not None
    assert (await tight.done(await tight.services.vms.restart("c"))).error is None


async def test_of_starts_at_once_no_more_go_on_than_fit(tight: conftest.Daemon) -> None:
    done = await asyncio.gather(*(tight.create(name) for name in "abcdef"))
    assert sorted(each.error is None for each in done) == [False] * 4 + [True] * 2


async def test_a_start_that_fails_claims_nothing_after(tight: conftest.Daemon) -> None:
    before, tight.world.before = tight.world.before, no_tap
    failed = [(await tight.create(name)).error for name in ("a", "b")]
    assert [error and error.code for error in failed] == ["conflict"] * 2
    tight.world.before = before
    assert [(await start(tight, name)).error for name in ("a", "b")] == [None, None]


async def test_a_daemon_that_starts_again_knows_what_runs(paths: config.Paths, world: worlds.World) -> None:
    async with composition.compose(SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        first = conftest.Daemon(services, paths, world)
        for name in ("a", "b"):
            await first.create(name)
    async with composition.compose(SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        assert (await conftest.Daemon(services, paths, world).create("c")).error is not None


async def test_a_vm_with_more_than_there_is_can_be_given_less(tight: conftest.Daemon) -> None:
    body = resources.CreateVm(name="big", memory_mib=512)
    refused = await tight.done(await tight.services.vms.create(body))
    assert refused.error is not None
    assert refused.error.message == "big has 512 MiB of memory, and VMs here have 320 MiB together"
    assert "`banger vm set big --memory 320M`" in refused.error.hint
    await tight.services.alterations.set("big", resources.SetVm(memory_mib=320))
    assert (await start(tight, "big")).error is None


def test_without_a_setting_it_is_what_the_host_has() -> None:
    with open("/proc/meminfo", encoding="ascii") as file:
        total_kib = int(next(line for line in file if line.startswith("MemTotal:")).split()[1])
    assert admission.host_memory_mib() == total_kib // 1024


async def test_a_vm_whose_row_is_corrupt_has_the_memory_that_its_cgroup_may_take(
    paths: config.Paths, world: worlds.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else says any more how much that is, and it runs on."""
    async with composition.compose(SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        created = (await conftest.Daemon(services, paths, world).create("a")).vm
    assert created is not None
    monkeypatch.setattr(usage, "limit_mib", {created.id: 256}.__getitem__)
    with contextlib.closing(sqlite3.connect(paths.database, isolation_level=None)) as outside:
        outside.execute("UPDATE vms SET record = '{'")
    async with composition.compose(SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        refused = await conftest.Daemon(services, paths, world).create("b")
        assert refused.error is not None
        assert "of the 320 MiB for VMs 1 VM may use 256 MiB" in refused.error.message
        assert (await services.vms.get("a")).memory_mib == 0
