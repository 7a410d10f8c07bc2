# SPDX-License-Identifier: MIT
"""What the soak tells its two services, each a process of its own, and what they say of themselves."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from pathlib import Path

import msgspec


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """What a service is told at its start."""

    top: str
    seed: int
    fault_rate: float = 0.0
    """How often a change of a row finds the disk full."""
    listener: int = -1
    """The helper's socket, as systemd passes it."""
    ahead_s: float = 0.0
    """By how much the simulated clock is ahead of the host's."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """A line of JSON on a service's control socket; the answer is `Held` when it was to measure."""

    advance_s: float = 0.0
    fault_rate: float | None = None
    measure: bool = False


class Held(msgspec.Struct, frozen=True):
    """What a process holds, after a collection of its garbage."""

    rss_kib: int
    descriptors: int
    threads: int
    tasks: int
    objects: int


def control_socket(top: Path, service: str) -> Path:
    return top / f"{service}.control"


def world_socket(top: Path) -> Path:
    return top / "w.sock"


def held(tasks: int = 0) -> Held:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return Held(
        rss_kib=int(status["VmRSS"].split()[0]),
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=threading.active_count(),
        tasks=tasks,
        objects=len(gc.get_objects()),
    )
