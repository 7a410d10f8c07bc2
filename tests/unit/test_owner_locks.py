# SPDX-License-Identifier: MIT
"""Keyed locks and shared work: who holds, who waits, who gets what, and that nothing is kept."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from banger.contract import errors
from banger.owner import locks


class Maker:
    """Makes numbers under names; each takes until `release` is set."""

    def __init__(self) -> None:
        self.shared: locks.Shared[int] = locks.Shared()
        self.release = asyncio.Event()
        self.begun = 0
        self.heard: list[str] = []
        self.failure: Exception | None = None
        self._ids = itertools.count(1)

    async def _work(self) -> int:
        self.begun += 1
        await self.release.wait()
        if self.failure is not None:
            raise self.failure
        return self.begun

    async def ask(self, name: str = "web", what: object = "same") -> int:
        return await self.shared.make(
            name, what, self._work, operation=f"op-{next(self._ids)}", on_wait=self.heard.append
        )

    async def asked(self, count: int) -> list[asyncio.Task[int]]:
        tasks = [asyncio.create_task(self.ask()) for _ in range(count)]
        await asyncio.sleep(0)
        return tasks


@pytest.fixture
async def maker() -> Maker:
    return Maker()


async def test_what_is_asked_for_at_once_is_made_once(maker: Maker) -> None:
    tasks = await maker.asked(3)
    maker.release.set()
    assert await asyncio.gather(*tasks) == [1, 1, 1]
    assert maker.heard == ["operation op-1 is making web already, waiting for it"] * 2
    assert maker.shared.is_unused


async def test_what_is_asked_for_later_is_made_again(maker: Maker) -> None:
    maker.release.set()
    assert [await maker.ask(), await maker.ask()] == [1, 2]


async def test_other_names_do_not_wait(maker: Maker) -> None:
    tasks = [asyncio.create_task(maker.ask(name)) for name in ("a", "b")]
    await asyncio.sleep(0)
    assert maker.begun == 2
    maker.release.set()
    await asyncio.gather(*tasks)


async def test_something_else_under_the_name_is_refused_naming_who_makes_it(maker: Maker) -> None:
    [task] = await maker.asked(1)
    maker.shared.check("web", "same")
    for refused in (lambda: maker.shared.check("web", "other"), None):
        with pytest.raises(errors.ConflictError, match="operation op-1 is making another web") as caught:
            refused() if refused else await maker.ask(what="other")
        assert caught.value.fields == {"operation": "op-1"}
    maker.release.set()
    assert await task == 1
    assert await maker.ask(what="other") == 2


async def test_a_maker_that_is_cancelled_hands_over(maker: Maker) -> None:
    first, second, third = await maker.asked(3)
    first.cancel()
    await asyncio.wait([first])
    maker.release.set()
    assert [await second, await third] == [2, 2]
    assert maker.shared.is_unused


async def test_one_who_waits_may_leave(maker: Maker) -> None:
    first, second = await maker.asked(2)
    second.cancel()
    await asyncio.wait([second])
    maker.release.set()
    assert await first == 1
    assert maker.shared.is_unused


async def test_a_failure_is_shared_and_not_kept(maker: Maker) -> None:
    maker.failure = errors.OperationFailedError("the archive is away")
    tasks = await maker.asked(3)
    maker.release.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(each) for each in found] == ["the archive is away"] * 3
    assert maker.begun == 1
    maker.failure = None
    assert await maker.ask() == 2


async def test_a_lock_knows_its_holder_and_is_forgotten() -> None:
    lifecycle = locks.Lifecycle()
    assert lifecycle.holder("web") is None
    async with lifecycle.hold("web", "op-1"):
        waiting = asyncio.create_task(_hold(lifecycle, "op-2"))
        await asyncio.sleep(0)
        assert lifecycle.holder("web") == "op-1"
    assert await waiting == "op-2"
    assert lifecycle.is_unused


async def _hold(lifecycle: locks.Lifecycle, operation: str) -> str | None:
    async with lifecycle.hold("web", operation):
        return lifecycle.holder("web")
