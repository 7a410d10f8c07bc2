# SPDX-License-Identifier: MIT
"""The builder as its unit runs it: a uid that owns nothing, without privileges, in a network of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from banger.builder import main
from banger.contract import names

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWNET = 0x40000000


@contextlib.contextmanager
def serving_one(
    home: Path, owner_uid: int, prepare: Callable[[], None] | None = None, *, own_network: bool = True
) -> Iterator[Path]:
    """Where one build is served inside, in a directory that each uid may enter. Raises when it ended badly.

    `prepare` is run in the process of the build, before it gives root up.
    """
    path = home / "b.sock"
    (home / "install.toml").write_text(f"owner_uid = {owner_uid}\n")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        child = os.fork()
        if child == 0:
            _become(listener, home, prepare, own_network=own_network)
        try:
            yield path
        finally:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (0 if own_network else 1)


def _become(
    listener: socket.socket, home: Path, prepare: Callable[[], None] | None, *, own_network: bool
) -> NoReturn:
    """Does as `bangerd-build@.service` does for one connection."""
    status = 255
    try:
        connection, _ = listener.accept()
        os.dup2(connection.fileno(), 0)
        scratch = home / "scratch"
        scratch.mkdir()
        uid = names.BUILD_UIDS[7]
        os.chown(scratch, uid, uid)
        os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
        libc = ctypes.CDLL(None)
        if own_network:
            assert libc.unshare(_CLONE_NEWNET) == 0
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=10)
        if prepare is not None:
            prepare()
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        assert libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
        assert libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0) == 0
        status = main.main(["--install", str(home / "install.toml")])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
