# SPDX-License-Identifier: MIT
"""The way out of builds as a target of the fuzzer: what a build asks, and what a server answers."""

from __future__ import annotations

import asyncio
import atexit
import contextlib

from banger.net import forward
from tests.fuzz.engine import Target

_EXPECTED = (forward.NotServedError, EOFError, asyncio.LimitOverrunError)


class _Kept(asyncio.Transport):
    """Keeps what is written, as a socket whose other end takes everything at once."""

    def __init__(self) -> None:
        super().__init__()
        self.data = bytearray()
        self._is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.data += data

    def can_write_eof(self) -> bool:
        return False

    def is_closing(self) -> bool:
        return self._is_closed

    def close(self) -> None:
        self._is_closed = True


def target() -> Target:
    """Up to the first empty line it is a request, and all that follows an answer and what comes after it.

    What is said onward must be read as the same request, and be one. Of an answer all that was taken must
    have been passed on.
    """
    loop = asyncio.new_event_loop()
    atexit.register(loop.close)

    async def answered(asked: forward.Asked, said: bytes) -> None:
        there = asyncio.StreamReader()
        there.feed_data(said)
        there.feed_eof()
        kept = _Kept()
        answer = await forward.answer(there)
        before = len(said) - len(there._buffer)  # type: ignore[attr-defined]
        writer = asyncio.StreamWriter(kept, asyncio.StreamReaderProtocol(there), there, loop)
        try:
            with contextlib.closing(writer):
                await forward.relay(asked, answer, there, writer)
        finally:
            after = len(said) - len(there._buffer)  # type: ignore[attr-defined]
            passed = bytes(kept.data)
            assert passed.startswith(answer)
            assert said[before:after].startswith(passed[len(answer) :])

    def run(data: bytes) -> None:
        head, end, said = data.partition(forward.END)
        asked = forward.parse(head + end)
        if asked.method != forward.CONNECT:
            onward = forward.head(asked, by_proxy=True)
            assert onward.find(forward.END) == len(onward) - len(forward.END)
            assert forward.parse(onward) == asked
        loop.run_until_complete(answered(asked, said))

    return Target("forward", run, _seeds(), _EXPECTED, _WORDS)


_WORDS = (
    *(b"\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n"),
    *(b"Connection: close\r\n", b"CONNECT ", b"[::1]:1", b"HTTP/1.0 204 \r\n", b"HTTP/1.1 100 \r\n\r\n"),
)


def _seeds() -> list[bytes]:
    get = b"GET http://a.example/b?c HTTP/1.1\r\nHost: a.example\r\nRange: bytes=1-\r\n\r\n"
    counted = b"HTTP/1.1 206 Partial\r\nContent-Length: 3\r\n\r\nabcHTTP/1.1 200 OK\r\n"
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nTrailer: 1\r\n\r\nmore"
    )
    return [
        get + counted,
        get + chunked,
        get + b"HTTP/1.1 100 Continue\r\n\r\n" + counted,
        get + b"HTTP/1.0 200 OK\r\n\r\nto its end",
        b"HEAD http://[2001:db8::1]:80/ HTTP/1.0\r\nA: b\r\n\r\n" + counted,
        b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n" + counted,
        b"POST http://a.example/ HTTP/1.1\r\nContent-Length: 1\r\n\r\n1",
    ]
