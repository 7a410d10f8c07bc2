# SPDX-License-Identifier: MIT
"""bangerd-root, the process that is root. It starts in a fixed order and says what it is left with.

Sockets, descriptors, groups, ids, Linux capabilities, a line in the log, then it serves.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from banger.contract import errors
from banger.helper import cgroup, filesystem, server
from banger.helper import policy as policies
from banger.helper.linux import caps

_FIRST_PASSED_FD: Final = 3


def main(argv: Sequence[str] | None = None) -> int:
    """`bangerd-root [--config PATH]`, started by its socket unit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _serve(_config_path(arguments))
    except errors.BangerError as error:
        server.log("error", "cannot start", error=error.message, hint=error.hint)
        return 1
    return 0


def _config_path(arguments: list[str]) -> Path:
    if not arguments:
        return policies.DEFAULT_PATH
    if len(arguments) == 2 and arguments[0] == "--config":
        return Path(arguments[1])
    raise errors.BadRequestError("usage: bangerd-root [--config PATH]")


def _serve(config: Path) -> None:
    if os.geteuid() != 0:
        raise errors.UnauthorizedError("bangerd-root must be started as root", hint="systemd does that")
    listener = _passed_listener()
    os.closerange(_FIRST_PASSED_FD + 1, 1024)
    policy = policies.load(config)
    os.umask(0o077)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    caps.no_new_privileges()
    caps.keep_only(frozenset(caps.CAPABILITIES))
    cgroup.ensure_parent(policy)
    filesystem.sweep(policy)
    serving = server.Server(policy, listener)
    signal.set_wakeup_fd(serving.wake_fd, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)  # what is written to the descriptor stops it
    server.log("info", "serving", owner=policy.owner_name, effective_caps=caps.effective(), pid=os.getpid())
    _notify("READY=1")
    serving.serve()


def _passed_listener() -> socket.socket:
    """The listener from the socket unit (sd_listen_fds(3)); there is no other way to start."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        raise errors.BadRequestError("no socket was passed", hint="start bangerd-root.socket with systemctl")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    os.set_inheritable(_FIRST_PASSED_FD, False)
    return socket.socket(fileno=_FIRST_PASSED_FD)


def _notify(state: str) -> None:
    """sd_notify(3)."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as wire:
            wire.connect("\0" + address[1:] if address.startswith("@") else address)
            wire.sendall(state.encode())


if __name__ == "__main__":
    sys.exit(main())
