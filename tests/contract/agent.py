# SPDX-License-Identifier: MIT
"""The real agent on an inherited socket, for the tests of its protocol."""

from __future__ import annotations

import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def running(program: Path) -> Iterator[Path]:
    """The socket of an agent that runs until the block ends; the agent has the tests' own uid."""
    with tempfile.TemporaryDirectory(prefix="b-", dir="/tmp") as directory:
        path = Path(directory) / "agent.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(64)
            number = listener.fileno()
            agent = subprocess.Popen(
                [str(program), "agent", "--listen-fd", str(number)],
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
            )
        try:
            yield path
        finally:
            agent.terminate()
            agent.wait(timeout=10)
