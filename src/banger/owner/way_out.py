# SPDX-License-Identifier: MIT
"""The way out of a build, which has no network but a loopback of its own: an HTTP proxy on a socket there.

What it asks for is a stranger's wish. It is connected to the internet and to package sources of the host's;
never to this host, the networks that it is in, guests, or a cloud's metadata. A proxy that the daemon has is
asked from here, so its password is told to no build. Used by `builder`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from typing import Final

from banger.contract import errors
from banger.images import connections
from banger.net import carry, forward, outside, tcp_server

_MOST: Final = 64
_MAX_HEAD_BYTES: Final = 32 << 10
_HEAD_S: Final = 60.0
"""A client may connect ahead, and ask when it needs something."""
_CONNECT_S: Final = 30.0
_NEXT_S: Final = 3.0
"""While there is another address to try."""
_GRACE_S: Final = 5.0
_Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.contextmanager
def serving(listener: socket.socket, sources: Collection[forward.Place]) -> Iterator[None]:
    """Serves on this socket, and owns it, inside the block; all connections have ended after it.

    In a thread and a loop of its own. Whoever made the socket shares it, and could have an `accept` wait
    that was not to: that must not hold up the daemon.
    """
    with listener.dup() as ours:
        loop, ended = asyncio.new_event_loop(), asyncio.Event()
        thread = threading.Thread(target=_run, args=(loop, listener, ended, sources), name="way-out")
        thread.start()
        try:
            yield
        finally:
            with contextlib.suppress(RuntimeError):  # it has ended
                loop.call_soon_threadsafe(ended.set)
            thread.join(_GRACE_S)
            if thread.is_alive():
                with contextlib.suppress(OSError):
                    ours.shutdown(socket.SHUT_RDWR)
                thread.join()


def _run(
    loop: asyncio.AbstractEventLoop,
    listener: socket.socket,
    ended: asyncio.Event,
    sources: Collection[forward.Place],
) -> None:
    async def serve() -> None:
        way = _WayOut(sources, urllib.request.getproxies_environment())
        server = tcp_server.TcpServer(way.serve, most=_MOST, limit=_MAX_HEAD_BYTES)
        listener.setblocking(False)
        server.start(listener)
        try:
            await ended.wait()
        finally:
            await server.close()
            await asyncio.sleep(0)  # connections are closed in the loop's next turn

    try:
        loop.run_until_complete(serve())
    finally:
        loop.close()  # does not wait for a name that is still being looked up


class _WayOut:
    def __init__(self, sources: Collection[forward.Place], proxies: Mapping[str, str]) -> None:
        self._sources = frozenset(sources)
        self._proxies = proxies

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(_Onward(self._open)) as onward:
            try:
                while await self._serve_one(reader, writer, onward):
                    pass
            except forward.NotServedError as error:
                with contextlib.suppress(OSError):
                    writer.write(forward.refusal(error))
                    await writer.drain()
            except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
                return

    async def _serve_one(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, onward: _Onward
    ) -> bool:
        """Whether another may follow. Each is judged, also where it goes the way of the one before."""
        async with asyncio.timeout(_HEAD_S):
            head = await reader.readuntil(forward.END)
        asked = forward.parse(head)
        if asked.method == forward.CONNECT:
            there, back = await self._open(asked)
            with carry.reset_on_failure(writer), carry.reset_on_failure(back):
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                await carry.both(carry.pump(reader, back), carry.pump(there, writer))
                await carry.closed(back)
            return False
        proxy = self._proxy(asked)
        said = forward.head(asked, by_proxy=proxy is not None, more=_credentials(proxy))
        there, answer = await onward.ask(asked, said)
        with carry.reset_on_failure(writer):
            return await forward.relay(asked, answer, there, writer)

    def _proxy(self, asked: forward.Asked) -> str | None:
        try:
            return connections.proxy_for(asked.scheme, asked.host, asked.port, self._proxies)
        except errors.BangerError as error:
            raise forward.NotServedError(502, error.message) from None

    async def _open(self, asked: forward.Asked) -> _Pair:
        proxy = self._proxy(asked)
        return await (self._straight(asked) if proxy is None else self._through(proxy, asked))

    async def _straight(self, asked: forward.Asked) -> _Pair:
        """An address that swallows what is sent there must not keep the next one until apt gives up."""
        last: Exception = forward.NotServedError(502, f"{asked.host} has no address")
        left = outside.in_turns(await self._allowed(asked))
        while left:
            address = left.pop(0)
            try:
                return await _opened(str(address), asked.port, within_s=_NEXT_S if left else _CONNECT_S)
            except forward.NotServedError as error:
                last = error
        raise last

    async def _allowed(self, asked: forward.Asked) -> list[outside.Address]:
        """Raises for a place that is inside, also one that is in part: whoever names it chooses."""
        try:
            async with asyncio.timeout(_CONNECT_S):
                found = await outside.resolve(asked.host, asked.port)
        except (OSError, TimeoutError):
            raise forward.NotServedError(502, f"{asked.host} cannot be resolved") from None
        if (asked.host, asked.port) not in self._sources and not all(map(outside.is_outside, found)):
            raise forward.NotServedError(403, f"a build does not reach {asked.host}")
        return found

    async def _through(self, proxy: str, asked: forward.Asked) -> _Pair:
        """What a name means is the proxy's to say. One that means a place inside here is refused here."""
        try:
            await self._allowed(asked)
        except forward.NotServedError as error:
            if error.status != 502:
                raise
        parts = urllib.parse.urlsplit(proxy)
        tls = parts.scheme == "https"
        there, back = await _opened(parts.hostname or "", parts.port or forward.PORTS[parts.scheme], tls=tls)
        if asked.method != forward.CONNECT:
            return there, back
        try:
            await _ask_for_tunnel(there, back, asked, proxy)
        except BaseException:
            back.close()
            raise
        return there, back


class _Onward:
    """The connection further that a client has; the next request there goes the same way."""

    def __init__(self, open_to: Callable[[forward.Asked], Awaitable[_Pair]]) -> None:
        self._open_to = open_to
        self._place: forward.Place | None = None
        self._back: asyncio.StreamWriter | None = None
        self._there: asyncio.StreamReader | None = None

    def close(self) -> None:
        if self._back is not None:
            self._back.transport.abort()  # nothing more is to be said, to whoever does not listen either

    async def ask(self, asked: forward.Asked, said: bytes) -> tuple[asyncio.StreamReader, bytes]:
        """From where the answer comes, and its head. What was kept is made anew where it has ended."""
        place = (asked.host, asked.port)
        if self._there is not None and self._back is not None and self._place == place:
            with contextlib.suppress(OSError, EOFError):
                self._back.write(said)
                return self._there, await forward.answer(self._there)
        self.close()
        self._there, self._back = await self._open_to(asked)
        self._place = place
        try:
            self._back.write(said)
            return self._there, await forward.answer(self._there)
        except (OSError, EOFError):
            raise forward.NotServedError(502, f"{asked.host} does not answer") from None


async def _opened(host: str, port: int, *, tls: bool = False, within_s: float = _CONNECT_S) -> _Pair:
    try:
        async with asyncio.timeout(within_s):
            return await asyncio.open_connection(
                host, port, limit=carry.CHUNK, ssl=connections.verified() if tls else None
            )
    except (OSError, TimeoutError):
        raise forward.NotServedError(502, "no connection") from None


async def _ask_for_tunnel(
    there: asyncio.StreamReader, back: asyncio.StreamWriter, asked: forward.Asked, proxy: str
) -> None:
    lines = [f"CONNECT {asked.authority} HTTP/1.1", f"Host: {asked.authority}", *_credentials(proxy)]
    back.write("\r\n".join([*lines, "", ""]).encode())
    try:
        async with asyncio.timeout(_CONNECT_S):
            said = await there.readuntil(forward.END)
    except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
        raise forward.NotServedError(502, "the proxy does not answer") from None
    status = forward.status(said)
    if not status.startswith(b"2"):
        raise forward.NotServedError(502, f"the proxy says {status.decode() or 'nonsense'}")


def _credentials(proxy: str | None) -> tuple[str, ...]:
    parts = urllib.parse.urlsplit(proxy or "")
    if parts.username is None:
        return ()
    pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    return (f"Proxy-Authorization: Basic {base64.b64encode(pair.encode()).decode()}",)
