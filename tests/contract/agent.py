# SPDX-License-Identifier: MIT
"""The real agent on an inherited socket, for the tests of its protocol, as shipped and with sanitizers."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def waiting(parent: int) -> dict[int, tuple[bytes, bool]]:
    """Children of the process that wait in poll(): argv[0], and whether they do so without a timeout.

    Source: proc_pid_syscall(5).
    """
    number, without_limit = {"x86_64": ("7", 0xFFFFFFFF)}.get(platform.machine(), ("73", 0))  # 73: ppoll()
    found = dict[int, tuple[bytes, bool]]()
    for pid in children(parent):
        with suppress(FileNotFoundError, ProcessLookupError):
            name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
            called = Path(f"/proc/{pid}/syscall").read_text().split()
            if called[0] == number:
                found[pid] = name, int(called[3], 16) & 0xFFFFFFFF == without_limit
    return found


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


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
