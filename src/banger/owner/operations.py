# SPDX-License-Identifier: MIT
"""Long work: tasks that outlive the request, can be watched from their first event on, and cancelled."""

from __future__ import annotations

import asyncio
import contextvars
import datetime
import logging
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from banger.contract import errors, names, resources
from banger.owner import events

_log = logging.getLogger(__name__)

Outcome = resources.Vm | resources.Image | resources.Kernel | None
_KEPT: Final = 200
_KEPT_FOR_S: Final = 3600.0
_KEPT_AT_LEAST_S: Final = 120.0
"""Who asks for hundreds of operations at once looks only then how the first have ended."""
_MOST: Final = names.MAX_SLOTS + _KEPT
"""One for each VM that there may be, and no more whatever a client asks for in a minute."""
_CLOSE_S: Final = 45.0

current_op_id: contextvars.ContextVar[str] = contextvars.ContextVar("current_op_id", default="")
"""The operation, or the request, that this task works for; greps in the journal of both services."""


@dataclass(slots=True)
class _Entry:
    operation: resources.Operation
    zero: float = field(default_factory=time.monotonic)
    events: events.EventLog = field(default_factory=events.EventLog)
    has_begun: bool = False
    cancel_requested: bool = False
    task: asyncio.Task[None] | None = None
    ended_at: float = math.inf
    """On the monotonic clock: setting the host's clock makes no operation unknown that just ended."""

    @property
    def is_final(self) -> bool:
        return self.operation.status.is_final


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
        if entry.is_final and kind != "end":
            return
        entry.events.add(
            resources.Event(
                operation=entry.operation.id,
                seq=entry.events.next_seq,
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


Work = Callable[[Progress], Awaitable[Outcome]]
_current: contextvars.ContextVar[Progress | None] = contextvars.ContextVar("current", default=None)


def note(text: str) -> None:
    """Tells the watchers of the operation that this task works for; nobody when it works for none."""
    progress = _current.get()
    if progress is not None:
        progress.note(text)


class Operations:
    """The registry. It owns every task it starts; `close` ends them all."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._closing = False

    def start(self, kind: str, target: str, work: Work) -> resources.Operation:
        """Runs `work` as a task of its own and answers at once. Raises UnavailableError while closing."""
        self.require_open()
        operation = resources.Operation(
            id=names.new_id(),
            kind=kind,
            target=target,
            status=resources.OperationStatus.RUNNING,
            created_at=_now(),
        )
        entry = _Entry(operation)
        self._forget_old()
        self._entries[operation.id] = entry
        entry.task = asyncio.create_task(_run(entry, work), name=f"{kind}-{operation.id}")
        return operation

    def require_open(self) -> None:
        """Raises UnavailableError while closing: what is made for an operation must not stay without it."""
        if self._closing:
            raise errors.UnavailableError("bangerd is stopping", hint="try again when it is back")

    @property
    def is_closing(self) -> bool:
        return self._closing

    def list(self) -> list[resources.Operation]:
        return [entry.operation for entry in self._entries.values()]

    def get(self, operation_id: str) -> resources.Operation:
        """Raises NotFoundError, also for one that ended long ago."""
        return self._entry(operation_id).operation

    async def wait(self, operation_id: str) -> resources.Operation:
        """The operation once it has ended, however it ended."""
        entry = self._entry(operation_id)
        while not entry.is_final:
            await entry.events.changed()
        return entry.operation

    def request_cancel(self, operation_id: str) -> None:
        """Cancels without waiting for the end; an operation that ended, or was cancelled before, is left."""
        _request_cancel(self._entry(operation_id))

    async def cancel(self, operation_id: str) -> resources.Operation:
        """Cancels and returns when it has ended, with all it made rolled back."""
        self.request_cancel(operation_id)
        return await self.wait(operation_id)

    def events(self, operation_id: str) -> AsyncIterator[resources.Event]:
        """Every event from the first on; ends after the one of kind `end`."""
        return self._entry(operation_id).events.watch()

    async def close(self) -> None:
        """Starts nothing more, cancels what runs and waits, up to a limit, until it has rolled back."""
        self._closing = True
        running = [entry for entry in self._entries.values() if not entry.is_final]
        for entry in running:
            _request_cancel(entry)
        tasks = [entry.task for entry in running if entry.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_S)
        for entry in running:
            if not entry.is_final:
                _log.error("operation did not end in time", extra=_labels(entry.operation))

    def _entry(self, operation_id: str) -> _Entry:
        entry = self._entries.get(operation_id)
        if entry is None:
            raise errors.NotFoundError(f"there is no operation {operation_id!r}")
        return entry

    def _forget_old(self) -> None:
        """Ended ones are kept for an hour, and of those that did not just end at most so many."""
        ended = [entry for entry in self._entries.values() if entry.is_final]
        now = time.monotonic()
        surplus = len(ended) - _KEPT
        for number, entry in enumerate(ended):
            kept_s = _KEPT_AT_LEAST_S if number < surplus else _KEPT_FOR_S
            if entry.ended_at <= now - kept_s or number < len(ended) - _MOST:
                del self._entries[entry.operation.id]


def _request_cancel(entry: _Entry) -> None:
    """Once only: what a cancelled operation takes back must not be cancelled again."""
    if entry.cancel_requested or entry.is_final:
        return
    entry.cancel_requested = True
    # A task that is cancelled before its first step never runs, and its operation would never end.
    if entry.has_begun and entry.task is not None:
        entry.task.cancel()


async def _run(entry: _Entry, work: Work) -> None:
    entry.has_begun = True
    current_op_id.set(entry.operation.id)
    progress = Progress(entry)
    _current.set(progress)
    began = entry.operation
    _log.info("operation began", extra=_labels(began))
    ended = msgspec.structs.replace(
        began,
        status=resources.OperationStatus.FAILED,
        error=errors.ErrorBody("operation_failed", "the operation ended without a result"),
    )
    if entry.cancel_requested and entry.task is not None:
        entry.task.cancel()
    try:
        outcome = await work(progress)
        ended = _with_outcome(entry.operation, outcome)
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
                **_labels(ended),
                "status": str(ended.status),
                "error": ended.error.message if ended.error else "",
                "elapsed_ms": round((time.monotonic() - entry.zero) * 1000, 1),
            },
        )
        entry.ended_at = time.monotonic()
        progress.end(ended)


def _labels(operation: resources.Operation) -> dict[str, str]:
    return {"kind": operation.kind, "target": operation.target}


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
