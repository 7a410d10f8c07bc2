# SPDX-License-Identifier: MIT
"""`make run`: from nothing to a command's output in a microVM, on real everything.

In the lab by default. `--host local` uses this machine, if it has what that needs; it is never used unasked.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lab import accel, cache, errors, provision, remote, session

log = logging.getLogger("lab")

COMMAND = ("banger", "vm", "run", "--rm", "--", "sh", "-c", "uname -a; cat /etc/os-release")
RUN_LIMIT_S = 300


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.demo", description=__doc__)
    parser.add_argument("--host", choices=("lab", "local"), default="lab", help="default: %(default)s")
    parser.add_argument(
        "--up", metavar="NAME", help="only bring up a lab with banger installed, and leave it"
    )
    parser.add_argument(
        "--owner",
        default=os.environ.get("SUDO_USER", ""),
        help="whose banger it is with --host local; default: who called sudo",
    )
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if options.up:
            provision.installed(options.up, detached=True)
            log.info("try: make lab-ssh NAME=%s, and there: banger vm run -- uname -a", options.up)
            return 0
        return _local(options.owner) if options.host == "local" else _in_lab()
    except errors.LabError as error:
        print(f"run: {error}", *getattr(error, "__notes__", []), sep="\n", file=sys.stderr)
        return 1


def _in_lab() -> int:
    began = time.monotonic()
    with provision.installed(f"run-{os.getpid()}") as lab:
        log.info(
            "the lab is ready after %.1f s; in it, as the user %s:",
            time.monotonic() - began,
            provision.OWNER,
        )
        return _show(_ssh(lab))


def _ssh(lab: session.Lab) -> tuple[list[str], Path]:
    """A terminal of ours is a terminal there, so progress is drawn as a user sees it."""
    tty = "-tt" if sys.stdout.isatty() and sys.stderr.isatty() else "-T"
    line = remote.remote_line(COMMAND, user=provision.OWNER, timeout_s=RUN_LIMIT_S)
    return [*lab.shell.ssh_argv(tty), line], lab.directory


def _local(owner: str) -> int:
    missing = missing_locally()
    if missing:
        raise errors.LabError(f"this machine cannot run microVMs itself: {'; '.join(missing)}")
    if not owner:
        raise errors.LabError("whose banger is it to be? say: make run HOST=local OWNER=you")
    parcel = provision.bundle(cache.default_root())
    try:
        provision.install(provision.ThisMachine(), parcel.path, owner)
    finally:
        parcel.close()
    return _show((provision.as_user(COMMAND, owner), Path("/")))


def missing_locally() -> list[str]:
    found = {
        "no systemd": Path("/run/systemd/system").is_dir(),
        "no device-mapper": _opens("/dev/mapper/control"),
    }
    refusal = accel.guest_refusal()
    return [*([refusal] if refusal else []), *(what for what, is_there in found.items() if not is_there)]


def _opens(device: str) -> bool:
    """A node alone says nothing: it may have no driver, or call for the one it has."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _show(command: tuple[list[str], Path]) -> int:
    argv, directory = command
    log.info("$ %s", " ".join(COMMAND[:-1]) + f" '{COMMAND[-1]}'")
    return subprocess.run(argv, stdin=subprocess.DEVNULL, cwd=directory, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
