# SPDX-License-Identifier: MIT
"""The process between a lab's owner and its QEMU, which ends QEMU when nobody wants it any more.

Started by the qemu module as `python -m lab.keeper`, in the lab's own directory. It ends QEMU when the
owner's pipe closes (a test session that died) and when the time limit is over; when the keeper itself is
ended, the kernel kills QEMU.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1
NO_OWNER = -1


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="lab.keeper")
    parser.add_argument("--owner-fd", type=int, default=NO_OWNER, help="pipe whose end of file means: stop")
    parser.add_argument("--report-fd", type=int, required=True, help="pipe that is told QEMU's pid")
    parser.add_argument(
        "--pass-fd",
        dest="pass_fds",
        type=int,
        action="append",
        default=[],
        help="descriptor that QEMU needs",
    )
    parser.add_argument("--limit-s", type=float, required=True, help="how long QEMU may run")
    parser.add_argument(
        "--ephemeral", action="store_true", help="delete the directory when the owner is gone"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    qemu = subprocess.Popen(
        options.command[1:] if options.command[0] == "--" else options.command,
        stdin=subprocess.DEVNULL,
        pass_fds=options.pass_fds,
        preexec_fn=_die_with_parent,
    )
    for fd in options.pass_fds:
        os.close(fd)
    os.write(options.report_fd, str(qemu.pid).encode())
    os.close(options.report_fd)
    orphaned = _watch(qemu, options.owner_fd, options.limit_s)
    if orphaned and options.ephemeral:
        shutil.rmtree(Path.cwd(), ignore_errors=True)
    return 0


def _die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _watch(qemu: subprocess.Popen[bytes], owner_fd: int, limit_s: float) -> bool:
    """Wait for QEMU's end, or bring it about; say whether the owner went away first."""
    qemu_fd = os.pidfd_open(qemu.pid)
    waiting = select.poll()
    waiting.register(qemu_fd, select.POLLIN)
    if owner_fd != NO_OWNER:
        waiting.register(owner_fd, select.POLLIN)
    ready = [fd for fd, _ in waiting.poll(limit_s * 1000)]
    if qemu_fd not in ready:
        print(f"keeper: {'the owner is gone' if ready else 'time is over'}, killing QEMU", file=sys.stderr)
        qemu.kill()
    qemu.wait()
    return owner_fd in ready


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
