# SPDX-License-Identifier: MIT
"""Who is on the other end of a Unix socket, by the kernel's word: SO_PEERCRED, unix(7)."""

from __future__ import annotations

import socket
import struct
from typing import Final, NamedTuple

_UCRED: Final = struct.Struct("=iII")


class Peer(NamedTuple):
    """As it was when it connected."""

    pid: int
    uid: int
    gid: int


def of(connection: socket.socket) -> Peer:
    return Peer(*_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))
