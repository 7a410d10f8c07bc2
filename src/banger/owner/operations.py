# SPDX-License-Identifier: MIT
"""Long work: tasks that outlive the request, can be watched from their first event on, and cancelled."""

from __future__ import annotations

import asyncio
import contextvars
import datetime
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from banger.contract import errors, names, resources

_log = logging.getLogger(__name__)

Outcome = resources.Vm | resources.Image | resources.Kernel | None
_KEPT: Final = 200
_MOST_EVENTS: Final = 5000

current_op_id: contextvars.ContextVar[str] = contextvars.ContextVar("current_op_id", default="")
"""The operation that this task works for; greps in the journal of both services."""


@dataclass(slots=True)
class _Entry:
    operation: resources.Operation
    zero: float = field(default_factory=time.monotonic)
    events: list[resources.Event] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    task: asyncio.Task[None] | None = None


class Progress:
    """What the work of an operation tells its watchers. Never blocks, never raises."""

    def __init__(self, entry: _Entry) -> None:
        self._entry = entry

    @property
    def op_id(self) -> str:
        return self._entry.operation.id

    def stage(self, stage: str, detail: str = "") -> None:
        operation = self._entry.operation
        self._entry.operation = msgspec.structs.replace(operation, stage=stage, detail=detail)
        self._add("stage", stage=stage, detail=detail)

    def progress(self, current: int, total: int, detail: str = "") -> None:
        operation = self._entry.operation
        self._add("progress", stage=operation.stage, detail=detail, current=current, total=total)

    def note(self, text: str) -> None:
        self._add("note", stage=self._entry.operation.stage, detail=text)

    def line(self) -> Callable[[str], None]:
        """A `note` for blocking work in another thread."""
        loop = asyncio.get_running_loop()

        def say(text: str) -> None:
            loop.call_soon_threadsafe(self.note, text)

        return say

    def end(self, operation: resources.Operation) -> None:
        self._entry.operation = operation
        self._add("end", stage=operation.stage, result=operation)

    def _add(
        self,
        kind: str,
        *,
        stage: str = "",
        detail: str = "",
        current: int = 0,
        total: int = 0,
        result: resources.Operation | None = None,
    ) -> None:
        entry = self._entry
        if len(entry.events) >= _MOST_EVENTS and kind != "end":
            return
        entry.events.append(
            resources.Event(
                operation=entry.operation.id,
                seq=len(entry.events),
                time=_now(),
                kind=kind,
                stage=stage,
                detail=detail,
                current=current,
                total=total,
                elapsed_ms=round((time.monotonic() - entry.zero) * 1000, 1),
                result=result,
            )
        )
        asyncio.get_running_loop().create_task(_notify(entry))


Work = Callable[[Progress], Awaitable[Outcome]]


class Operations:
    """The registry. It owns every task it starts; `close` ends them all."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def start(self, kind: str, target: str, work: Work) -> resources.Operation:
        """Runs `work` as a task of its own and answers at once."""
        operation = resources.Operation(
            id=names.new_id(),
            kind=kind,
            target=target,
            status=resources.OperationStatus.RUNNING,
            created_at=_now(),
        )
        entry = _Entry(operation)
        self._entries[operation.id] = entry
        self._forget_old()
        entry.task = asyncio.create_task(_run(entry, work), name=f"{kind}-{operation.id}")
        return operation

    def list(self) -> list[resources.Operation]:
        return [entry.operation for entry in self._entries.values()]

    def get(self, operation_id: str) -> resources.Operation:
        return self._entry(operation_id).operation

    async def wait(self, operation_id: str) -> resources.Operation:
        """The operation once it has ended, however it ended."""
        entry = self._entry(operation_id)
        async with entry.changed:
            await entry.changed.wait_for(lambda: entry.operation.status.is_final)
        return entry.operation

    async def cancel(self, operation_id: str) -> resources.Operation:
        """Cancels and returns when it has ended, with all it rolled back; an ended one is left as it is."""
        entry = self._entry(operation_id)
        if entry.task is not None and not entry.task.done():
            entry.task.cancel()
            await asyncio.wait({entry.task})
        return entry.operation

    async def events(self, operation_id: str) -> AsyncIterator[resources.Event]:
        """Every event from the first on; ends after the one of kind `end`."""
        entry = self._entry(operation_id)
        seen = 0
        while True:
            async with entry.changed:
                while len(entry.events) == seen:
                    await entry.changed.wait()
            for event in entry.events[seen:]:
                seen += 1
                yield event
                if event.kind == "end":
                    return

    async def close(self) -> None:
        """Cancels what runs and waits until it has rolled back."""
        tasks = [entry.task for entry in self._entries.values() if entry.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _entry(self, operation_id: str) -> _Entry:
        entry = self._entries.get(operation_id)
        if entry is None:
            raise errors.NotFoundError(f"there is no operation {operation_id!r}")
        return entry

    def _forget_old(self) -> None:
        ended = [key for key, entry in self._entries.items() if entry.operation.status.is_final]
        for key in ended[: max(0, len(self._entries) - _KEPT)]:
            del self._entries[key]


async def _run(entry: _Entry, work: Work) -> None:
    current_op_id.set(entry.operation.id)
    progress = Progress(entry)
    began = entry.operation
    _log.info("operation began", extra={"kind": began.kind, "target": began.target})
    ended = msgspec.structs.replace(
        began,
        status=resources.OperationStatus.FAILED,
        error=errors.ErrorBody("operation_failed", "the operation ended without a result"),
    )
    try:
        ended = _with_outcome(entry.operation, await work(progress))
    except asyncio.CancelledError as error:
        known = errors.CancelledError(f"{began.kind} of {began.target} was cancelled")
        for note in getattr(error, "__notes__", ()):
            known.add_note(note)
        ended = _failed(entry.operation, known, resources.OperationStatus.CANCELLED)
    except Exception as error:
        if not isinstance(error, errors.BangerError):
            _log.exception("unexpected error in an operation")
        ended = _failed(entry.operation, error, resources.OperationStatus.FAILED)
    finally:
        ended = msgspec.structs.replace(ended, ended_at=_now())
        _log.info(
            "operation ended",
            extra={
                "kind": ended.kind,
                "target": ended.target,
                "status": str(ended.status),
                "error": ended.error.message if ended.error else "",
                "elapsed_ms": round((time.monotonic() - entry.zero) * 1000, 1),
            },
        )
        progress.end(ended)


async def _notify(entry: _Entry) -> None:
    async with entry.changed:
        entry.changed.notify_all()


def _with_outcome(operation: resources.Operation, outcome: Outcome) -> resources.Operation:
    done = msgspec.structs.replace(operation, status=resources.OperationStatus.SUCCEEDED)
    match outcome:
        case resources.Vm():
            return msgspec.structs.replace(done, vm=outcome)
        case resources.Image():
            return msgspec.structs.replace(done, image=outcome)
        case resources.Kernel():
            return msgspec.structs.replace(done, kernel=outcome)
        case None:
            return done


def _failed(
    operation: resources.Operation, error: Exception, status: resources.OperationStatus
) -> resources.Operation:
    step = getattr(error, "step", "")
    return msgspec.structs.replace(
        operation, status=status, error=errors.to_body(error, op_id=operation.id, step=step)
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
