# SPDX-License-Identifier: MIT
"""Speaks QEMU's control protocol, as far as the lab needs it. Used by machine."""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lab import errors


class Qmp:
    """One control connection; QEMU serves one at a time, so it is opened for a few commands and closed."""

    def __init__(self, connection: socket.socket, reader: BinaryIO) -> None:
        self._socket = connection
        self._reader = reader

    def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, fd: int | None = None
    ) -> Any:
        """Carry out one command and give its result; events in between are skipped."""
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        ancillary = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        self._socket.sendmsg([json.dumps(request).encode() + b"\n"], ancillary)
        while True:
            answer = self._read(command)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise errors.QemuError(f"QEMU refused {command}: {answer['error'].get('desc')}")

    def wait_event(self, *names: str) -> dict[str, Any]:
        """Wait for one of the named events; the connection's time limit bounds each message."""
        while True:
            event = self._read(f"event {names[0]}")
            if event.get("event") in names:
                return event

    def human(self, line: str) -> str:
        """Ask the human monitor, for the few things that QMP has no command for."""
        return str(self.execute("human-monitor-command", {"command-line": line}))

    def _read(self, doing: str) -> dict[str, Any]:
        try:
            line = self._reader.readline()
        except TimeoutError as error:
            raise errors.QemuError(f"QEMU did not answer in time to {doing}") from error
        if not line:
            raise errors.QemuError(f"QEMU went away during {doing}")
        message: dict[str, Any] = json.loads(line)
        return message


@contextlib.contextmanager
def connect(path: Path, *, timeout_s: float) -> Iterator[Qmp]:
    """Open the control socket of a running QEMU."""
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        # A path through a directory descriptor is short, however deep the cache lies.
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            connection.connect(f"/proc/self/fd/{directory}/{path.name}")
        except OSError as error:
            raise errors.QemuError(f"cannot reach QEMU through {path}: {error}") from error
        finally:
            os.close(directory)
        with connection.makefile("rb") as reader:
            control = Qmp(connection, reader)
            control._read("greeting")
            control.execute("qmp_capabilities")
            connection.settimeout(max(0.1, deadline - time.monotonic()))
            yield control
