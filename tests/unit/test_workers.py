# SPDX-License-Identifier: MIT
"""Programs that outlive who started them are found by the directory that they work in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import workers

SLEEP = "import os, time; os.write(1, b'%d ' % os.getpid()); time.sleep(600)"
# Deaf to requests; one child leaves the session, another one has a child that cleans its environment.
PROGRAM = f"""
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
elif os.fork() == 0 and os.fork() == 0:
    os.execve(sys.executable, [sys.executable, "-c", {SLEEP!r}], {{}})
{SLEEP}
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / ".build-abc"
    made.mkdir()
    return made


@pytest.fixture
def started(directory: Path) -> Iterator[set[int]]:
    """The pids of four programs, which nobody waits for but their first."""
    environment = {"HOME": str(directory), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, env=environment) as first:
        assert first.stdout is not None
        said = b""
        while len(pids := said.split()) < 4 or not said.endswith(b" "):
            said += os.read(first.stdout.fileno(), 100)
        yield {int(pid) for pid in pids}
        for pid in pids:
            if Path(f"/proc/{int(pid)}").exists():
                os.kill(int(pid), signal.SIGKILL)


def _alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if _state(pid) not in ("", "Z")}


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_all_that_was_started_for_it_ends(directory: Path, started: set[int]) -> None:
    assert _alive(started) == started
    assert workers.end(directory) == len(started)
    assert _alive(started) == set()
    assert workers.end(directory) == 0


@pytest.mark.parametrize("other", [".build-ab", ".build-abcd"])
def test_what_works_elsewhere_goes_on(directory: Path, started: set[int], other: str) -> None:
    assert workers.end(directory.with_name(other)) == 0
    assert _alive(started) == started


def test_whoever_asks_goes_on(directory: Path) -> None:
    script = (
        f"from pathlib import Path; from banger import workers; print(workers.end(Path({str(directory)!r})))"
    )
    environment = {"HOME": str(directory), "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, check=True, timeout=20
    )
    assert said.stdout == b"0\n"
