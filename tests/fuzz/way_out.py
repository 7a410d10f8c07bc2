# SPDX-License-Identifier: MIT
"""A build's way out as targets of the fuzzer: what a build asks for, and what comes back."""

from __future__ import annotations

import asyncio
import atexit
from typing import cast

from banger.net import forward
from tests.fuzz.engine import Target


def requests() -> Target:
    """What is passed on is one request, and whoever reads it next reads the same in it."""

    def run(data: bytes) -> None:
        asked = forward.parse(data)
        if asked.method == forward.CONNECT:
            return
        for by_proxy in (False, True):
            said = forward.head(asked, by_proxy=by_proxy, more=("Proxy-Authorization: Basic eA==",))
            assert said.index(forward.END) == len(said) - len(forward.END)
            assert said.lower().count(b"\r\nproxy-authorization:") == 1
        again = forward.parse(said)
        assert (again.host, again.port, again.path) == (asked.host, asked.port, asked.path)
        assert (again.is_last, again.headers) == (asked.is_last, asked.headers)

    seeds = [
        b"GET http://mirror.example:8080/x?y HTTP/1.1\r\nHost: other\r\nAccept: a/b\r\n\r\n",
        b"HEAD http://[2001:db8::1]/ HTTP/1.0\r\nProxy-Connection: close\r\n\r\n",
        b"CONNECT mirror.example:443 HTTP/1.1\r\nProxy-Authorization: Basic eA==\r\n\r\n",
    ]
    words = (
        b"\r\n\r\n",
        b"\r\n ",
        b"Transfer-Encoding: chunked",
        b"Content-Length: 1",
        b"@",
        b"http://",
        b"%00",
    )
    return Target("way-out", run, seeds, (forward.NotServedError,), words)


class _Nowhere:
    def write(self, data: bytes) -> None:
        del data

    async def drain(self) -> None:
        pass

    def can_write_eof(self) -> bool:
        return False


def answers() -> Target:
    """A mirror's answers, to requests of one connection; each ends somewhere."""
    loop = asyncio.new_event_loop()
    atexit.register(loop.close)
    asked = forward.Asked("GET", "mirror.example", 80, "/")

    async def pass_on(data: bytes) -> None:
        there = asyncio.StreamReader(limit=1 << 16)
        there.feed_data(data)
        there.feed_eof()
        writer = cast(asyncio.StreamWriter, _Nowhere())
        while await forward.relay(asked, await forward.answer(there), there, writer):
            pass

    def run(data: bytes) -> None:
        loop.run_until_complete(pass_on(data))

    seeds = [
        b"HTTP/1.1 100 Go on\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabHTTP/1.1 304 Same\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x\r\nabc\r\n0\r\nTrailer: y\r\n\r\n",
    ]
    ends = (forward.NotServedError, EOFError, asyncio.LimitOverrunError)
    return Target("way-back", run, seeds, ends, (b"\r\n\r\n", b"Content-Length: ", b"ffffffffffffffff"))
