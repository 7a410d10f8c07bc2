# SPDX-License-Identifier: MIT
"""The real agent with a `/root`, mounts and a host name of its own; the rest is this machine's."""

from __future__ import annotations

import contextlib
import platform
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from banger import guest_binary

_INSIDE = 'mount --bind "$1" /root && hostname hello && exec -a @banger-guest "$2" agent --listen-fd "$3"'


@contextlib.contextmanager
def running(directory: Path, home: Path) -> Iterator[Path]:
    """The socket of an agent whose /root is `home`."""
    path = directory / "agent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        number = listener.fileno()
        program = str(guest_binary.path(platform.machine()))
        agent = subprocess.Popen(
            ["unshare", "--mount", "--uts", "bash", "-c", _INSIDE, "agent", str(home), program, str(number)],
            pass_fds=[number],
            stdin=subprocess.DEVNULL,
        )
    try:
        yield path
    finally:
        agent.terminate()
        agent.wait(timeout=30)
