# SPDX-License-Identifier: MIT
"""The one door to programs of the host: started as a VM's uid, without privileges, with a deadline."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from banger.contract import errors
from banger.helper.linux import pidfd

ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
_MAX_FILE_BYTES: Final = 8 << 20
_TAIL_BYTES: Final = 4096


class Ended(NamedTuple):
    status: int
    tail: str


def run(name: str, arguments: Sequence[str], *, uid: int, fds: Sequence[int], deadline_s: float) -> Ended:
    """Runs a program of the host to its end; it inherits only `fds`. Its output may be hostile and long."""
    deadline = time.monotonic() + deadline_s
    with open(os.memfd_create("output"), "w+b") as output:
        process = start([_find(name), *arguments], uid=uid, fds=fds, output=output.fileno())
        held = os.pidfd_open(process.pid)
        try:
            # What it writes to files is bounded; block devices are not subject to this limit.
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (_MAX_FILE_BYTES, _MAX_FILE_BYTES))
            if not pidfd.wait(held, deadline=deadline):
                raise errors.DeadlineError(f"{name} was ended: not done after {deadline_s:g} s")
        finally:
            process.kill()
            process.wait()
            os.close(held)
        output.seek(max(0, output.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return Ended(process.returncode, output.read().decode(errors="replace"))


def start(argv: Sequence[str], *, uid: int, fds: Sequence[int], output: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        user=uid,
        group=uid,
        extra_groups=[],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=fds,
        env=ENVIRONMENT,
        cwd="/",
        start_new_session=True,
        umask=0o077,
    )


def _find(name: str) -> str:
    for directory in ENVIRONMENT["PATH"].split(":"):
        if os.access(f"{directory}/{name}", os.X_OK):
            return f"{directory}/{name}"
    raise errors.MissingToolError(f"{name} is not installed", hint="install the package e2fsprogs")
