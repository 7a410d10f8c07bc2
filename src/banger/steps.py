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
    if cancelled is not None:
        with contextlib.suppress(BaseException):
            task.result()
        raise cancelled
    return task.result()


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
        except Exception as undo_error:
            error.add_note(f"{name}: {str(undo_error) or type(undo_error).__name__}")


async def _observed(step: Step, name: str, action: Action, observer: Observer) -> None:
    began = time.monotonic()
    observer.began(step, name)
    try:
        await action()
    except BaseException as error:
        observer.ended(step, name, time.monotonic() - began, error)
        raise
    observer.ended(step, name, time.monotonic() - began, None)
