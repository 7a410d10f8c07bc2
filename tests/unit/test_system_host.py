# SPDX-License-Identifier: MIT
"""What a host's systemd is asked, and what is made of its answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from banger import run
from banger.contract import errors
from banger.system import host


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which alone programs are found."""
    monkeypatch.setattr(run, "SEARCH_PATH", f"{tmp_path}:/bin")
    return tmp_path


def program(directory: Path, name: str, script: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


def failed(*arguments: str) -> errors.BangerError:
    with pytest.raises(errors.OperationFailedError) as raised:
        host.systemctl(*arguments)
    assert raised.value.message == "systemctl exited 1: it failed"
    return raised.value


def test_a_unit_that_does_not_start_says_why(programs: Path) -> None:
    program(programs, "systemctl", "echo it failed >&2; exit 1")
    program(programs, "journalctl", "echo address already in use; echo timed out")
    error = failed("restart", "bangerd.service")
    assert error.__notes__ == ["address already in use", "timed out"]
    assert "journalctl -u bangerd" in error.hint


def test_a_host_without_a_journal_says_what_systemctl_did(programs: Path) -> None:
    program(programs, "systemctl", "echo it failed >&2; exit 1")
    program(programs, "journalctl", "exit 1")
    assert not hasattr(failed("start", "bangerd.service"), "__notes__")


def test_what_does_not_stop_has_no_last_words(programs: Path) -> None:
    program(programs, "systemctl", "echo it failed >&2; exit 1")
    program(programs, "journalctl", "echo long ago")
    error = failed("stop", "bangerd.service")
    assert not hasattr(error, "__notes__")
    assert error.hint == ""
