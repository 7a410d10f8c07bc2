# SPDX-License-Identifier: MIT
"""Bytes between our stdin and stdout and a port of a guest: what ssh takes as a ProxyCommand.

The slowest side sets the pace.
"""

from __future__ import annotations

import contextlib
import select

from banger.cli import client, link, websocket
from banger.contract import errors, reach


def run(api: client.Client, ref: str, request: reach.ConnectRequest) -> None:
    """Until the guest has ended its side and all of it is written. Raises the daemon's error."""
    channel = websocket.connect(api, f"/v1/vms/{client.segment(ref)}/connect")
    with contextlib.closing(channel):
        channel.send(websocket.Opcode.TEXT, client.encoded(request))
        channel.flush()
        _Passage(channel).run()


class _Passage:
    def __init__(self, channel: websocket.WebSocket) -> None:
        self._link = link.Link(channel, self._hear, input=0)
        self._held = bytearray()
        self._over = False
        """The guest sends nothing more."""

    def run(self) -> None:
        channel = self._link.channel
        while not self._over or self._held:
            self._turn()
        channel.send(websocket.Opcode.CLOSE, b"")
        with contextlib.suppress(ConnectionError):
            channel.flush()

    def _turn(self) -> None:
        ready = dict(self._poller().poll())
        if 1 in ready:
            link.write(1, self._held)
        self._link.move(ready)
        if self._link.channel.at_end and not self._over:
            hint = "see `journalctl -u bangerd`"
            raise errors.UnavailableError("the connection to bangerd was lost", hint=hint)

    def _poller(self) -> select.poll:
        poller = select.poll()
        if self._held:
            poller.register(1, link.WRITABLE)
        has_room = len(self._held) < link.HELD_BYTES and not self._over
        self._link.register(poller, has_room=has_room, takes_input=not self._over)
        return poller

    def _hear(self, message: websocket.Message) -> None:
        if message.opcode is websocket.Opcode.BINARY:
            self._held += message.data
            self._over = self._over or not message.data
            return
        if message.opcode is websocket.Opcode.TEXT:
            end = link.decode(message.data, reach.ConnectEnd)
            if end.error is not None:
                raise client.failure(end.error)
        self._over = True
