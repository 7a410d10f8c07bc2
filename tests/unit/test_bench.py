# SPDX-License-Identifier: MIT
"""The benchmarks can be run and say what they found. No time is judged here."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from banger.images.mkfs import filesystem
from bench import exec, host, image_full_once, main, memory, pipeline, report, start
from bench.inside import memory as sizes

SAMPLE = report.Report(
    name="sample",
    rival="nothing",
    rows=(report.Row("boot", 3.0, "s", 2.0, "≤ 1.25"), report.Row("alone", 1234.5, "ms")),
    notes=("a note",),
)
CLOCKS = ("boot_s", "agent_s", "command_s", "process_s", "before_boot_s", "init_to_agent_s")


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


@pytest.mark.parametrize("name", main.BENCHMARKS)
def test_every_benchmark_can_be_loaded(name: str) -> None:
    assert callable(importlib.import_module(f"bench.{name}").run)


@pytest.mark.parametrize("name", ["start", "memory", "transfer", "bare", "repository"])
def test_what_runs_in_the_lab_is_there(name: str) -> None:
    importlib.import_module(f"bench.inside.{name}")


def test_an_unknown_benchmark_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["nope"])
    assert "there are: pipeline" in capsys.readouterr().err


def test_no_lab_is_brought_up_unasked() -> None:
    with host.Host("no-such-lab"):
        pass


async def test_the_pipeline_is_measured_on_fakes() -> None:
    found = await pipeline.measure(rounds=1, at_once=3)
    assert [row.what for row in found.rows] == ["one start", "3 starts at once, in all", "of that, for each"]
    assert all(row.ours > 0 and row.rival for row in found.rows)


@pytest.mark.parametrize("kind", image_full_once.KINDS)
def test_a_file_system_is_filled_until_it_refuses_more(kind: str, tmp_path: Path) -> None:
    limits = filesystem.Limits(max_inodes=300)
    most = image_full_once.most(kind, tmp_path / "disk", limits)
    assert 250 < most < 300
    assert image_full_once.once(kind, tmp_path / "disk", most, limits)["peak_bytes"] > 0


def test_starts_are_summed_up_as_medians() -> None:
    rounds = [
        {
            "banger": {**dict.fromkeys(CLOCKS, ours), "steps_ms": {"tap": ours}},
            "bare": dict.fromkeys(CLOCKS, 2),
            "smallest": {"agent_s": ours},
        }
        for ours in (2.0, 3.0, 40.0)
    ]
    found = start.summed_up(rounds)
    assert {row.ratio for row in found.rows if row.rival} == {1.5}
    assert [row.ours for row in found.rows if not row.rival] == [3.0]
    assert "tap 3 ms" in found.notes[-1]


def test_transfers_are_summed_up_as_medians() -> None:
    rounds = [{"in": (ours, 1.0), "out": (2.0, ours)} for ours in (1.0, 4.0, 9.0)]
    assert [row.ratio for row in exec.summed_up(rounds).rows] == [4.0, 0.5]


def test_memory_is_shown_in_mib() -> None:
    names = [*memory.PROCESSES, "firecracker", "bare firecracker"]
    found = memory.summed_up({name: {"rss": 2048, "pss": 1024, "own": 512} for name in names})
    assert {row.ours for row in found.rows} == {2.0, 1.0, 0.5}
    assert [row.ratio for row in found.rows if row.rival] == [1.0, 1.0, 1.0]


def test_a_process_is_seen_with_and_without_its_largest_mapping() -> None:
    rollup = sizes.parse(Path("/proc/self/smaps_rollup").read_text())
    assert rollup["rss"] >= rollup["pss"] > 0
    mappings = Path("/proc/self/smaps").read_text()
    whole = sizes.resident(mappings, below_bytes=1 << 60)
    assert rollup["rss"] / 2 < whole < rollup["rss"] * 2, os.getpid()
    assert 0 < sizes.resident(mappings, below_bytes=1 << 16) < whole
