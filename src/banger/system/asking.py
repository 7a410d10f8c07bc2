# SPDX-License-Identifier: MIT
"""Questions to the two services, as root or the owner puts them: for install, uninstall and doctor."""

from __future__ import annotations

import http.client
import socket
import struct
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from banger.contract import decoding, errors, privileged
from banger.system import host

T = TypeVar("T")

_LENGTH: Final = struct.Struct("!I")


def daemon(path: str, kind: type[T], *, at: Path = host.API_SOCKET, timeout_s: float = 60.0) -> T:
    """The answer to a GET. Raises OSError while nobody answers, or something else does."""
    connection = http.client.HTTPConnection("banger", timeout=timeout_s)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(timeout_s)
    try:
        connection.sock.connect(str(at))
        connection.request("GET", path)
        return decoding.json(connection.getresponse().read(), kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, http.client.HTTPException) as error:
        raise OSError(f"not an answer of bangerd: {error}") from error
    finally:
        connection.close()


def helper(
    request: privileged.Request[privileged.ResultT],
    *,
    at: Path = host.HELPER_SOCKET,
    timeout_s: float = 120.0,
) -> privileged.ResultT:
    """The helper's result. Raises its error, or OSError while nobody answers, or something else does."""
    data = msgspec.json.encode({"request": request})
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(timeout_s)
        link.connect(str(at))
        link.sendall(_LENGTH.pack(len(data)) + data)
        with link.makefile("rb") as stream:
            head = stream.read(_LENGTH.size)
            if len(head) != _LENGTH.size:
                raise OSError("bangerd-root closed the connection without an answer")
            (size,) = _LENGTH.unpack(head)
            try:
                reply = decoding.json(stream.read(size), privileged.Reply)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:  # it ended, or has another version
                raise OSError(f"not an answer of bangerd-root: {error}") from error
    if reply.error is not None:
        raise errors.from_body(reply.error)
    if reply.result is None:
        raise errors.ProtocolError("the root helper answered nothing")
    return reply.result  # type: ignore[return-value]  # the helper's table pairs it with the request


def required(request: privileged.Request[privileged.ResultT]) -> privileged.ResultT:
    """As `helper`, for who cannot go on without. Raises UnavailableError while nobody answers."""
    try:
        return helper(request)
    except OSError as error:
        raise errors.UnavailableError(
            f"bangerd-root does not answer: {error.strerror or error}",
            hint="see why: journalctl -u bangerd-root; mended, give the same command again",
        ) from error
