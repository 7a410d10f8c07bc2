# SPDX-License-Identifier: MIT
"""The benchmarks can be run and say what they found. No time is judged here."""

from __future__ import annotations

import importlib

import pytest

from bench import cli, pipeline, report

SAMPLE = report.Report(
    name="sample",
    rival="nothing",
    rows=(report.Row("boot", 3.0, "s", 2.0, "≤ 1.25"), report.Row("alone", 1234.5, "ms")),
    notes=("a note",),
)


def test_a_report_is_a_table_with_ratios() -> None:
    assert [line.split() for line in SAMPLE.text().splitlines()] == [
        ["sample:", "beside", "nothing"],
        ["banger", "rival", "ratio", "aim"],
        ["boot", "3", "s", "2", "s", "1.50", "≤", "1.25"],
        ["alone", "1234", "ms", "-", "-"],
        ["a", "note"],
    ]


def test_a_report_is_a_document_with_ratios() -> None:
    rows = SAMPLE.document()["rows"]
    assert [row["ratio"] for row in rows] == [1.5, None]


def test_every_benchmark_can_be_loaded_and_run() -> None:
    for name in cli.BENCHMARKS:
        assert callable(importlib.import_module(f"bench.{name}").run)


def test_an_unknown_benchmark_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["nope"])
    assert "there are: pipeline" in capsys.readouterr().err


async def test_the_pipeline_is_measured_on_fakes() -> None:
    found = await pipeline.measure(rounds=1, at_once=3)
    assert [row.what for row in found.rows] == ["one start", "3 starts at once, in all", "of that, for each"]
    assert all(row.ours > 0 and row.rival for row in found.rows)
