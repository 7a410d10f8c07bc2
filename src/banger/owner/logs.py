# SPDX-License-Identifier: MIT
"""Structured logs on stderr, for the journal: one line of JSON each, always with the operation's id.

Info is a change of state, debug is chatter. Never logged: command lines, environments, input and output of
what runs in guests.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Final

from banger.owner import operations

# What every LogRecord has; anything else in its dict came in through `extra`.
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """ASCII, control characters escaped: nothing a guest says can forge a line or move a cursor."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        op_id = operations.current_op_id.get()
        if op_id:
            fields["op"] = op_id
        fields |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str).replace("\x7f", "\\u007f")


def set_up(level: str) -> None:
    """One handler on the root logger; libraries that chatter are kept to warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in (
        "uvicorn",
        "uvicorn.error",
        "uvicorn.access",
        "httpx",
        "httpcore",
        "websockets",
        "asyncio",
    ):
        logging.getLogger(chatty).setLevel(logging.WARNING)
