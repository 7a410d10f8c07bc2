# SPDX-License-Identifier: MIT
"""What systemd hears from a service of ours: that it is ready, that it stops, that its event loop runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import Final

_BEATS: Final = 3
"""In each period after which a silent service is ended, so that none is that was only busy."""


def notify(state: str) -> None:
    """sd_notify(3); nothing to do when not started by systemd."""
    if os.environ.get("NOTIFY_SOCKET"):
        with _connected() as wire:
            wire.sendall(state.encode())


async def beat_until(stop: asyncio.Event) -> None:
    """The watchdog hears the loop itself: a thread would go on beating while the loop hangs."""
    period_s = _watched_s() / _BEATS
    if not period_s:
        await stop.wait()
        return
    with _connected() as wire:  # held, since there may be no other descriptor later
        while not stop.is_set():
            with contextlib.suppress(OSError):  # a full queue holds up nothing here; the next beat comes
                wire.send(b"WATCHDOG=1", socket.MSG_DONTWAIT)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(period_s):
                    await stop.wait()


def _watched_s() -> float:
    """sd_watchdog_enabled(3): 0 when nobody watches this process."""
    ours = str(os.getpid())
    if not os.environ.get("NOTIFY_SOCKET") or os.environ.get("WATCHDOG_PID", ours) != ours:
        return 0.0
    return int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6


def _connected() -> socket.socket:
    address = os.environ["NOTIFY_SOCKET"]
    wire = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        wire.connect("\0" + address[1:] if address.startswith("@") else address)
    except BaseException:
        wire.close()
        raise
    return wire
