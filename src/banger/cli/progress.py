# SPDX-License-Identifier: MIT
"""Watches operations to their end and shows how far they are, always on stderr: stdout is for results.

On a terminal a live display, in a pipe a line per stage, with `--json` a JSON object per event.
"""

from __future__ import annotations

import collections
import dataclasses
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec

from banger.cli import client, exits, render, signals
from banger.contract import errors, resources

_SILENCE_S: Final = 3600.0
"""Work that says how far it is may take as long as it likes: a pull over a slow line does."""
_FILES_BESIDES: Final = 32
"""What a command has open besides a connection for each operation."""


@dataclasses.dataclass(slots=True)
class Timing:
    """How long each stage of one operation took, from the events alone."""

    stages: list[tuple[str, float]] = dataclasses.field(default_factory=list)
    _since_ms: float = 0.0
    _stage: str = ""

    def hear(self, event: resources.Event) -> None:
        goes_on = event.kind == "stage" and event.stage == self._stage
        if event.kind not in {"stage", "end"} or goes_on:
            return
        if self._stage:
            self.stages.append((self._stage, event.elapsed_ms - self._since_ms))
        self._stage, self._since_ms = event.stage if event.kind == "stage" else "", event.elapsed_ms

    def text(self) -> str:
        return ", ".join(f"{render.safe(stage)} {render.elapsed(took)}" for stage, took in self.stages)


class Display(Protocol):
    """Shows events of one or several operations."""

    def hear(self, operation: resources.Operation, event: resources.Event, /) -> None: ...

    def close(self) -> None: ...


class Silent:
    """For what the user did not ask for, such as tidying up."""

    def hear(self, operation: resources.Operation, event: resources.Event) -> None:
        return

    def close(self) -> None:
        return


class Lines:
    """A line for each stage as it begins: what is shown last is what is going on."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}

    def hear(self, operation: resources.Operation, event: resources.Event) -> None:
        if event.kind == "end" or not self._is_news(operation, event):
            return
        name = event.stage or event.kind
        detail = event.detail or (operation.target if event.kind == "stage" else "")
        if event.total and event.kind == "progress":
            detail = f"{detail} {100 * event.current // event.total}%".strip()
        line = f"{name:<22} {render.safe(detail):<32} {render.elapsed(event.elapsed_ms)}"
        print(line, file=sys.stderr, flush=True)

    def _is_news(self, operation: resources.Operation, event: resources.Event) -> bool:
        """Of a count only every tenth of the whole, or where nobody knows that, only that it began."""
        if event.kind == "note":
            return True
        tenth = f"{event.stage} {event.detail} {10 * event.current // event.total if event.total else 0}"
        if event.kind == "progress" and self._shown.get(operation.id) == tenth:
            return False
        self._shown[operation.id] = tenth
        return True

    def close(self) -> None:
        return


class JsonLines:
    """Each event as the daemon sent it."""

    def hear(self, operation: resources.Operation, event: resources.Event) -> None:
        print(render.json_text(msgspec.json.encode(event)), file=sys.stderr, flush=True)

    def close(self) -> None:
        return


def display(*, json: bool) -> Display:
    """The one that fits where stderr goes."""
    if json:
        return JsonLines()
    if sys.stderr.isatty():
        from banger.cli import live

        return live.Live()
    return Lines()


@dataclasses.dataclass(slots=True)
class Outcome:
    """How an operation ended. `operation.error` says why it failed."""

    operation: resources.Operation
    timing: Timing

    def require(self) -> resources.Operation:
        """Raises the operation's error unless it succeeded."""
        ended = self.operation
        if ended.status is resources.OperationStatus.SUCCEEDED:
            return ended
        if ended.status is resources.OperationStatus.CANCELLED:
            raise cancelled(ended)
        if ended.error is None:
            raise errors.OperationFailedError(f"{ended.kind} of {ended.target} failed", op_id=ended.id)
        error = client.failure(ended.error)
        error.fields.setdefault("op_id", ended.id)
        raise error


def cancelled(operation: resources.Operation) -> errors.CancelledError:
    told = f"`banger vm explain {operation.target}` says how it is now"
    hint = told if operation.kind in {"vm.start", "vm.restart"} else ""
    error = errors.CancelledError(f"{operation.kind} of {operation.target} was cancelled", hint=hint)
    error.fields["op_id"] = operation.id
    if operation.error is not None:
        for undone in operation.error.also:
            error.add_note(undone)
    return error


_Heard = tuple[int, resources.Event | BaseException]


class _Watch:
    """A thread per event stream; their events meet in one queue."""

    def __init__(
        self, api: client.Client, operations: Sequence[resources.Operation], *, bound: bool
    ) -> None:
        self.heard: queue.SimpleQueue[_Heard] = queue.SimpleQueue()
        if len(operations) > 1:
            _allow_files(len(operations) + _FILES_BESIDES)
        for index, operation in enumerate(operations):
            arguments = (api, index, operation.id, bound)
            threading.Thread(target=self._read, args=arguments, daemon=True).start()

    def _read(self, api: client.Client, index: int, operation_id: str, bound: bool) -> None:
        try:
            for event in api.events(operation_id, cancel_on_disconnect=bound):
                self.heard.put((index, event))
                if event.kind == "end":
                    return
            text = "bangerd went away while the operation was running"
            raise errors.UnavailableError(text, hint="`banger vm list` shows what became of it")
        except BaseException as error:
            self.heard.put((index, error))


def _allow_files(count: int) -> None:
    """The limit that a shell sets is for programs that use select(2), and may be raised: getrlimit(2)."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < room:
        resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))


Submit = Callable[[], Sequence[resources.Operation]]
_Ended = Outcome | errors.BangerError


def follow(api: client.Client, submit: Submit, shown: Display, *, cancellable: bool) -> list[_Ended]:
    """Submits operations and waits for all. What ends us cancels what can be cancelled, rolled back and all.

    Signals wait while `submit` runs: only its answer names what there is to cancel. With `cancellable` the
    daemon also cancels what runs when this process dies.
    """
    operations: Sequence[resources.Operation] = ()
    outcomes: dict[int, _Ended] = {}
    timings: dict[int, Timing] = collections.defaultdict(Timing)
    try:
        with signals.held_back():
            operations = submit()
        _collect(_Watch(api, operations, bound=cancellable), operations, shown, timings, outcomes)
    except (KeyboardInterrupt, exits.SignalledError) as end:
        if not cancellable:
            hint = "bangerd finishes it; `banger vm list` shows the outcome"
            raise errors.CancelledError("interrupted, not waiting any longer", hint=hint) from None
        shown.close()
        render.note("cancelling, and taking back what was made …")
        for index, operation in enumerate(operations):
            if index not in outcomes:
                outcomes[index] = Outcome(api.cancel(operation.id), timings[index])
        if isinstance(end, exits.SignalledError):
            raise
    finally:
        shown.close()
    return [outcomes[index] for index in range(len(operations))]


def _collect(
    watch: _Watch,
    operations: Sequence[resources.Operation],
    shown: Display,
    timings: dict[int, Timing],
    outcomes: dict[int, _Ended],
) -> None:
    while len(outcomes) < len(operations):
        try:
            index, heard = watch.heard.get(timeout=_SILENCE_S)
        except queue.Empty:
            raise errors.DeadlineError(
                f"bangerd has said nothing of it for {render.span(_SILENCE_S)}",
                hint="`banger ps` shows whether it goes on, `journalctl -u bangerd` what happened",
            ) from None
        if isinstance(heard, errors.BangerError):
            heard.fields.setdefault("op_id", operations[index].id)
            outcomes[index] = heard
        elif isinstance(heard, BaseException):
            raise heard
        else:
            timings[index].hear(heard)
            shown.hear(operations[index], heard)
            if heard.kind == "end":
                ended = heard.result or operations[index]
                outcomes[index] = Outcome(ended, timings[index])


def follow_one(
    api: client.Client, submit: Callable[[], resources.Operation], shown: Display, *, cancellable: bool
) -> Outcome:
    (outcome,) = follow(api, lambda: [submit()], shown, cancellable=cancellable)
    if isinstance(outcome, errors.BangerError):
        raise outcome
    return outcome
