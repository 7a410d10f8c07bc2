# SPDX-License-Identifier: MIT
"""The live display of operations on a terminal. Imported only when there is one: rich is slow to load."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator

import rich.console
import rich.live
import rich.spinner
import rich.table
import rich.text

from banger.cli import render
from banger.contract import resources, sizes


@dataclasses.dataclass(slots=True)
class _Stage:
    name: str
    detail: str
    began: float
    ended: float | None = None
    share: str = ""
    parts: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of what is counted in several parts, such as layers: those that go on beside the one in `detail`."""

    def count(self, event: resources.Event) -> None:
        whole = event.total > 0 and event.current >= event.total
        known = f"{100 * event.current // event.total}%" if event.total else ""
        self.share = known or sizes.text_of_bytes(event.current)
        self.detail = event.detail or self.detail
        self.parts.pop(self.detail, None)
        if event.total and not whole:
            self.parts[self.detail] = self.share

    def part_rows(self) -> Iterator[tuple[rich.text.Text, ...]]:
        for name, share in self.parts.items():
            if name != self.detail and self.ended is None:
                text = f"  {render.safe(name)} {share}"
                yield rich.text.Text(), rich.text.Text(text, style="dim", no_wrap=True), rich.text.Text()

    def row(self, now: float) -> tuple[rich.text.Text, rich.text.Text, rich.text.Text]:
        took = (self.ended if self.ended is not None else now) - self.began
        style = "dim" if self.ended is not None else ""
        detail = " ".join(part for part in (self.detail, self.share) if part)
        return (
            rich.text.Text(self.name, style=style),
            rich.text.Text(render.safe(detail), style="dim", overflow="ellipsis", no_wrap=True),
            rich.text.Text(f"{took:.1f}s", style=style, justify="right"),
        )


class _Track:
    """The stages of one operation so far. Clocks are ours: a stage must visibly go on between events."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.stages: list[_Stage] = []
        self.is_done = False

    def hear(self, event: resources.Event) -> None:
        now = time.monotonic()
        if event.kind in {"stage", "end"} and self.stages:
            self.stages[-1].ended = now
        if event.kind == "stage":
            self.stages.append(_Stage(render.safe(event.stage), event.detail, now))
        elif event.kind == "end":
            self.is_done = True
        elif event.kind == "progress" and self.stages:
            self.stages[-1].count(event)


class Live:
    """One operation shows all its stages, several show the one each is in; nothing stays on the screen."""

    def __init__(self) -> None:
        self._tracks: dict[str, _Track] = {}
        self._spinner = rich.spinner.Spinner("dots")
        console = rich.console.Console(file=sys.stderr, highlight=False)
        self._live = rich.live.Live(
            get_renderable=self._render,
            console=console,
            transient=True,
            refresh_per_second=10,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def hear(self, operation: resources.Operation, event: resources.Event) -> None:
        if not self._live.is_started:  # with nothing to show, other programs have the screen for themselves
            self._live.start()
        track = self._tracks.setdefault(operation.id, _Track(operation.target))
        if event.kind == "note":
            self._live.console.print(rich.text.Text(render.safe(event.detail)))
        track.hear(event)

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> rich.table.Table:
        grid = rich.table.Table.grid(padding=(0, 2))
        for row in self._rows(time.monotonic()):
            grid.add_row(*row)
        return grid

    def _rows(self, now: float) -> Iterator[tuple[rich.console.RenderableType, ...]]:
        tracks = list(self._tracks.values())
        many = len(tracks) > 1
        for track in tracks:
            for stage in track.stages[-1:] if many else track.stages:
                running = stage.ended is None and not track.is_done
                mark = self._spinner if running else rich.text.Text("✓", style="green")
                title = (rich.text.Text(render.safe(track.title)),) if many else ()
                yield (mark, *title, *stage.row(now))
                if not many:
                    yield from ((rich.text.Text(), *row) for row in stage.part_rows())
