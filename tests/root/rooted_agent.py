# SPDX-License-Identifier: MIT
"""The real agent with some files, mounts and a host name of its own; the rest is this machine's."""

from __future__ import annotations

import contextlib
import platform
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from banger import guest_binary

_INSIDE = """
program=$1 number=$2; shift 2
while [ $# -gt 0 ]; do mount --bind "$1" "$2"; shift 2; done
hostname hello
exec -a @banger-guest "$program" agent --listen-fd "$number"
"""


@contextlib.contextmanager
def running(directory: Path, own: Mapping[str, Path], program: Path | None = None) -> Iterator[Path]:
    """The socket of an agent that has its `own` at these paths; as shipped, or of this `program`."""
    path = directory / "agent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        number = listener.fileno()
        program = program or guest_binary.path(platform.machine())
        binds = [word for there, here in own.items() for word in (str(here), there)]
        agent = subprocess.Popen(
            [
                "unshare",
                "--mount",
                "--uts",
                "bash",
                "-ec",
                _INSIDE,
                "agent",
                str(program),
                str(number),
                *binds,
            ],
            pass_fds=[number],
            stdin=subprocess.DEVNULL,
        )
    try:
        yield path
    finally:
        agent.terminate()
        agent.wait(timeout=30)
