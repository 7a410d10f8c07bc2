# SPDX-License-Identifier: MIT
"""What is shown of work that goes on: on a terminal, and in a pipe."""

from __future__ import annotations

import datetime
import queue
import re
import types
from collections.abc import Iterator
from typing import Any

import pytest

from banger.cli import client, live, progress, vm_life, workspaces
from banger.contract import errors, resources


def test_layers_are_shown_beside_their_sum() -> None:
    track = live._Track("pull")
    track.hear(_event("stage", stage="pull_image"))
    for name, current, total in (
        ("layer 1 of 2", 3, 10),
        ("layer 2 of 2", 9, 10),
        ("layers", 12, 20),
        ("layer 1 of 2", 10, 10),
        ("layers", 19, 20),
    ):
        track.hear(_event("progress", stage="pull_image", detail=name, current=current, total=total))
    (stage,) = track.stages
    assert (stage.detail, stage.share) == ("layers", "95%")
    assert [row[1].plain for row in stage.part_rows()] == ["  layer 2 of 2 90%"]
    track.hear(_event("stage", stage="build_image"))
    assert list(stage.part_rows()) == []


def test_a_note_is_not_what_a_stage_counts() -> None:
    track = live._Track("web")
    track.hear(_event("stage", stage="preflight", detail="checking"))
    track.hear(_event("note", stage="preflight", detail="still waiting for the root helper"))
    assert [(stage.detail, stage.share) for stage in track.stages] == [("checking", "")]


class Heard:
    """A display that keeps what it hears."""

    def __init__(self) -> None:
        self.events: list[resources.Event] = []

    def hear(self, operation: resources.Operation, event: resources.Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        return


@pytest.mark.parametrize(("total_mib", "share"), [(0, "592 MiB"), (800, "74%")])
def test_much_that_is_copied_stays_one_row(total_mib: int, share: str) -> None:
    """A row for every few MiB would fill the screen, and then the screen would stand still."""
    heard = Heard()
    report = workspaces.Report("vm.cp", "web", heard)
    for at_mib in range(600):
        report("copying", at_mib << 20, total_mib << 20)
    track = live._Track("web")
    for event in heard.events:
        track.hear(event)
    (stage,) = track.stages
    assert stage.row(stage.began)[1].plain == f"copying {share}"
    assert list(stage.part_rows()) == []


@pytest.mark.parametrize(
    ("total_mib", "shown"),
    [(0, ["copying"]), (600, ["copying", *(f"copying {tenth}0%" for tenth in range(1, 10))])],
)
def test_much_that_is_copied_is_a_line_for_each_tenth_in_a_pipe(
    total_mib: int, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    report = workspaces.Report("vm.cp", "web", progress.Lines())
    for at_mib in range(600):
        report("copying", at_mib << 20, total_mib << 20)
    said = [re.split(r"  +", line)[1] for line in capsys.readouterr().err.splitlines()]
    assert said == shown


def test_a_stage_that_goes_on_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    timing = progress.Timing()
    for number, stage in enumerate(("pull_image", "pull_image", "preflight", "")):
        timing.hear(_event("stage" if stage else "end", stage=stage, elapsed_ms=20.0 * number))
    vm_life.say_timing(progress.Outcome(_operation(), timing), json=False)
    assert capsys.readouterr().err == "banger: web: 0.06s (pull_image 0.04s, preflight 0.02s)\n"


def _operation() -> resources.Operation:
    return resources.Operation(
        id="0123456789ab",
        kind="vm.create",
        target="web",
        status=resources.OperationStatus.SUCCEEDED,
        created_at=datetime.datetime.fromtimestamp(0, datetime.UTC),
    )


def _event(kind: str, **fields: Any) -> resources.Event:
    now = datetime.datetime.now(datetime.UTC)
    return resources.Event(operation="0123456789ab", seq=0, time=now, kind=kind, **fields)


class SlowlyHeard:
    """Each event comes half an hour after the one before, unless nobody waits for so long."""

    def __init__(self, events: list[resources.Event]) -> None:
        self._events: Iterator[resources.Event] = iter(events)

    def get(self, timeout: float) -> tuple[int, resources.Event]:
        event = next(self._events, None) if timeout >= 1800 else None
        if event is None:
            raise queue.Empty
        return 0, event


@pytest.mark.parametrize("ends", [True, False])
def test_what_goes_on_is_waited_for_and_what_is_silent_is_not(
    ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pull over a slow line takes hours, and was cancelled after one."""
    layers = [_event("progress", stage="pull_image", current=done, total=9) for done in range(9)]
    slow = SlowlyHeard([_event("stage", stage="pull_image"), *layers, *([_event("end")] if ends else [])])
    monkeypatch.setattr(progress, "_Watch", lambda *_, **__: types.SimpleNamespace(heard=slow))
    api = client.Client("/nowhere")

    def follow() -> progress.Outcome:
        return progress.follow_one(api, _operation, progress.Silent(), cancellable=True)

    if ends:
        assert follow().operation == _operation()
    else:
        with pytest.raises(errors.DeadlineError, match="said nothing"):
            follow()
