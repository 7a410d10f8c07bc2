# SPDX-License-Identifier: MIT
"""One line of JSON for each event, whatever is in it."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from banger.owner import logs, operations


def _line(message: str, **fields: object) -> str:
    record = logging.getLogger("test").makeRecord(
        "test", logging.INFO, __file__, 1, message, (), None, extra=fields
    )
    return logs.JsonFormatter().format(record)


def test_a_line_has_time_level_event_and_fields() -> None:
    line = json.loads(_line("vm started", vm="0123456789ab", elapsed_ms=1.5))
    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "info", "event": "vm started", "vm": "0123456789ab", "elapsed_ms": 1.5}


def test_the_operation_is_named() -> None:
    token = operations.current_op_id.set("abcdefabcdef")
    try:
        assert json.loads(_line("x"))["op"] == "abcdefabcdef"
    finally:
        operations.current_op_id.reset(token)


@pytest.mark.parametrize(
    "hostile",
    [
        'line\n{"level":"info","event":"forged"}',
        "\x1b[2J\x1b]0;title\x07",
        "\x7f\x9b31m",
        "\u202egnal\u2028",
        "\ud800 a lone surrogate",
    ],
)
def test_nothing_can_forge_a_line_or_move_a_cursor(hostile: str) -> None:
    line = _line("guest said", detail=hostile)
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["detail"] == hostile


def test_values_that_are_no_json_are_shown_as_text() -> None:
    assert json.loads(_line("x", error=ValueError("bad")))["error"] == "bad"


def test_an_exception_is_one_line_with_its_traceback() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        record = logging.getLogger("test").makeRecord(
            "test", logging.ERROR, __file__, 1, "failed", (), sys.exc_info()
        )
    line = logs.JsonFormatter().format(record)
    assert "\n" not in line
    assert "Traceback" in json.loads(line)["exception"]
