# SPDX-License-Identifier: MIT
"""The one door to programs of the host, each with a deadline.

What parses files of others runs as a VM's uid without privileges, and with limits of its own: a file system
may claim anything. What speaks with the kernel or with a service, on arguments composed here, runs as root.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from banger.contract import errors
from banger.helper.linux import libc, pidfd

ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
MAX_OUTPUT_BYTES: Final = 1 << 20
MAX_MEMORY_BYTES: Final = 384 << 20
"""Less than the helper's unit may have."""
_STACK_BYTES: Final = 1 << 20
"""e2fsprogs may read in a thread for each processor; each takes this of the memory, and not 8 MiB."""
_SPARE_TASKS: Final = 16
"""One taken over can start no more, and what the helper's unit may have is left to others."""
PACKAGES: Final = {
    "choom": "util-linux",
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "iptables-legacy": "iptables",
    "ip6tables-legacy": "iptables",
    "prlimit": "util-linux",
    "resolvectl": "systemd-resolved",
}
"""All that are started here, and who has them: whether they are root's alone is looked at by their names."""


class Ended(NamedTuple):
    status: int
    output: bytes


def run(name: str, arguments: Sequence[str], *, uid: int, fds: Sequence[int], deadline_s: float) -> Ended:
    """Runs a program of the host to its end; it inherits only `fds`. Its output may be hostile and long.

    What it started ends with it, unless that made a session of its own, which e2fsprogs never do.
    """
    deadline = time.monotonic() + deadline_s
    with libc.closing(os.memfd_create("output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as output:
        os.ftruncate(output, MAX_OUTPUT_BYTES)
        fcntl.fcntl(output, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)  # what goes beyond is refused
        argv = [*_limited(deadline_s), _find(name), *arguments]
        process = subprocess.Popen(
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
        try:
            with libc.closing(os.pidfd_open(process.pid)) as held:
                if not pidfd.wait(held, deadline=deadline):
                    raise errors.DeadlineError(f"{name} was ended: not done after {deadline_s:g} s")
        finally:
            # Before it is waited for: its group is its own for as long.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return Ended(process.returncode, os.pread(output, os.lseek(output, 0, os.SEEK_CUR), 0))


def _limited(deadline_s: float) -> list[str]:
    """When all together want more than there is, the kernel ends one of them and not the helper.

    The limits are set by programs, since nothing may run between fork and exec in a process with threads.
    """
    data, stack = f"--data={MAX_MEMORY_BYTES}", f"--stack={_STACK_BYTES}"
    processor = f"--cpu={math.ceil(deadline_s)}"  # holds when nobody is left to keep the deadline
    tasks = f"--nproc={max_tasks()}"
    return [_find("choom"), "-n", "1000", "--", _find("prlimit"), data, stack, processor, tasks, "--"]


def max_tasks() -> int:
    """Processes and threads that a VM's uid may have while such a program runs: its VMM does not run then.

    e2fsprogs reads in a thread for each processor that the host may have, and gives up without one of them.
    """
    return os.sysconf("SC_NPROCESSORS_CONF") + _SPARE_TASKS


def run_as_root(name: str, arguments: Sequence[str], *, deadline_s: float) -> Ended:
    """The output is stdout when it succeeds, and what it complained of when not."""
    try:
        done = subprocess.run(
            [_find(name), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=deadline_s,
            env=ENVIRONMENT,
            cwd="/",
            umask=0o077,
        )
    except subprocess.TimeoutExpired:
        raise errors.DeadlineError(f"{name} was ended: not done after {deadline_s:g} s") from None
    return Ended(done.returncode, done.stderr[:MAX_OUTPUT_BYTES] if done.returncode else done.stdout)


def _find(name: str) -> str:
    for directory in ENVIRONMENT["PATH"].split(":"):
        if os.access(f"{directory}/{name}", os.X_OK):
            return f"{directory}/{name}"
    package = PACKAGES.get(name, name)
    raise errors.MissingToolError(f"{name} is not installed", hint=f"install the package {package}")
