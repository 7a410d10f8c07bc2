# SPDX-License-Identifier: MIT
"""A conversation with the daemon over a WebSocket: JSON messages, and streams of bytes that end.

Blocking, and interrupted by signals that raise; leaving early is how the daemon learns to stop.
"""

from __future__ import annotations

import collections
import contextlib
import os
import select
from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

import msgspec

from banger.cli import client, websocket
from banger.contract import decoding, errors, resources

T = TypeVar("T")
_HELD_BYTES: Final = 1 << 20
_PIECE_BYTES: Final = 256 * 1024


class _Last(msgspec.Struct):
    """What any message may be instead of the one that was expected."""

    error: errors.ErrorBody | None = None


class Exchange:
    """One conversation. Every method raises the daemon's error when that comes instead."""

    def __init__(self, channel: websocket.WebSocket) -> None:
        self._channel = channel
        self._heard: collections.deque[websocket.Message] = collections.deque()

    def tell(self, message: resources.Body) -> None:
        self._channel.send(websocket.Opcode.TEXT, client.encoded(message))
        self._flush()

    def send(self, pieces: Iterable[bytes]) -> int:
        """A whole stream; returns how many bytes it had."""
        count = 0
        for piece in pieces:
            view = memoryview(piece)
            count += len(view)
            while view:
                self._channel.send(websocket.Opcode.BINARY, bytes(view[:_PIECE_BYTES]))
                view = view[_PIECE_BYTES:]
                self._flush(_HELD_BYTES)
        self._channel.send(websocket.Opcode.BINARY, b"")
        self._flush()
        return count

    def hear(self, kind: type[T]) -> T:
        message = self._next()
        if message.opcode is not websocket.Opcode.TEXT:
            raise errors.ProtocolError("bangerd sent data where it should have said something")
        _raise_if_failed(message)
        return client.decode(message.data, kind)

    def pieces(self) -> Iterator[bytes]:
        """The stream that comes next."""
        while True:
            message = self._next()
            if message.opcode is websocket.Opcode.TEXT:
                _raise_if_failed(message)
                raise errors.ProtocolError("bangerd ended a stream without its end")
            if not message.data:
                return
            yield message.data

    def read(self, fd: int) -> bytes:
        """What comes next from a descriptor of ours, and nothing at its end, to be sent. Raises what the
        daemon says meanwhile."""
        while True:
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            poller.register(self._channel, self._wanted(writing=bool(self._channel.pending_bytes)))
            ready = dict(poller.poll())
            self._move(ready.pop(self._channel.fileno(), 0))
            self._raise_what_was_heard()
            with contextlib.suppress(BlockingIOError):  # another process that shares it was quicker
                if ready:
                    return os.read(fd, _PIECE_BYTES)

    def _next(self) -> websocket.Message:
        while not self._heard:
            self._turn(writing=bool(self._channel.pending_bytes))
        return self._heard.popleft()

    def _flush(self, keep_bytes: int = 0) -> None:
        while self._channel.pending_bytes > keep_bytes:
            self._turn(writing=True)
            self._raise_what_was_heard()

    def _raise_what_was_heard(self) -> None:
        """While there is more to send: an early word is a refusal."""
        if self._heard and self._heard[0].opcode is websocket.Opcode.TEXT:
            _raise_if_failed(self._heard[0])
        if self._channel.at_end:  # what is pending goes nowhere, whatever else was heard before
            for message in self._heard:
                _raise_if_failed(message)
            raise _lost()

    def _turn(self, *, writing: bool) -> None:
        poller = select.poll()
        poller.register(self._channel, self._wanted(writing=writing))
        for _, events in poller.poll():
            self._move(events)

    def _wanted(self, *, writing: bool) -> int:
        return select.POLLIN | (select.POLLOUT if writing else 0)

    def _move(self, events: int) -> None:
        if events & select.POLLOUT:
            with contextlib.suppress(ConnectionError):  # reading says what came before it
                self._channel.flush()
        if events & ~select.POLLOUT:
            self._receive()

    def _receive(self) -> None:
        for message in self._channel.receive():
            if message.opcode is websocket.Opcode.CLOSE:
                self._channel.at_end = True
            else:
                self._heard.append(message)
        if self._channel.at_end and not self._heard:
            raise _lost()


def _lost() -> errors.BangerError:
    hint = "the VM may still run; see `banger vm list` and `journalctl -u bangerd`"
    return errors.UnavailableError("the connection to bangerd was lost", hint=hint)


def _raise_if_failed(message: websocket.Message) -> None:
    with contextlib.suppress(msgspec.DecodeError):
        error = decoding.json(message.data, _Last).error
        if error is not None:
            raise client.failure(error)


@contextlib.contextmanager
def opened(api: client.Client, path: str) -> Iterator[Exchange]:
    """Closed when the block ends, in whatever way."""
    with contextlib.closing(websocket.connect(api, path)) as channel:
        yield Exchange(channel)
