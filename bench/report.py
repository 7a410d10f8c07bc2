# SPDX-License-Identifier: MIT
"""What a benchmark has to say: rows of ours, the rival's and the ratio. Printed as a table or as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

HEADERS = ("", "banger", "rival", "ratio", "aim")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `rival` is None where nothing fair can be set beside it."""

    what: str
    ours: float
    unit: str
    rival: float | None = None
    aim: str = ""

    @property
    def ratio(self) -> float | None:
        return self.ours / self.rival if self.rival else None


@dataclass(frozen=True, slots=True)
class Report:
    """The rows of one benchmark, medians unless their name says otherwise."""

    name: str
    rival: str
    """What the rival is, in one line."""
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """For `--json`: as asdict, with each row's ratio."""
        rows = [{**asdict(row), "ratio": row.ratio} for row in self.rows]
        return {**asdict(self), "rows": rows}

    def text(self) -> str:
        """A heading, a table and the notes."""
        cells = [HEADERS, *map(_cells, self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(HEADERS))]
        lines = [_line(row, widths) for row in cells]
        head = [f"{self.name}: beside {self.rival}", *lines]
        return "\n".join([*head, *(f"  {note}" for note in self.notes)])


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float], unit: str) -> str:
    """`n = 5, 1.2-3.4 s`: how many there were, and the least and the most."""
    return f"n = {len(values)}, {_number(min(values))}-{_number(max(values))} {unit}".rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    ours = f"{_number(row.ours)} {row.unit}"
    rival = "-" if row.rival is None else f"{_number(row.rival)} {row.unit}"
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
    return row.what, ours, rival, ratio, row.aim


def _number(value: float) -> str:
    """Three digits that count: no benchmark here is better than that."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cells[0].ljust(widths[0])]
    padded += [cell.rjust(width) for cell, width in zip(cells[1:-1], widths[1:-1], strict=True)]
    return "  ".join(["", *padded, cells[-1]]).rstrip()
