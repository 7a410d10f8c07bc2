# SPDX-License-Identifier: MIT
"""The host's wall clock, which a test sets: every door through which Python reads it, in this process."""

from __future__ import annotations

import datetime
import time
from typing import Any

import pytest


class WallClock:
    """As the host's own until it jumps; the clocks that nobody sets go on as they do."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._offset_s = 0.0
        really, gettime, kind = time.time, time.clock_gettime, datetime.datetime

        class Kind(type):
            def __instancecheck__(cls, each: object) -> bool:
                return isinstance(each, kind)

        class Moved(datetime.datetime, metaclass=Kind):
            """Makes ordinary ones."""

            def __new__(cls, *arguments: Any, **more: Any) -> Any:
                return kind(*arguments, **more)

            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> Any:
                return kind.fromtimestamp(now_s(), tz)

        def now_s() -> float:
            return really() + self._offset_s

        def now_by(clock: int) -> float:
            return now_s() if clock == time.CLOCK_REALTIME else gettime(clock)

        patch.setattr(time, "time", now_s)
        patch.setattr(time, "time_ns", lambda: int(now_s() * 1e9))
        patch.setattr(time, "clock_gettime", now_by)
        patch.setattr(datetime, "datetime", Moved)

    def jump(self, seconds: float) -> None:
        self._offset_s += seconds
