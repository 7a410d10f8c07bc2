# SPDX-License-Identifier: MIT
"""A simulated day on the fakes: BANGER_SOAK_LIVES of VMs, one thing in a hundred fails, nothing is left.

`make soak` runs ten thousand of them; here are a few. BANGER_SOAK_SEED plays a run again: the same lives and
the same dice, though not the same interleaving of what runs at once, unless BANGER_SOAK_AT_ONCE is 1.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import statistics
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from banger.contract import inventory, resources
from banger.owner import config
from tests.contract import soak, soak_lives
from tests.fakes import world as worlds

LIVES = int(os.environ.get("BANGER_SOAK_LIVES", "40"))
SEED = int(os.environ.get("BANGER_SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
AT_ONCE = int(os.environ.get("BANGER_SOAK_AT_ONCE", "8"))
_DAY_S = 86_400.0
_SAMPLES = 20
_LEAST_BATCH = 10
_RSS_KIB = 4096
"""By so much a service may grow. A leak of half a KiB for each life, less than one row, is more than that in
the second half of ten thousand; what an allocator keeps for itself after its first thousand is less."""
_OBJECTS = 2000
_THREADS = 48
"""Pools grow to their sizes while they warm up, and no further."""


def _batches() -> Iterator[range]:
    size = max(_LEAST_BATCH, LIVES // _SAMPLES)
    for first in range(0, LIVES, size):
        yield range(first, min(first + size, LIVES))


@pytest.fixture
async def host(short_path: Path) -> AsyncIterator[tuple[config.Paths, worlds.World]]:
    """An empty one."""
    paths, world = soak.furnished(short_path)
    yield paths, world
    await world.close()
    gc.collect()  # here, where what asyncio lost is nobody's fault


@pytest.mark.timeout(120 + LIVES)
# asyncio loses a connection that is accepted in the very moment in which a fake VMM dies.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_day_of_lives_with_faults_leaves_nothing(host: tuple[config.Paths, worlds.World]) -> None:
    print(f"BANGER_SOAK_LIVES={LIVES} BANGER_SOAK_SEED={SEED} BANGER_SOAK_AT_ONCE={AT_ONCE}")
    services = soak.Services(*host, SEED)
    samples: list[soak.Sample] = []
    async with services.running():
        client = soak_lives.Client(services)
        for batch in _batches():
            services.may_kill = batch.start < LIVES // 2
            await services.strike(soak.FAULT_RATE)
            await _live(client, batch)
            await services.strike(0)
            await _nothing_is_left(client)
            samples.append(await services.sample(batch.stop))
            print(samples[-1], file=sys.stderr if LIVES > 1000 else sys.stdout, flush=True)
    for what in (client.done, services.faults.struck):
        print(", ".join(f"{name} {count}" for name, count in sorted(what.items())))
    assert client.faults == []
    assert client.done["create"] > LIVES // 2, "most lives were lived"
    if LIVES >= 1000:
        assert sum(services.faults.struck.values()) > LIVES // 20, "hardly anything went wrong"
    # Not every traceback: the server says one for a stream that it cuts off because it is told to stop.
    log = services.log_of("daemon")
    assert [said for said in ("unexpected error", "was never retrieved") if said in log] == []
    assert services.ahead_s >= _DAY_S
    _flat([sample for sample in samples if sample.lives > LIVES // 2])


async def _live(client: soak_lives.Client, numbers: range) -> None:
    places = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with places:
            life = soak_lives.Life(client, number, random.Random(f"{SEED} {number}"))
            try:
                async with asyncio.timeout(soak_lives.STUCK_S):
                    await life.live()
            except TimeoutError:
                seen = [await client.vm(life.name), await client.ask("GET", "/v1/operations")]
                raise AssertionError(f"{life.name} of seed {SEED} is stuck: {seen}") from None
            await client.services.advance(_DAY_S / LIVES)

    async with asyncio.TaskGroup() as group:
        for number in numbers:
            group.create_task(one(number))


async def _nothing_is_left(client: soak_lives.Client) -> None:
    """No row, no operation under way, nothing on the host and no file."""
    services = client.services
    async with asyncio.timeout(soak_lives.STUCK_S):
        await services.up.wait()
        for ended in list(services.world.under_way):
            await ended.wait()  # what a killed daemon asked for goes on without it
    assert await _answer(client, "/v1/vms", list[resources.Vm]) == []
    operations = await _answer(client, "/v1/operations", list[resources.Operation])
    assert [each for each in operations if not each.status.is_final] == []
    found = await _answer(client, "/v1/inventory", inventory.Inventory)
    assert found.leftovers == ()
    assert services.world.leftovers() == {}
    assert not any(vm.logs for vm in services.world.vms.values())
    vms = services.paths.state / "vms"
    assert not vms.exists() or list(vms.iterdir()) == []
    services.world.vms.clear()


async def _answer(client: soak_lives.Client, path: str, kind: type[soak_lives.T]) -> soak_lives.T:
    answer = await client.ask("GET", path)
    assert answer is not None
    return msgspec.json.decode(answer.body, type=kind)


def _flat(samples: list[soak.Sample]) -> None:
    """What the last services held in the second half. The first tenth of it is their warming up."""
    kept = samples[1:] if len(samples) > 2 else samples
    assert {sample.daemon_starts for sample in kept} == {samples[-1].daemon_starts}
    first, last = kept[0], kept[-1]
    for then, now in ((first.daemon, last.daemon), (first.helper, last.helper)):
        assert now.descriptors == then.descriptors, (then, now)
        assert now.tasks == then.tasks, (then, now)
        assert now.threads < _THREADS, (then, now)
        assert now.objects - then.objects < _OBJECTS, (then, now)
        assert now.rss_kib - then.rss_kib < _RSS_KIB, (then, now)
    daemon = statistics.median(sample.daemon.rss_kib for sample in kept)
    print(f"daemon {daemon:.0f} KiB, helper {statistics.median(s.helper.rss_kib for s in kept):.0f} KiB")
