# SPDX-License-Identifier: MIT
"""The builder's socket as systemd holds it: the real program's code answers each connection, in a thread.

`mmdebstrap` is a script of the test's.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from banger.builder import main


def served(connection: socket.socket, owner_uid: int | None = None) -> None:
    """One build, to its end."""
    with connection:
        asyncio.run(main.serve(connection, os.getuid() if owner_uid is None else owner_uid))


class Listening:
    """Accepts until `close`, which waits for every build."""

    def __init__(self, path: Path, serve: Callable[[socket.socket], None] = served) -> None:
        self._serve = serve
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._builds: list[threading.Thread] = []
        self._beginning = threading.Lock()
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def wait(self) -> None:
        """Until what was begun has ended."""
        with self._beginning:
            begun = list(self._builds)
        for build in begun:
            build.join(30)
            assert not build.is_alive()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        self.wait()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            build = threading.Thread(target=self._serve, args=(connection,))
            with self._beginning:  # its client may be done with it before it is in the list
                build.start()
                self._builds.append(build)
