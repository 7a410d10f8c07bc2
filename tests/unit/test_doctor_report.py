# SPDX-License-Identifier: MIT
"""How doctor's checks are run, and how the command shows what they found."""

from __future__ import annotations

import subprocess
import sys
import threading

import click.testing
import msgspec
import pytest

from banger.cli import command as cli_command
from banger.cli import doctor as command
from banger.contract import errors
from banger.system.doctor import report, scene, table

ALL = (*table.ORDINARY, *table.PRODUCTION)
FAIL, WARN, SKIP, PASS = report.Status.FAIL, report.Status.WARN, report.Status.SKIP, report.Status.PASS


def test_a_probe_that_crashes_ends_nothing() -> None:
    def crash(_: scene.Scene) -> report.Finding:
        raise ValueError("odd")

    def refuse(_: scene.Scene) -> report.Finding:
        raise errors.ConflictError("busy", hint="wait")

    checks = [
        report.Check("crash", "x", crash),
        report.Check("refuse", "x", refuse),
        report.Check("fine", "x", lambda _: report.passed("fine")),
    ]
    rows = report.examine(checks, scene.Scene()).rows
    assert [(row.status, row.detail) for row in rows[1:]] == [(FAIL, "busy"), (PASS, "fine")]
    assert rows[0].status is FAIL
    assert "ValueError: odd (test_doctor_report.py:" in rows[0].detail
    assert rows[1].remedy == "wait"


def test_a_probe_that_hangs_is_left_behind() -> None:
    release = threading.Event()

    def hang(_: scene.Scene) -> report.Finding:
        release.wait()
        return report.passed("late")

    checks = [
        report.Check("hang", "x", hang),
        report.Check("fine", "x", lambda _: report.passed("fine")),
    ]
    try:
        rows = report.examine(checks, scene.Scene(limit_s=0.2)).rows
    finally:
        release.set()
    assert (rows[0].status, rows[0].detail) == (FAIL, "the check was not done after 0.2 s")
    assert rows[1].status is PASS


@pytest.mark.parametrize(
    ("status", "good", "good_when_strict"),
    [(PASS, True, True), (WARN, True, False), (SKIP, True, False), (FAIL, False, False)],
)
def test_what_makes_a_report_good(status: report.Status, good: bool, good_when_strict: bool) -> None:
    row = report.Row(check="x", feature="y", status=status, detail="")
    found = report.Report(rows=(row,))
    assert (found.is_good(strict=False), found.is_good(strict=True)) == (good, good_when_strict)


# --- the command ---


def test_the_command_agrees_with_its_rows() -> None:
    """On this machine, whatever is right or wrong with it."""
    argv = [sys.executable, "-m", "banger.cli.start", "doctor", "--json", "--production"]
    done = subprocess.run(argv, capture_output=True, check=False, timeout=60)
    said = msgspec.json.decode(done.stdout)
    assert [row["check"] for row in said["rows"]] == [check.name for check in ALL], done.stderr
    assert done.returncode == (0 if said["ok"] else 1)
    assert said["ok"] == (said["counts"]["fail"] == 0)
    assert sum(said["counts"].values()) == len(ALL)
    assert [row for row in said["rows"] if bool(row["remedy"]) == (row["status"] == "pass")] == []
    assert [row for row in said["rows"] if row["detail"].startswith("the check itself failed")] == []


@pytest.mark.parametrize(("given", "limit_s"), [((), 60), (("--timeout", "5m"), 300)])
def test_the_command_s_checks_have_the_time_they_are_given(
    monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], limit_s: float
) -> None:
    seen: list[float] = []

    def examine(_: object, host: scene.Scene) -> report.Report:
        seen.append(host.limit_s)
        return report.Report(rows=())

    monkeypatch.setattr(report, "examine", examine)
    click.testing.CliRunner().invoke(command.doctor, given, obj=cli_command.Settings())
    assert seen == [limit_s]


def _row(check: str, status: report.Status, detail: str, remedy: str = "", feature: str = "x") -> report.Row:
    return report.Row(check=check, feature=feature, status=status, detail=detail, remedy=remedy)


def test_a_table_with_remedies_and_a_sum() -> None:
    rows = (
        _row("kvm", PASS, "fine"),
        _row("loop device", FAIL, "none\x1b[2J", "sudo modprobe loop"),
        _row("image", SKIP, "no right", "sudo banger doctor"),
        _row("kernel", SKIP, "no right", "sudo banger doctor"),
        _row("swap", WARN, "on", "swapoff", feature="production"),
    )
    assert command._shown(report.Report(rows=rows), quiet=False).splitlines() == [
        "PASS   kvm           fine",
        "FAIL   loop device   none\\x1b[2J",
        "                     → sudo modprobe loop",
        "WARN   swap          on",
        "                     → swapoff",
        "SKIP   2 checks      no right: image, kernel",
        "                     → sudo banger doctor",
        "",
        "1 pass, 1 warn, 1 fail, 2 could not be looked at",
        "production: 0 of 1 recommendations met",
    ]


def test_all_well_is_one_line_when_quiet() -> None:
    rows = (_row("kvm", PASS, "fine"), _row("loop", PASS, "fine"))
    assert command._shown(report.Report(rows=rows), quiet=True) == "all 2 checks pass"
