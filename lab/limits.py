# SPDX-License-Identifier: MIT
"""How long the lab and its tests wait before they call something hung.

Limits are written down as what is enough on a quiet machine. They end what would never end, and measure
nothing: a machine may be half as fast as another, and a suite keeps all its processors busy with labs.
"""

from __future__ import annotations

PATIENCE = 4


def patient(seconds: float) -> float:
    """The limit to set for what takes at most this long on a quiet machine."""
    return seconds * PATIENCE
