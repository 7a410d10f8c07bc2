# SPDX-License-Identifier: MIT
"""The control protocol against a small server that speaks as QEMU does."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab import errors, qmp

Message = dict[str, Any]

GREETING: Message = {"QMP": {"version": {}, "capabilities": []}}
EVENT: Message = {"event": "RESUME", "timestamp": {}}


@contextmanager
def _server(path: Path, answers: dict[str, list[Message]]) -> Iterator[list[Message]]:
    """Serve one connection; a command that has no answers ends it."""
    seen: list[Message] = []
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(os.fspath(path))
    listener.listen(1)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rwb") as stream:
            stream.write(json.dumps(GREETING).encode() + b"\n")
            stream.flush()
            for line in stream:
                seen.append(json.loads(line))
                replies = answers.get(seen[-1]["execute"])
                if replies is None:
                    return
                for reply in replies:
                    stream.write(json.dumps(reply).encode() + b"\n")
                stream.flush()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield seen
    finally:
        thread.join(timeout=10)
        listener.close()


def test_result_is_found_between_events(tmp_path: Path) -> None:
    answers: dict[str, list[Message]] = {
        "qmp_capabilities": [{"return": {}}],
        "query": [EVENT, {"return": {"a": 1}}],
    }
    with _server(tmp_path / "q", answers) as seen, qmp.connect(tmp_path / "q", timeout_s=5) as control:
        assert control.execute("query", {"x": 2}) == {"a": 1}
    assert seen[-1] == {"execute": "query", "arguments": {"x": 2}}


def test_refusal_names_the_command_and_the_reason(tmp_path: Path) -> None:
    answers: dict[str, list[Message]] = {
        "qmp_capabilities": [{"return": {}}],
        "bad": [{"error": {"desc": "not now"}}],
    }
    with (
        _server(tmp_path / "q", answers),
        qmp.connect(tmp_path / "q", timeout_s=5) as control,
        pytest.raises(errors.QemuError, match="refused bad: not now"),
    ):
        control.execute("bad")


def test_end_of_qemu_is_an_error(tmp_path: Path) -> None:
    with (
        _server(tmp_path / "q", {"qmp_capabilities": [{"return": {}}]}),
        qmp.connect(tmp_path / "q", timeout_s=5) as control,
        pytest.raises(errors.QemuError, match="went away"),
    ):
        control.execute("quit-without-a-word")


def test_event_is_waited_for(tmp_path: Path) -> None:
    answers: dict[str, list[Message]] = {
        "qmp_capabilities": [{"return": {}}, {"event": "OTHER"}, {"event": "WANTED", "data": {"x": 1}}]
    }
    with _server(tmp_path / "q", answers), qmp.connect(tmp_path / "q", timeout_s=5) as control:
        assert control.wait_event("WANTED")["data"] == {"x": 1}


def test_nobody_listening_is_an_error_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(errors.QemuError, match="nobody"), qmp.connect(tmp_path / "nobody", timeout_s=1):
        pass


def test_deep_directory_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    answers: dict[str, list[Message]] = {"qmp_capabilities": [{"return": {}}]}
    with _server(Path("q"), answers), qmp.connect(deep / "q", timeout_s=5):
        pass
