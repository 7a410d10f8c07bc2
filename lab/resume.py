# SPDX-License-Identifier: MIT
"""Gives a lab the right time, and random numbers of its own. Used by session."""

from __future__ import annotations

import json
import secrets
import time

from lab import errors, remote

PROGRAM = "/usr/local/libexec/lab-resume"
LIMIT_S = 30
SEED_BYTES = 64


def refresh(shell: remote.Shell) -> None:
    """Set the lab's clock, which a restored one has where it was saved, and reseed its random numbers."""
    with shell.open([PROGRAM], limit_s=LIMIT_S) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        # The program has started when it says so: what is sent then is not late by its start.
        running.stdout.readline()
        given = {"now_ns": time.time_ns(), "seed": secrets.token_hex(SEED_BYTES)}
        running.stdin.write(json.dumps(given).encode() + b"\n")
        running.stdin.flush()
        if running.stdout.readline() != b"done\n":
            raise errors.BootTimeoutError("the lab did not take the time")
