# SPDX-License-Identifier: MIT
"""The client side of RFC 6455 on a non-blocking socket, as far as exec needs it: no extensions.

A library would cost as much start-up time as all the rest of `banger vm exec` and want threads; with this
one `poll` serves the socket, the terminal and signals, and back-pressure is not reading.
"""

from __future__ import annotations

import base64
import enum
import hashlib
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from banger.cli import client
from banger.contract import errors

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_READ_BYTES: Final = 256 * 1024
_MAX_MESSAGE_BYTES: Final = 16 << 20
_FIN: Final = 0x80
_MASKED: Final = 0x80


class Opcode(enum.IntEnum):
    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


@dataclass(frozen=True, slots=True)
class Message:
    """TEXT, BINARY, or CLOSE with its payload; pings are answered here."""

    opcode: Opcode
    data: bytes


def connect(api: client.Client, path: str) -> WebSocket:
    """Raises the daemon's error when it refuses."""
    key = base64.b64encode(os.urandom(16))
    asked = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": key.decode(),
    }
    connected, headers, ahead = api.upgrade(path, asked)
    expected = base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest()).decode()
    if headers.get("sec-websocket-accept") != expected:
        connected.close()
        raise errors.ProtocolError("bangerd's WebSocket handshake is wrong")
    return WebSocket(connected, ahead)


class WebSocket:
    """Bytes in, messages out, and the other way; the caller polls `fileno()`."""

    def __init__(self, connected: socket.socket, ahead: bytes = b"") -> None:
        connected.setblocking(False)
        self._socket = connected
        self._in = bytearray(ahead)
        self._out = bytearray()
        self._parts = bytearray()
        self._parts_opcode = Opcode.CONTINUATION
        self.at_end = False
        """The peer has closed the connection."""

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def pending_bytes(self) -> int:
        """Not yet taken by the socket: what a caller looks at before it reads more to send."""
        return len(self._out)

    def close(self) -> None:
        self._socket.close()

    def send(self, opcode: Opcode, data: bytes) -> None:
        """Queues one message; `flush` moves it."""
        size = len(data)
        self._out.append(_FIN | opcode)
        if size < 126:
            self._out.append(_MASKED | size)
        elif size < 1 << 16:
            self._out += struct.pack("!BH", _MASKED | 126, size)
        else:
            self._out += struct.pack("!BQ", _MASKED | 127, size)
        key = os.urandom(4)
        self._out += key
        self._out += _masked(data, key)

    def flush(self) -> None:
        """Writes what the socket takes now."""
        while self._out:
            try:
                sent = self._socket.send(self._out)
            except BlockingIOError:
                return
            del self._out[:sent]

    def receive(self) -> Iterator[Message]:
        """Reads once, then yields every whole message; call it when the socket is readable."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            data = None
        except ConnectionError:
            data = b""
        if data == b"":
            self.at_end = True
        self._in += data or b""
        while (frame := self._next_frame()) is not None:
            message = self._assembled(*frame)
            if message is not None:
                yield message

    def _next_frame(self) -> tuple[bool, Opcode, bytes] | None:
        held = self._in
        if len(held) < 2:
            return None
        size, start = held[1] & 0x7F, 2
        if held[0] & 0x70 or held[1] & _MASKED:
            raise errors.ProtocolError("bangerd sent a WebSocket frame that was not agreed on")
        if size >= 126:
            form = "!H" if size == 126 else "!Q"
            start += struct.calcsize(form)
            if len(held) < start:
                return None
            (size,) = struct.unpack_from(form, held, 2)
        if size + len(self._parts) > _MAX_MESSAGE_BYTES:
            raise errors.ProtocolError(f"bangerd sent a message of more than {_MAX_MESSAGE_BYTES} bytes")
        if len(held) < start + size:
            return None
        try:
            opcode = Opcode(held[0] & 0x0F)
        except ValueError:
            raise errors.ProtocolError("bangerd sent an unknown WebSocket frame") from None
        final, data = bool(held[0] & _FIN), bytes(memoryview(held)[start : start + size])
        del held[: start + size]
        return final, opcode, data

    def _assembled(self, final: bool, opcode: Opcode, data: bytes) -> Message | None:
        if opcode is Opcode.PING:
            self.send(Opcode.PONG, data)
            return None
        if opcode is Opcode.PONG:
            return None
        if opcode is Opcode.CLOSE:
            return Message(opcode, data)
        if opcode is not Opcode.CONTINUATION:
            if final and not self._parts:
                return Message(opcode, data)
            self._parts_opcode = opcode
        self._parts += data
        if not final:
            return None
        whole = Message(self._parts_opcode, bytes(self._parts))
        self._parts.clear()
        return whole


def _masked(data: bytes, key: bytes) -> bytes:
    """XOR with the repeated key, as one big number: the only way that is quick in Python."""
    size = len(data)
    if not size:
        return b""
    repeated = (key * (size // 4 + 1))[:size]
    mixed = int.from_bytes(data, "little") ^ int.from_bytes(repeated, "little")
    return mixed.to_bytes(size, "little")
