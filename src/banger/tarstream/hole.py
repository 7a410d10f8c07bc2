# SPDX-License-Identifier: MIT
"""A stretch of zeros in a file's content. What reads sparse files yields it, what writes files takes it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Hole:
    """So many bytes of zeros, which cost nothing however many they are."""

    length: int
