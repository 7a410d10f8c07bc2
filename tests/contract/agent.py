# SPDX-License-Identifier: MIT
"""The real agent on an inherited socket, for the tests of its protocol, as shipped and with sanitizers."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from banger import guest_binary
from guest import build_hook

KINDS = ("shipped", "sanitized")


@contextmanager
def running(kind: str) -> Iterator[Path]:
    """The socket of an agent that runs until the block ends; the agent has the tests' own uid.

    Fails when a sanitizer had anything to report, in the agent or in the process of a connection.
    """
    sanitized = kind == "sanitized"
    program = build_hook.build_sanitized() if sanitized else guest_binary.path(platform.machine())
    with tempfile.TemporaryDirectory(prefix="b-", dir="/tmp") as name:
        directory = Path(name)
        with _started(program, directory) as path:
            yield path
        reports = [report.read_text() for report in directory.glob("report.*")]
        assert not reports, "\n".join(reports)


def pulse_path(path: Path) -> Path:
    """Where the agent of this socket gives back each byte."""
    return path.with_name("pulse.sock")


@contextmanager
def _started(program: Path, directory: Path) -> Iterator[Path]:
    path, log = directory / "agent.sock", f"log_path={directory}/report"
    environment = {**os.environ, "ASAN_OPTIONS": log, "UBSAN_OPTIONS": f"{log}:print_stacktrace=1"}
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as pulse:
        for each, place in ((listener, path), (pulse, pulse_path(path))):
            each.bind(str(place))
            each.listen(64)
        numbers = [listener.fileno(), pulse.fileno()]
        agent = subprocess.Popen(
            ["@banger-guest", "agent", "--listen-fd", str(numbers[0]), "--pulse-fd", str(numbers[1])],
            executable=program,
            pass_fds=numbers,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    try:
        yield path
        assert agent.poll() is None, f"the agent ended by itself: {agent.returncode}"
    finally:
        agent.terminate()
        agent.wait(timeout=30)
