# SPDX-License-Identifier: MIT
"""The only way the lab starts a program on this machine and waits for it."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
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
) -> Result:
    """Run a program to its end; kill it at the deadline; raise when it fails, unless told not to check."""
    words = tuple(str(word) for word in argv)
    started = time.monotonic()
    try:
        done = subprocess.run(
            words,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            timeout=timeout_s,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
            check=False,
        )
    except FileNotFoundError as error:
        raise errors.CommandError(
            f"{words[0]} is not on this machine", hint="run: python -m lab setup"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise errors.CommandError(f"{shlex.join(words)} did not end within {timeout_s:g} s") from error
    result = Result(words, done.returncode, done.stdout, done.stderr, time.monotonic() - started)
    if check and result.status != 0:
        raise errors.CommandError(
            f"{shlex.join(words)} failed with status {result.status}",
            hint=result.error_text.strip()[-2000:],
        )
    return result
