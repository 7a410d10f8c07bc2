# SPDX-License-Identifier: MIT
"""The pipeline driver: a list of steps, run in order, rolled back in reverse. Any list may be driven.

The step that fails is rolled back too, for it may have acquired something before it failed. An undo must be
safe on what was never made. An undo that fails is noted on the first error and stops nothing. Cancelling
rolls back as a failure does, and the rollback itself cannot be cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

T = TypeVar("T")
Action = Callable[[], Awaitable[None]]

UNDO_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of a pipeline. `stage` is what a client sees; a step without one is only logged."""

    name: str
    run: Action
    undo: Action | None = None
    stage: str = ""
    detail: str = ""
    attributes: Mapping[str, str | int] = field(default_factory=dict)


class Observer(Protocol):
    """Hears of every step. `rollback_<name>` is reported like a step. Must not raise."""

    def began(self, step: Step, name: str, /) -> None: ...

    def ended(self, step: Step, name: str, elapsed_s: float, error: BaseException | None, /) -> None: ...


async def run(steps: Sequence[Step], observer: Observer, *, undo_timeout_s: float = UNDO_TIMEOUT_S) -> None:
    """Runs every step, or none: the first error (or cancellation) is raised after all undos have run.

    Each undo has `undo_timeout_s` to finish. Failed undos are notes on the error that is raised.
    """
    entered: list[Step] = []
    try:
        for step in steps:
            entered.append(step)
            await _observed(step, step.name, step.run, observer)
    except BaseException as error:
        # A cancellation that arrives during the rollback must not hide what made it necessary.
        with contextlib.suppress(asyncio.CancelledError):
            await finish(_roll_back(entered, observer, error, undo_timeout_s))
        raise


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work` to its end even when the caller is cancelled meanwhile; the cancellation comes after.

    For what must not be left half way: rollbacks, and requests to the helper, which would go on without us.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
        except BaseException:
            if not task.done():
                raise
    if cancelled is None:
        return task.result()
    failure = None if task.cancelled() else task.exception()
    if failure is not None:
        cancelled.add_note(f"meanwhile: {_described(failure)}")
    raise cancelled


async def _roll_back(
    entered: Sequence[Step], observer: Observer, error: BaseException, undo_timeout_s: float
) -> None:
    for step in reversed(entered):
        if step.undo is None:
            continue
        name = f"rollback_{step.name}"
        try:
            async with asyncio.timeout(undo_timeout_s):
                await _observed(step, name, step.undo, observer)
        except TimeoutError as late:
            error.add_note(f"{name}: {str(late) or f'did not finish within {undo_timeout_s:g} s'}")
        # Not only Exception: an undo that ends by cancellation must not keep the others from running.
        except BaseException as undo_error:
            error.add_note(f"{name}: {_described(undo_error)}")


def _described(error: BaseException) -> str:
    """One line: what failed, the members of a group one by one, and what was noted on it."""
    if isinstance(error, BaseExceptionGroup):
        text = "; ".join(_described(member) for member in error.exceptions)
    else:
        text = str(error) or type(error).__name__
    return "; ".join((text, *getattr(error, "__notes__", ())))


async def _observed(step: Step, name: str, action: Action, observer: Observer) -> None:
    began = time.monotonic()
    observer.began(step, name)
    try:
        await action()
    except BaseException as error:
        observer.ended(step, name, time.monotonic() - began, error)
        raise
    observer.ended(step, name, time.monotonic() - began, None)
