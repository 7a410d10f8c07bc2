# SPDX-License-Identifier: MIT
"""The pipeline driver, on lists of steps of the tests' own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from banger import steps


class Trace:
    """Hears every step, in order."""

    def __init__(self) -> None:
        self.began_names: list[str] = []
        self.ended_names: list[tuple[str, str]] = []
        self.elapsed_s: dict[str, float] = {}

    def began(self, step: steps.Step, name: str) -> None:
        assert name in (step.name, f"rollback_{step.name}")
        self.began_names.append(name)

    def ended(self, step: steps.Step, name: str, elapsed_s: float, error: BaseException | None) -> None:
        self.ended_names.append((name, type(error).__name__ if error else ""))
        self.elapsed_s[name] = elapsed_s


class Pipeline:
    """Builds steps that note what they do; `done` is what the world saw."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.trace = Trace()
        self.steps: list[steps.Step] = []
        self._moved = asyncio.Condition()

    async def reach(self, name: str) -> None:
        """Until this step or undo has been entered."""
        async with asyncio.timeout(30), self._moved:
            await self._moved.wait_for(lambda: self.done[-1:] == [name])

    async def _enter(self, name: str) -> None:
        async with self._moved:
            self.done.append(name)
            self._moved.notify_all()

    def add(
        self,
        name: str,
        *,
        run: Callable[[], Awaitable[None]] | None = None,
        undo: Callable[[], Awaitable[None]] | None = None,
        undoable: bool = True,
    ) -> None:
        async def run_it() -> None:
            await self._enter(name)
            if run is not None:
                await run()

        async def undo_it() -> None:
            await self._enter(f"-{name}")
            if undo is not None:
                await undo()

        self.steps.append(steps.Step(name, run_it, undo_it if undoable else None))

    async def drive(self, *, undo_timeout_s: float = 5.0) -> None:
        await steps.run(self.steps, self.trace, undo_timeout_s=undo_timeout_s)


def raising(error: BaseException) -> Callable[[], Awaitable[None]]:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise error

    return fail


async def forever() -> None:
    await asyncio.Event().wait()


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline()


async def test_zero_steps() -> None:
    await steps.run([], Trace())


async def test_steps_run_in_order_and_nothing_is_undone(pipeline: Pipeline) -> None:
    for name in "abc":
        pipeline.add(name)
    await pipeline.drive()
    assert pipeline.done == ["a", "b", "c"]
    assert pipeline.trace.began_names == ["a", "b", "c"]
    assert pipeline.trace.ended_names == [("a", ""), ("b", ""), ("c", "")]


@pytest.mark.parametrize("broken", range(4))
async def test_the_failing_step_is_rolled_back_too(pipeline: Pipeline, broken: int) -> None:
    for number, name in enumerate("abcd"):
        pipeline.add(name, run=raising(ValueError("no")) if number == broken else None)
    with pytest.raises(ValueError, match="no"):
        await pipeline.drive()
    entered = list("abcd"[: broken + 1])
    assert pipeline.done == entered + [f"-{name}" for name in reversed(entered)]


async def test_a_step_without_undo_is_passed_over(pipeline: Pipeline) -> None:
    pipeline.add("a")
    pipeline.add("b", undoable=False)
    pipeline.add("c", run=raising(ValueError("no")), undoable=False)
    with pytest.raises(ValueError, match="no"):
        await pipeline.drive()
    assert pipeline.done == ["a", "b", "c", "-a"]
    assert pipeline.trace.began_names == ["a", "b", "c", "rollback_a"]


async def test_the_observer_hears_of_each_failure(pipeline: Pipeline) -> None:
    pipeline.add("a", undo=raising(OSError("stuck")))
    pipeline.add("b", run=raising(ValueError("no")))
    with pytest.raises(ValueError, match="no"):
        await pipeline.drive()
    assert pipeline.trace.ended_names == [
        ("a", ""),
        ("b", "ValueError"),
        ("rollback_b", ""),
        ("rollback_a", "OSError"),
    ]
    assert all(seconds >= 0 for seconds in pipeline.trace.elapsed_s.values())


async def test_failing_undos_are_noted_on_the_first_error(pipeline: Pipeline) -> None:
    pipeline.add("a", undo=raising(OSError("a is stuck")))
    pipeline.add("b")
    pipeline.add("c", undo=raising(KeyError()))
    pipeline.add("d", run=raising(ValueError("no")), undo=raising(RuntimeError("d is stuck")))
    with pytest.raises(ValueError, match="no") as caught:
        await pipeline.drive()
    assert pipeline.done == ["a", "b", "c", "d", "-d", "-c", "-b", "-a"]
    assert caught.value.__notes__ == [
        "rollback_d: d is stuck",
        "rollback_c: KeyError",
        "rollback_a: a is stuck",
    ]


async def test_every_member_of_a_group_is_reported(pipeline: Pipeline) -> None:
    noted = OSError("second")
    noted.add_note("with a note")
    pipeline.add("a", undo=raising(ExceptionGroup("two", [OSError("first"), noted])))
    pipeline.add("b", run=raising(ValueError("no")))
    with pytest.raises(ValueError, match="no") as caught:
        await pipeline.drive()
    assert caught.value.__notes__ == ["rollback_a: first; second; with a note"]


async def test_a_hanging_undo_is_ended_and_the_others_run(pipeline: Pipeline) -> None:
    pipeline.add("a")
    pipeline.add("b", undo=forever)
    pipeline.add("c", run=raising(ValueError("no")))
    with pytest.raises(ValueError, match="no") as caught:
        await pipeline.drive(undo_timeout_s=0.02)
    assert pipeline.done == ["a", "b", "c", "-c", "-b", "-a"]
    assert caught.value.__notes__ == ["rollback_b: did not finish within 0.02 s"]


async def test_a_time_limit_inside_an_undo_keeps_its_words(pipeline: Pipeline) -> None:
    pipeline.add("a", undo=raising(TimeoutError("the device stayed busy")))
    pipeline.add("b", run=raising(ValueError("no")))
    with pytest.raises(ValueError, match="no") as caught:
        await pipeline.drive()
    assert caught.value.__notes__ == ["rollback_a: the device stayed busy"]


@pytest.mark.parametrize("error", [asyncio.CancelledError(), SystemError("odd"), GeneratorExit()])
async def test_an_undo_that_ends_oddly_does_not_keep_the_others(
    pipeline: Pipeline, error: BaseException
) -> None:
    pipeline.add("a")
    pipeline.add("b", undo=raising(error))
    pipeline.add("c", run=raising(ValueError("no")))
    with pytest.raises(ValueError, match="no") as caught:
        await pipeline.drive()
    assert pipeline.done[-1] == "-a"
    assert len(caught.value.__notes__) == 1


async def test_a_base_exception_rolls_back(pipeline: Pipeline) -> None:
    class Interrupt(BaseException):
        pass

    pipeline.add("a")
    pipeline.add("b", run=raising(Interrupt()))
    with pytest.raises(Interrupt):
        await pipeline.drive()
    assert pipeline.done == ["a", "b", "-b", "-a"]


async def test_cancelling_rolls_back(pipeline: Pipeline) -> None:
    pipeline.add("a")
    pipeline.add("b", run=forever)
    pipeline.add("c")
    task = asyncio.create_task(pipeline.drive())
    await pipeline.reach("b")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pipeline.done == ["a", "b", "-b", "-a"]


async def test_cancelling_before_the_first_step_does_nothing(pipeline: Pipeline) -> None:
    pipeline.add("a")
    task = asyncio.create_task(pipeline.drive())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pipeline.done == []


async def test_the_rollback_cannot_be_cancelled(pipeline: Pipeline) -> None:
    release = asyncio.Event()

    async def wait() -> None:
        await release.wait()

    pipeline.add("a")
    pipeline.add("b", undo=wait)
    pipeline.add("c", run=raising(ValueError("no")))
    task = asyncio.create_task(pipeline.drive())
    await pipeline.reach("-b")
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    release.set()
    with pytest.raises(ValueError, match="no") as caught:
        await task
    assert pipeline.done == ["a", "b", "c", "-c", "-b", "-a"]
    assert not hasattr(caught.value, "__notes__")


async def test_cancelled_twice_rolls_back_once(pipeline: Pipeline) -> None:
    release = asyncio.Event()

    async def wait() -> None:
        await release.wait()

    pipeline.add("a", undo=wait)
    pipeline.add("b", run=forever)
    task = asyncio.create_task(pipeline.drive())
    await pipeline.reach("b")
    task.cancel()
    await pipeline.reach("-a")
    task.cancel()
    await asyncio.sleep(0)
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pipeline.done == ["a", "b", "-b", "-a"]


async def test_a_loop_that_shuts_down_still_runs_every_undo(pipeline: Pipeline) -> None:
    """It cancels each task by name, the one that rolls back included: only the undo under way is lost."""
    pipeline.add("a")
    pipeline.add("b", undo=forever)
    pipeline.add("c", run=raising(ValueError("no")))
    before = asyncio.all_tasks()
    task = asyncio.create_task(pipeline.drive())
    await pipeline.reach("-b")
    for other in asyncio.all_tasks() - before:
        other.cancel()
    with pytest.raises(ValueError, match="no") as caught:
        await task
    assert pipeline.done == ["a", "b", "c", "-c", "-b", "-a"]
    assert caught.value.__notes__ == ["rollback_b: CancelledError"]


async def test_a_pipeline_inside_a_step(pipeline: Pipeline) -> None:
    inner = Pipeline()
    inner.add("x", undo=raising(OSError("x is stuck")))
    inner.add("y", run=raising(ValueError("no")))
    pipeline.add("a")
    pipeline.add("b", run=inner.drive)
    with pytest.raises(ValueError, match="no") as caught:
        await pipeline.drive()
    assert inner.done == ["x", "y", "-y", "-x"]
    assert pipeline.done == ["a", "b", "-b", "-a"]
    assert caught.value.__notes__ == ["rollback_x: x is stuck"]


# --- finish ---


async def test_finish_hands_over_result_and_error() -> None:
    async def seven() -> int:
        await asyncio.sleep(0)
        return 7

    async def fail() -> None:
        raise ValueError("no")

    assert await steps.finish(seven()) == 7
    with pytest.raises(ValueError, match="no"):
        await steps.finish(fail())


async def test_finish_awaits_its_work_although_cancelled() -> None:
    release, ended = asyncio.Event(), False

    async def work() -> None:
        nonlocal ended
        await release.wait()
        ended = True

    task = asyncio.create_task(steps.finish(work()))
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended


async def test_finish_notes_what_failed_while_it_was_cancelled() -> None:
    release = asyncio.Event()

    async def work() -> None:
        await release.wait()
        raise ValueError("too late")

    async def observed() -> list[str]:
        try:
            await steps.finish(work())
        except asyncio.CancelledError as error:
            return list(error.__notes__)
        return []

    task = asyncio.create_task(observed())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    release.set()
    assert await task == ["meanwhile: too late"]


async def test_cancelled_during_finish_the_step_ends_before_it_is_undone(pipeline: Pipeline) -> None:
    """A request under way at the helper is awaited; undoing earlier would race with it."""
    release = asyncio.Event()

    async def request() -> None:
        await release.wait()
        pipeline.done.append("made")

    async def run() -> None:
        await steps.finish(request())

    pipeline.add("a")
    pipeline.add("b", run=run)
    task = asyncio.create_task(pipeline.drive())
    await pipeline.reach("b")
    task.cancel()
    await asyncio.sleep(0)
    assert pipeline.done == ["a", "b"]
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pipeline.done == ["a", "b", "made", "-b", "-a"]


async def test_finish_passes_on_a_cancellation_of_the_work_itself() -> None:
    async def work() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await steps.finish(work())
