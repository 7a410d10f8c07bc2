# SPDX-License-Identifier: MIT
"""The record of what root was asked and what came of it: JSON lines that the helper alone writes."""

from __future__ import annotations

from typing import Any, Final

import msgspec

DIRECTORY: Final = "audit"
"""Below the helper's own directory."""
FILES: Final = ("audit.log", "audit.log.1", "audit.log.2", "audit.log.3")
"""The newest first."""
REFUSED: Final = ("refused.log", "refused.log.1")
"""Likewise. What is refused has its own, so that neither crowds out the other."""
MAX_FILE_BYTES: Final = 4 << 20
MAX_TEXT: Final = 300


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request. Looks that went well (`find_vmm`, `list_world`, `get_host`) leave none."""

    time: str
    """RFC 3339, UTC."""
    outcome: str
    """`begun`, before anything is changed; then `done`, `refused` or `failed`."""
    peer_uid: int
    peer_pid: int
    elapsed_ms: float
    id: str = ""
    """The request's: of its beginning and its end."""
    op: str = ""
    """Empty for what was no request at all."""
    op_id: str = ""
    """The daemon's operation, as in both journals."""
    vm: str = ""
    asked: dict[str, Any] = {}
    """The fields of the request."""
    code: str = ""
    error: str = ""
