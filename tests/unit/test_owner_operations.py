# SPDX-License-Identifier: MIT
"""Operations: they end whatever happens, are watched from the first event on, and nobody can slow them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import AsyncIterator

import msgspec
import pytest

from banger.contract import errors, resources
from banger.owner import events, locks, logs, operations

Status = resources.OperationStatus


@pytest.fixture
async def registry() -> AsyncIterator[operations.Operations]:
    """No operation yet."""
    made = operations.Operations()
    yield made
    await made.close()


async def _nothing(progress: operations.Progress) -> None:
    return


async def _forever(progress: operations.Progress) -> None:
    progress.stage("preflight")
    await asyncio.Event().wait()


async def _watched(registry: operations.Operations, operation_id: str) -> list[resources.Event]:
    return [event async for event in registry.events(operation_id)]


async def test_work_that_returns_succeeds(registry: operations.Operations) -> None:
    begun = registry.start("vm.stop", "web", _nothing)
    assert (begun.kind, begun.target, begun.status) == ("vm.stop", "web", Status.RUNNING)
    ended = await registry.wait(begun.id)
    assert (ended.status, ended.error) == (Status.SUCCEEDED, None)
    assert ended.ended_at is not None
    assert registry.get(begun.id) == ended
    assert registry.list() == [ended]


async def test_an_error_crosses_with_its_code_hint_step_and_notes(registry: operations.Operations) -> None:
    async def work(progress: operations.Progress) -> None:
        error = errors.NoSpaceError("the disk is full", hint="free some")
        error.step = "system_overlay"
        error.add_note("rollback_tap: busy")
        raise error

    ended = await registry.wait(registry.start("vm.create", "web", work).id)
    assert ended.status is Status.FAILED
    assert ended.error == errors.ErrorBody(
        "no_space",
        "the disk is full",
        hint="free some",
        op_id=ended.id,
        step="system_overlay",
        also=("rollback_tap: busy",),
    )


async def test_an_unexpected_error_ends_the_operation_too(
    registry: operations.Operations, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(progress: operations.Progress) -> None:
        raise ZeroDivisionError

    ended = await registry.wait(registry.start("vm.create", "web", work).id)
    assert ended.error is not None
    assert ended.error.code == "operation_failed"
    assert any(record.exc_info for record in caplog.records)


async def test_cancel_answers_when_everything_is_taken_back(registry: operations.Operations) -> None:
    begun, taken_back = asyncio.Event(), False

    async def work(progress: operations.Progress) -> None:
        nonlocal taken_back
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.02)
            taken_back = True

    operation = registry.start("vm.create", "web", work)
    await begun.wait()
    # The second comes while the first is being carried out, and must not disturb it.
    first, second = await asyncio.gather(registry.cancel(operation.id), registry.cancel(operation.id))
    assert first.status is second.status is Status.CANCELLED
    assert taken_back
    assert first.error is not None
    assert first.error.code == "cancelled"


async def test_cancelled_before_its_first_step_it_ends_all_the_same(registry: operations.Operations) -> None:
    seen = []

    async def work(progress: operations.Progress) -> None:
        seen.append("began")
        try:
            await asyncio.Event().wait()
        finally:
            seen.append("took back")

    operation = registry.start("vm.create", "web", work)
    async with asyncio.timeout(30):
        ended = await registry.cancel(operation.id)
    assert ended.status is Status.CANCELLED
    assert seen == ["began", "took back"]


async def test_cancelling_what_has_ended_changes_nothing(registry: operations.Operations) -> None:
    ended = await registry.wait(registry.start("vm.stop", "web", _nothing).id)
    assert await registry.cancel(ended.id) == ended


async def test_an_unknown_operation_is_not_found(registry: operations.Operations) -> None:
    for ask in (registry.get, registry.events, registry.request_cancel):
        with pytest.raises(errors.NotFoundError):
            ask("0123456789ab")


async def test_close_cancels_all_and_refuses_more() -> None:
    registry = operations.Operations()
    running = [registry.start("vm.create", f"web-{n}", _forever) for n in range(3)]
    await registry.close()
    assert {registry.get(operation.id).status for operation in running} == {Status.CANCELLED}
    with pytest.raises(errors.UnavailableError):
        registry.start("vm.create", "late", _forever)


async def test_a_late_watcher_sees_everything(registry: operations.Operations) -> None:
    async def work(progress: operations.Progress) -> None:
        progress.stage("preflight", "looking")
        progress.progress(1, 2)
        progress.note("half way")
        progress.stage("finalize")

    operation = registry.start("vm.create", "web", work)
    early = asyncio.create_task(_watched(registry, operation.id))
    ended = await registry.wait(operation.id)
    late = await _watched(registry, operation.id)
    assert await early == late
    assert [(event.seq, event.kind, event.stage) for event in late] == [
        (0, "stage", "preflight"),
        (1, "progress", "preflight"),
        (2, "note", "preflight"),
        (3, "stage", "finalize"),
        (4, "end", "finalize"),
    ]
    assert late[-1].result == ended


async def test_a_slow_watcher_neither_delays_work_nor_fills_memory(registry: operations.Operations) -> None:
    chatter = events.MOST_EVENTS * 5
    may_go = asyncio.Event()

    async def work(progress: operations.Progress) -> None:
        progress.stage("build_image")
        await may_go.wait()
        for number in range(chatter):
            progress.note(str(number))

    operation = registry.start("image.build", "tiny", work)
    watching = registry.events(operation.id)
    first = await anext(watching)
    may_go.set()
    async with asyncio.timeout(30):
        await registry.wait(operation.id)
    rest = [event async for event in watching]
    assert first.stage == "build_image"
    assert len(rest) <= events.MOST_EVENTS
    assert [event.seq for event in rest] == sorted(event.seq for event in rest)
    assert (rest[-2].detail, rest[-1].kind) == (str(chatter - 1), "end")
    late = await _watched(registry, operation.id)
    assert late[0].kind == "stage", "stages are kept however much was said after them"


async def test_a_watcher_that_leaves_disturbs_nobody(registry: operations.Operations) -> None:
    operation = registry.start("vm.create", "web", _forever)
    watcher = asyncio.create_task(_watched(registry, operation.id))
    await asyncio.sleep(0)
    watcher.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watcher
    assert registry.get(operation.id).status is Status.RUNNING


async def test_lines_from_other_threads_become_notes(registry: operations.Operations) -> None:
    async def work(progress: operations.Progress) -> None:
        thread = threading.Thread(target=progress.line(), args=("from a thread",))
        thread.start()
        await asyncio.to_thread(thread.join)
        await asyncio.sleep(0)

    operation = registry.start("image.build", "tiny", work)
    details = [event.detail for event in await _watched(registry, operation.id)]
    assert "from a thread" in details


async def test_what_is_said_after_the_end_is_not_heard(registry: operations.Operations) -> None:
    kept: list[operations.Progress] = []

    async def work(progress: operations.Progress) -> None:
        kept.append(progress)

    operation = registry.start("image.build", "tiny", work)
    await registry.wait(operation.id)
    kept[0].note("too late")
    assert [event.kind for event in await _watched(registry, operation.id)] == ["end"]


async def test_who_asks_for_very_many_at_once_learns_how_each_ended(
    registry: operations.Operations,
) -> None:
    """As `banger vm prune` does: it looks once it has asked for all."""
    begun = []
    for _ in range(450):
        begun.append(registry.start("vm.delete", "web", _nothing))
        await asyncio.sleep(0)
    assert {(await registry.wait(each.id)).status for each in begun} == {Status.SUCCEEDED}


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("_KEPT_AT_LEAST_S", 0.0),  # waiting two minutes is the alternative
        ("_MOST", 200),
    ],
)
async def test_only_so_many_ended_ones_are_kept(
    registry: operations.Operations, monkeypatch: pytest.MonkeyPatch, limit: str, value: float
) -> None:
    monkeypatch.setattr(operations, limit, value)
    lasting = registry.start("vm.create", "lasting", _forever)
    for _ in range(205):
        await registry.wait(registry.start("vm.stop", "web", _nothing).id)
    newest = registry.start("vm.stop", "web", _nothing)
    await registry.wait(newest.id)
    assert len(registry.list()) <= 202
    assert registry.get(lasting.id).status is Status.RUNNING
    assert registry.get(newest.id).status is Status.SUCCEEDED


async def test_ended_ones_are_forgotten_after_an_hour(
    registry: operations.Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await registry.wait(registry.start("vm.stop", "web", _nothing).id)
    monkeypatch.setattr(operations, "_KEPT_FOR_S", 0.0)  # waiting an hour is the alternative
    registry.start("vm.stop", "web", _nothing)
    with pytest.raises(errors.NotFoundError):
        registry.get(old.id)


async def test_every_log_line_of_an_operation_has_its_id(
    registry: operations.Operations, capsys: pytest.CaptureFixture[str]
) -> None:
    async def work(progress: operations.Progress) -> None:
        logging.getLogger("somewhere.below").info("state changed", extra={"vm": "0123456789ab"})
        await asyncio.to_thread(logging.getLogger("in.a.thread").info, "still working")

    before = logging.root.handlers[:]
    try:
        logs.set_up("info")
        operation = registry.start("vm.stop", "web", work)
        await registry.wait(operation.id)
    finally:
        logging.root.handlers[:] = before
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == [
        "operation began",
        "state changed",
        "still working",
        "operation ended",
    ]
    assert {line["op"] for line in lines} == {operation.id}


async def test_an_operation_is_its_own_json(registry: operations.Operations) -> None:
    ended = await registry.wait(registry.start("vm.stop", "web", _nothing).id)
    assert msgspec.json.decode(msgspec.json.encode(ended), type=resources.Operation) == ended


async def test_a_lock_knows_its_holder_and_vanishes_unused() -> None:
    lifecycle = locks.Lifecycle()
    order = []

    async def second() -> None:
        async with lifecycle.hold("vm", "op-2"):
            order.append(lifecycle.holder("vm"))

    async with lifecycle.hold("vm", "op-1"):
        order.append(lifecycle.holder("vm"))
        waiting = asyncio.create_task(second())
        await asyncio.sleep(0)
        assert lifecycle.holder("other") is None
    await waiting
    assert order == ["op-1", "op-2"]
    assert lifecycle.holder("vm") is None
    assert lifecycle.is_unused


async def test_giving_up_on_a_lock_leaves_it_usable() -> None:
    lifecycle = locks.Lifecycle()

    async def want() -> None:
        async with lifecycle.hold("vm", "op-2"):
            pytest.fail("the lock is held")

    async with lifecycle.hold("vm", "op-1"):
        waiting = asyncio.create_task(want())
        await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
    async with asyncio.timeout(30), lifecycle.hold("vm", "op-3"):
        assert lifecycle.holder("vm") == "op-3"
    assert lifecycle.is_unused
