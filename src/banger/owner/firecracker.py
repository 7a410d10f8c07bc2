# SPDX-License-Identifier: MIT
"""The daemon's door to a VMM: its API socket, held open so that the kernel tells us when the VMM ends."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path


async def wait_gone(socket: Path) -> None:
    """Returns when the VMM behind this API socket has ended; at once when nobody listens there.

    An idle connection costs Firecracker nothing, and the kernel closes it with the process.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(str(socket))
    except OSError:
        return
    try:
        with contextlib.suppress(OSError):
            while await reader.read(4096):
                pass
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
