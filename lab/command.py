# SPDX-License-Identifier: MIT
"""The only way the lab starts a program on this machine and waits for it."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import errors


@dataclass(frozen=True, slots=True)
class Result:
    """How a program ended; `status` is negative for a signal, and 128 + its number for one in the lab."""

    argv: tuple[str, ...]
    status: int
    stdout: bytes
    stderr: bytes
    elapsed_s: float

    @property
    def text(self) -> str:
        return self.stdout.decode(errors="replace")

    @property
    def error_text(self) -> str:
        return self.stderr.decode(errors="replace")


def run(
    argv: Sequence[str | Path],
    *,
    timeout_s: float,
    stdin: bytes | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    look: Callable[[], None] | None = None,
    look_every_s: float = 60,
) -> Result:
    """Run a program to its end; kill it at the deadline; raise when it fails, unless told not to check.

    `look` is called now and then while it runs, and at the deadline; what it raises ends the program.
    """
    words = tuple(str(word) for word in argv)
    started = time.monotonic()
    try:
        running = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
        )
    except FileNotFoundError as error:
        raise errors.CommandError(
            f"{words[0]} is not on this machine", hint="run: python -m lab setup"
        ) from error
    with running:
        try:
            stdout, stderr = _read_to_end(running, stdin, timeout_s, look, look_every_s)
        except BaseException:
            running.kill()
            raise
    result = Result(words, running.returncode, stdout, stderr, time.monotonic() - started)
    if check and result.status != 0:
        raise errors.CommandError(
            f"{shlex.join(words)} failed with status {result.status}",
            hint=result.error_text.strip()[-2000:],
        )
    return result


def _read_to_end(
    running: subprocess.Popen[bytes],
    stdin: bytes | None,
    timeout_s: float,
    look: Callable[[], None] | None,
    look_every_s: float,
) -> tuple[bytes, bytes]:
    deadline = time.monotonic() + timeout_s
    while True:
        left_s = deadline - time.monotonic()
        try:
            return running.communicate(stdin, timeout=min(left_s, look_every_s) if look else left_s)
        except subprocess.TimeoutExpired as error:
            stdin = None  # it goes on with what it has
            if look is not None:
                look()
            if left_s <= look_every_s or look is None:
                shown = shlex.join(str(word) for word in error.cmd)
                raise errors.CommandError(f"{shown} did not end within {timeout_s:g} s") from error
