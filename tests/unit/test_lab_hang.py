# SPDX-License-Identifier: MIT
"""A host whose kernel hangs is told from one that is slow, and from one that has ended."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import errors, process, qemu


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[qemu.Machine]:
    """A machine whose QEMU is a program that sleeps, and whose console holds an earlier boot."""
    (tmp_path / qemu.CONSOLE).write_text("watchdog: BUG: soft lockup - CPU#0 stuck\n")
    with subprocess.Popen(["sleep", "60"]) as child:
        identity = process.identify(child.pid)
        assert identity is not None
        record = qemu.Record(identity, child.pid, 0, "tcg", "a test")
        yield qemu.Machine(
            tmp_path, record, None, None, console_start=(tmp_path / qemu.CONSOLE).stat().st_size
        )
        child.kill()


def test_earlier_boot_is_not_looked_at(machine: qemu.Machine) -> None:
    machine.check()


def test_hang_is_told(machine: qemu.Machine) -> None:
    with (machine.directory / qemu.CONSOLE).open("a") as console:
        console.write("[   28.5] watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [swapper/0:0]\n")
    with pytest.raises(errors.HungError):
        machine.check()


def test_end_is_told_with_what_qemu_said(machine: qemu.Machine) -> None:
    (machine.directory / qemu.QEMU_LOG).write_text("cannot set up guest memory")
    process.kill(machine.record.qemu)
    with pytest.raises(errors.QemuError, match="guest memory"):
        machine.check()
