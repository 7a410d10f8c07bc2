# SPDX-License-Identifier: MIT
"""The keeper ends QEMU when nobody wants it; a program that sleeps stands in for QEMU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import process

TREE = Path(__file__).parents[2]


NEVER = -1
"""When one was started that had ended by the time that we looked."""


@contextmanager
def _keeper(
    directory: Path, *options: str, seconds: str = "60"
) -> Iterator[tuple[subprocess.Popen[bytes], process.Identity, int]]:
    """Start a keeper over a sleeping program; give it, the program, and the owner's end of its pipe."""
    report_read, report_write = os.pipe()
    owner_read, owner_write = os.pipe()
    argv = [
        sys.executable,
        "-m",
        "lab.keeper",
        "--report-fd",
        str(report_write),
        "--owner-fd",
        str(owner_read),
    ]
    with subprocess.Popen(
        [*argv, *options, "--", "sleep", seconds],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(TREE)},
        pass_fds=[report_write, owner_read],
        stderr=subprocess.DEVNULL,
    ) as keeper:
        os.close(report_write)
        os.close(owner_read)
        with os.fdopen(report_read, "rb") as report, os.fdopen(owner_write, "wb"):
            pid = int(report.read())
            yield keeper, process.identify(pid) or process.Identity(pid, NEVER), owner_write
        keeper.wait(timeout=10)


def test_ends_when_qemu_ends(tmp_path: Path) -> None:
    with _keeper(tmp_path, "--limit-s", "60", seconds="0.1") as (keeper, _, _):
        assert keeper.wait(timeout=10) == 0


def test_qemu_dies_with_its_owner(tmp_path: Path) -> None:
    lab = tmp_path / "lab"
    lab.mkdir()
    with _keeper(lab, "--limit-s", "60", "--ephemeral") as (_, child, _):
        assert process.is_running(child)
    assert not process.is_running(child)
    assert not lab.exists()


def test_qemu_dies_at_the_limit(tmp_path: Path) -> None:
    with _keeper(tmp_path, "--limit-s", "0.2") as (keeper, child, _):
        keeper.wait(timeout=10)
        assert not process.is_running(child)


def test_qemu_dies_with_its_keeper(tmp_path: Path) -> None:
    with _keeper(tmp_path, "--limit-s", "60") as (keeper, child, _):
        keeper.kill()
        process.wait_gone(child, timeout_s=10)
        assert not process.is_running(child)


def test_identity_tells_a_reused_pid_apart() -> None:
    own = process.identify(os.getpid())
    assert own is not None
    assert process.is_running(own)
    assert not process.is_running(process.Identity(own.pid, own.started_ticks + 1))


def test_killing_what_is_gone_is_done() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        identity = process.identify(child.pid)
        assert identity is not None
        process.kill(identity)
    process.kill(identity)


@pytest.mark.parametrize("pid", [0x7FFFFFFF])
def test_nobody_has_no_identity(pid: int) -> None:
    assert process.identify(pid) is None
