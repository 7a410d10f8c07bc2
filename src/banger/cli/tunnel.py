# SPDX-License-Identifier: MIT
"""Bytes between our stdin and stdout and a port of a guest: what ssh takes as a ProxyCommand.

One poll loop. Nothing is read that could not be passed on, so the slowest side sets the pace.
"""

from __future__ import annotations

import contextlib
import os
import select
from typing import Final

import msgspec

from banger.cli import client, websocket
from banger.contract import errors, reach

_HELD_BYTES: Final = 256 * 1024
_READ_BYTES: Final = 64 * 1024
_PIECE_BYTES: Final = 4096
"""A pipe that polls writable takes this much without blocking (PIPE_BUF)."""
_READABLE: Final = select.POLLIN | select.POLLHUP | select.POLLERR
_WRITABLE: Final = select.POLLOUT | select.POLLHUP | select.POLLERR


def run(api: client.Client, ref: str, request: reach.ConnectRequest) -> None:
    """Until the guest has ended its side and all of it is written. Raises the daemon's error."""
    channel = websocket.connect(api, f"/v1/vms/{client.segment(ref)}/connect")
    with contextlib.closing(channel):
        channel.send(websocket.Opcode.TEXT, msgspec.json.encode(request))
        channel.flush()
        _Passage(channel).run()


class _Passage:
    def __init__(self, channel: websocket.WebSocket) -> None:
        self._channel = channel
        self._held = bytearray()
        self._stdin = 0
        self._over = False
        """The guest sends nothing more."""

    def run(self) -> None:
        while not self._over or self._held:
            self._turn()
        self._channel.send(websocket.Opcode.CLOSE, b"")
        with contextlib.suppress(ConnectionError):
            self._channel.flush()

    def _turn(self) -> None:
        ready = dict(self._poller().poll())
        if 1 in ready:
            written = os.write(1, memoryview(self._held)[:_PIECE_BYTES])
            del self._held[:written]
        if self._channel.fileno() in ready:
            self._exchange()
        if self._stdin in ready:
            self._read_stdin()

    def _poller(self) -> select.poll:
        poller = select.poll()
        if self._held:
            poller.register(1, _WRITABLE)
        wanted = select.POLLOUT if self._channel.pending_bytes else 0
        if len(self._held) < _HELD_BYTES and not self._over:
            wanted |= select.POLLIN
        if wanted:
            poller.register(self._channel, wanted)
        if self._stdin >= 0 and not self._over and self._channel.pending_bytes < _HELD_BYTES:
            poller.register(self._stdin, _READABLE)
        return poller

    def _exchange(self) -> None:
        if self._channel.pending_bytes:
            with contextlib.suppress(ConnectionError):  # reading says what came before it
                self._channel.flush()
        for message in self._channel.receive():
            if message.opcode is websocket.Opcode.BINARY:
                self._held += message.data
                self._over = self._over or not message.data
            elif message.opcode is websocket.Opcode.TEXT:
                self._end(message.data)
            else:
                self._over = True
        if self._channel.at_end and not self._over:
            hint = "see `journalctl -u bangerd`"
            raise errors.UnavailableError("the connection to bangerd was lost", hint=hint)

    def _end(self, data: bytes) -> None:
        try:
            end = msgspec.json.decode(data, type=reach.ConnectEnd)
        except msgspec.DecodeError as error:
            raise errors.ProtocolError(f"bangerd's last word makes no sense: {error}") from error
        if end.error is not None:
            raise client.failure(end.error)
        self._over = True

    def _read_stdin(self) -> None:
        data = os.read(self._stdin, _READ_BYTES)
        self._channel.send(websocket.Opcode.BINARY, data)
        if not data:  # an empty message ends our direction
            self._stdin = -1
