# SPDX-License-Identifier: MIT
"""What every poll loop over a WebSocket does: asks for what may move now, moves it, hands on what came.

Nothing is read that could not be passed on: a few hundred KiB at most wait in a direction.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Callable, Container
from typing import Final, TypeVar

import msgspec

from banger.cli import websocket
from banger.contract import decoding, errors

_T = TypeVar("_T")
HELD_BYTES: Final = 256 * 1024
PIECE_BYTES: Final = 4096
"""A pipe or terminal that polls writable takes this much without blocking (PIPE_BUF)."""
WRITABLE: Final = select.POLLOUT | select.POLLHUP | select.POLLERR
_READABLE: Final = select.POLLIN | select.POLLHUP | select.POLLERR
_READ_BYTES: Final = 64 * 1024


class Link:
    """A WebSocket, and a descriptor of ours (`input`, -1: none) whose bytes go into it.

    `window_bytes`: how many the other side lets us send for now.
    """

    def __init__(
        self, channel: websocket.WebSocket, hear: Callable[[websocket.Message], None], *, input: int = -1
    ) -> None:
        self.channel = channel
        self.input = input
        self.window_bytes = sys.maxsize
        self._hear = hear

    def register(self, poller: select.poll, *, has_room: bool, takes_input: bool) -> None:
        """`has_room`: what comes can be held; `takes_input`: the other side has not ended."""
        wanted = select.POLLOUT if self.channel.pending_bytes else 0
        if has_room:
            wanted |= select.POLLIN
        if wanted and not self.channel.at_end:
            poller.register(self.channel, wanted)
        if self.input >= 0 and takes_input and self.window_bytes and self.channel.pending_bytes < HELD_BYTES:
            poller.register(self.input, _READABLE)

    def move(self, ready: Container[int]) -> None:
        """Sends and takes in what may move."""
        if self.channel.fileno() in ready:
            if self.channel.pending_bytes:
                with contextlib.suppress(ConnectionError):  # reading says what came before it
                    self.channel.flush()
            for message in self.channel.receive():
                self._hear(message)
        if self.input in ready:
            self._read_input()

    def end_input(self) -> None:
        """An empty message ends our direction."""
        self.input = -1
        self.channel.send(websocket.Opcode.BINARY, b"")

    def _read_input(self) -> None:
        try:
            data = os.read(self.input, min(_READ_BYTES, self.window_bytes))
        except BlockingIOError:  # another process that shares it was quicker
            return
        except OSError:  # a terminal that hung up
            data = b""
        if data:
            self.window_bytes -= len(data)
            self.channel.send(websocket.Opcode.BINARY, data)
        else:
            self.end_input()


def write(fd: int, held: bytearray, size: int = PIECE_BYTES) -> None:
    """The begin of `held`, as much as is taken: nothing where another process that shares a descriptor that
    does not block was quicker."""
    with contextlib.suppress(BlockingIOError):
        written = os.write(fd, memoryview(held)[:size])
        del held[:written]


def decode(data: bytes, kind: type[_T]) -> _T:
    """Raises ProtocolError."""
    try:
        return decoding.json(data, kind)
    except msgspec.DecodeError as error:
        raise errors.ProtocolError(f"what bangerd says makes no sense: {error}") from error
