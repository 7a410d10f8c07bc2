# SPDX-License-Identifier: MIT
"""`banger` as a process, against a daemon's socket: what the tests of the CLI run."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.fakes import daemon

DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class Done:
    status: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True, slots=True)
class Cli:
    """Runs `banger` with a clean environment that names the socket."""

    socket: Path

    def environment(self, **more: str) -> dict[str, str]:
        paths = os.pathsep.join(path for path in sys.path if path)
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": paths,
            "BANGER_SOCKET": str(self.socket),
            "LC_ALL": "C.UTF-8",
            **more,
        }

    def argv(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "banger.cli.start", *arguments]

    def run(
        self,
        *arguments: str,
        stdin: bytes | IO[bytes] = b"",
        env: dict[str, str] | None = None,
        timeout_s: float = DEADLINE_S,
        memory_bytes: int = 0,
    ) -> Done:
        """To its end. Input that is bytes is piped. `memory_bytes`: as much address space as it may have."""
        limit = ["prlimit", f"--as={memory_bytes}", "--"] if memory_bytes else []
        source: dict[str, Any] = {"input" if isinstance(stdin, bytes) else "stdin": stdin}
        done = subprocess.run(
            [*limit, *self.argv(*arguments)],
            **source,
            capture_output=True,
            env=self.environment(**(env or {})),
            timeout=timeout_s,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr.decode())

    @contextlib.contextmanager
    def started(
        self, *arguments: str, env: Mapping[str, str] | None = None, **options: Any
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Running, with pipes; gone when the block ends."""
        pipes: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        with subprocess.Popen(
            self.argv(*arguments), env=self.environment(**(env or {})), bufsize=0, **(pipes | options)
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def on_terminal(self, *arguments: str, **env: str) -> contextlib.AbstractContextManager[Terminal]:
        """Running as the foreground process of a terminal."""
        return on_terminal(self.argv(*arguments), self.environment(TERM="xterm", **env))


@contextlib.contextmanager
def on_terminal(argv: Sequence[str], env: Mapping[str, str]) -> Iterator[Terminal]:
    """A program in a session of its own, on a terminal."""
    parent, child = pty.openpty()
    before = termios.tcgetattr(child)
    process = subprocess.Popen(
        argv, stdin=child, stdout=child, stderr=child, env=env, start_new_session=True
    )
    terminal = Terminal(process, parent, child, before)
    try:
        yield terminal
    finally:
        process.kill()
        process.wait()
        os.close(parent)
        os.close(child)


@dataclass(slots=True)
class Terminal:
    """A process and both sides of its terminal."""

    process: subprocess.Popen[bytes]
    fd: int
    child_fd: int
    settings_before: list[Any]
    """As the program found them."""
    seen: bytes = b""

    def read_until(self, wanted: bytes) -> bytes:
        """All that was shown so far, once it holds `wanted`."""
        deadline = time.monotonic() + DEADLINE_S
        while wanted not in self.seen:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.fd], [], [], max(0.0, left))
            assert ready, f"{wanted!r} never came; the terminal shows {self.seen!r}"
            self.seen += os.read(self.fd, 65536)
        return self.seen

    def type(self, data: bytes) -> None:
        os.write(self.fd, data)

    def wait(self) -> int:
        """The exit status; what is shown meanwhile is kept, for a full terminal blocks who writes."""
        deadline = time.monotonic() + DEADLINE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"still running; the terminal shows {self.seen!r}"
            self._drain(0.02)
        self._drain(0.0)
        return self.process.returncode

    def _drain(self, wait_s: float) -> None:
        while select.select([self.fd], [], [], wait_s)[0]:
            self.seen += os.read(self.fd, 65536)
            wait_s = 0.0


@contextlib.contextmanager
def fake_daemon() -> Iterator[daemon.FakeDaemon]:
    """Serving; its socket's path is short enough, unlike pytest's own directories."""
    with tempfile.TemporaryDirectory(prefix="b-", dir="/tmp") as directory:
        made = daemon.FakeDaemon(Path(directory) / "d.sock")
        made.start()
        try:
            yield made
        finally:
            made.stop()
