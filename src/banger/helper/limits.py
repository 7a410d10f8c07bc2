# SPDX-License-Identifier: MIT
"""How often the owner may ask: a daemon that was taken over must not keep root busy."""

from __future__ import annotations

import threading


class Bucket:
    """Holds `burst` requests and is filled again at `rate` a second; who finds it empty waits his turn."""

    def __init__(self, *, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._level = float(burst)
        self._filled_at = 0.0
        self._lock = threading.Lock()

    def take(self, now: float) -> float:
        """How many seconds to wait before going on."""
        with self._lock:
            self._level = min(self._burst, self._level + (now - self._filled_at) * self._rate)
            self._filled_at = now
            self._level -= 1
            return max(0.0, -self._level / self._rate)
