# SPDX-License-Identifier: MIT
"""A guest's clock, held to this host's: a guest reaches no time service unless its policy lets it.

It falls behind while the host is suspended, stays where it was when the host's clock is set, and runs on an
oscillator that nobody corrects.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

ALLOWED_NS: Final = 1_000_000_000
"""One that is off by less is left alone: setting it makes time jump for whatever runs there."""

Clock = Callable[[], int]
"""Nanoseconds."""


class Agent(Protocol):
    """The guest's agent, as far as its clock goes."""

    async def time_ns(self) -> int: ...

    async def set_time(self, realtime_ns: int, /) -> None: ...


async def hold(agent: Agent, wall_ns: Clock = time.time_ns) -> int:
    """Sets the clock if it is off; by how many nanoseconds it was, at the least. 0: it was right."""
    asked_ns = wall_ns()
    return await correct(agent, await agent.time_ns(), asked_ns=asked_ns, wall_ns=wall_ns)


async def correct(agent: Agent, told_ns: int, *, asked_ns: int, wall_ns: Clock = time.time_ns) -> int:
    """The same with what it told between `asked_ns` and now: only a time outside that is a wrong one."""
    off_ns = min(told_ns - asked_ns, 0) or max(told_ns - wall_ns(), 0)
    if abs(off_ns) <= ALLOWED_NS:
        return 0
    await agent.set_time(wall_ns())
    return off_ns
