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
import dataclasses
import re
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Collection, Iterator, Mapping
from typing import Final

from banger.contract import errors
from banger.images import connections
from banger.net import carry, outside, tcp_server

Place = tuple[str, int]
"""A host's name and a port."""

_MOST: Final = 64
_MAX_HEAD_BYTES: Final = 32 << 10
_HEAD_S: Final = 60.0
"""A client may connect ahead, and ask when it needs something."""
_CONNECT_S: Final = 30.0
_GRACE_S: Final = 5.0
_END: Final = b"\r\n\r\n"
_PORTS: Final = {"http": 80, "https": 443}
_REQUEST: Final = re.compile(rb"([A-Z]{1,20}) ([\x21-\x7e]{1,16384}) HTTP/1\.([01])")
_HEADER: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}):[\t\x20-\x7e\x80-\xff]*")
_AUTHORITY: Final = re.compile(r"(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::([0-9]{1,5}))?")
_STATUS: Final = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: .*)?")
_DROPPED: Final = frozenset(
    (
        *(b"connection", b"expect", b"host", b"keep-alive", b"proxy-authorization", b"proxy-connection"),
        *(b"te", b"trailer", b"upgrade"),
    )
)
"""What is between two neighbours alone, and what is said anew."""
_BODY: Final = frozenset((b"content-length", b"transfer-encoding"))
_CONNECT: Final = "CONNECT"
_Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.contextmanager
def serving(listener: socket.socket, sources: Collection[Place]) -> Iterator[None]:
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
    sources: Collection[Place],
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


class _NotServedError(Exception):
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclasses.dataclass(frozen=True, slots=True)
class _Asked:
    """`path` and `headers` are of what is not a tunnel."""

    method: str
    host: str
    port: int
    path: str = ""
    version: str = "1.1"
    headers: tuple[bytes, ...] = ()

    @property
    def scheme(self) -> str:
        return "https" if self.method == _CONNECT else "http"

    @property
    def authority(self) -> str:
        """As it is written in a request."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.scheme == "http" and self.port == _PORTS["http"] else f"{host}:{self.port}"


class _WayOut:
    def __init__(self, sources: Collection[Place], proxies: Mapping[str, str]) -> None:
        self._sources = frozenset(sources)
        self._proxies = proxies

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_HEAD_S):
                head = await reader.readuntil(_END)
            await self._carry(_parse(head), reader, writer)
        except _NotServedError as error:
            with contextlib.suppress(OSError):
                writer.write(_reply(error))
                await writer.drain()
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            return

    async def _carry(
        self, asked: _Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            proxy = connections.proxy_for(asked.scheme, asked.host, asked.port, self._proxies)
        except errors.BangerError as error:
            raise _NotServedError(502, error.message) from None
        there, back = await (self._straight(asked) if proxy is None else self._through(proxy, asked))
        with contextlib.closing(back), carry.reset_on_failure(writer):
            if asked.method == _CONNECT:
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                with carry.reset_on_failure(back):
                    await carry.both(carry.pump(reader, back), carry.pump(there, writer))
            else:
                back.write(_head(asked, proxy))
                # One request a connection: the next would have to be judged as well.
                await carry.both(_discard(reader), carry.pump(there, writer))

    async def _straight(self, asked: _Asked) -> _Pair:
        last: Exception = _NotServedError(502, f"{asked.host} has no address")
        for address in await self._allowed(asked):
            try:
                return await _opened(str(address), asked.port)
            except _NotServedError as error:
                last = error
        raise last

    async def _allowed(self, asked: _Asked) -> list[outside.Address]:
        """Raises for a place that is inside, also one that is in part: whoever names it chooses."""
        try:
            async with asyncio.timeout(_CONNECT_S):
                found = await outside.resolve(asked.host, asked.port)
        except (OSError, TimeoutError):
            raise _NotServedError(502, f"{asked.host} cannot be resolved") from None
        if (asked.host, asked.port) not in self._sources and not all(map(outside.is_outside, found)):
            raise _NotServedError(403, f"a build does not reach {asked.host}")
        return found

    async def _through(self, proxy: str, asked: _Asked) -> _Pair:
        """What a name means is the proxy's to say. One that means a place inside here is refused here."""
        try:
            await self._allowed(asked)
        except _NotServedError as error:
            if error.status != 502:
                raise
        parts = urllib.parse.urlsplit(proxy)
        tls = parts.scheme == "https"
        there, back = await _opened(parts.hostname or "", parts.port or _PORTS[parts.scheme], tls=tls)
        if asked.method != _CONNECT:
            return there, back
        try:
            await _ask_for_tunnel(there, back, asked, proxy)
        except BaseException:
            back.close()
            raise
        return there, back


async def _opened(host: str, port: int, *, tls: bool = False) -> _Pair:
    try:
        async with asyncio.timeout(_CONNECT_S):
            return await asyncio.open_connection(
                host, port, limit=carry.CHUNK, ssl=connections.verified() if tls else None
            )
    except (OSError, TimeoutError):
        raise _NotServedError(502, "no connection") from None


async def _ask_for_tunnel(
    there: asyncio.StreamReader, back: asyncio.StreamWriter, asked: _Asked, proxy: str
) -> None:
    lines = [f"CONNECT {asked.authority} HTTP/1.1", f"Host: {asked.authority}", *_credentials(proxy)]
    back.write("\r\n".join([*lines, "", ""]).encode())
    try:
        async with asyncio.timeout(_CONNECT_S):
            said = await there.readuntil(_END)
    except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
        raise _NotServedError(502, "the proxy does not answer") from None
    status = _STATUS.fullmatch(said.partition(b"\r\n")[0])
    if status is None or not status[1].startswith(b"2"):
        raise _NotServedError(502, f"the proxy says {status[1].decode() if status else 'nonsense'}")


def _head(asked: _Asked, proxy: str | None) -> bytes:
    target = asked.path if proxy is None else f"http://{asked.authority}{asked.path}"
    lines = [
        f"{asked.method} {target} HTTP/{asked.version}",
        f"Host: {asked.authority}",
        "Connection: close",
    ]
    lines += [] if proxy is None else _credentials(proxy)
    return b"\r\n".join([*(line.encode() for line in lines), *asked.headers, b"", b""])


def _credentials(proxy: str) -> list[str]:
    parts = urllib.parse.urlsplit(proxy)
    if parts.username is None:
        return []
    pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    return [f"Proxy-Authorization: Basic {base64.b64encode(pair.encode()).decode()}"]


def _parse(head: bytes) -> _Asked:
    """Raises for what is not exactly a request of the two kinds: a proxy behind must read the same in it."""
    first, *headers = head.removesuffix(_END).split(b"\r\n")
    request = _REQUEST.fullmatch(first)
    if request is None:
        raise _NotServedError(400, "no request to a proxy")
    method, target, version = request[1].decode(), request[2].decode(), f"1.{request[3].decode()}"
    if method == _CONNECT:
        return _Asked(method, *_place(target, "https"))
    scheme, authority, path = _address(target)
    if scheme != "http" or method not in ("GET", "HEAD"):
        raise _NotServedError(405, f"{method} of {scheme or 'no'} addresses is not served, only GET of http")
    return _Asked(method, *_place(authority, scheme), path, version, tuple(_kept(headers)))


def _address(target: str) -> tuple[str, str, str]:
    scheme, separator, rest = target.partition("://")
    authority, query = re.match(r"([^/?#]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    path = query.partition("#")[0]
    return scheme.lower() if separator else "", authority, path if path.startswith("/") else f"/{path}"


def _place(authority: str, scheme: str) -> Place:
    """Without a user: apt and curl say that in a header."""
    found = _AUTHORITY.fullmatch(authority)
    port = int(found[2] or _PORTS[scheme]) if found is not None else 0
    if found is None or not 0 < port < 1 << 16:
        raise _NotServedError(400, "no address of a host")
    return found[1].strip("[]").lower(), port


def _kept(headers: list[bytes]) -> Iterator[bytes]:
    for header in headers:
        found = _HEADER.fullmatch(header)
        if found is None:
            raise _NotServedError(400, "no header")
        if found[1].lower() in _BODY:
            raise _NotServedError(400, "a request with a body is not served")
        if found[1].lower() not in _DROPPED:
            yield header


async def _discard(reader: asyncio.StreamReader) -> None:
    while await reader.read(carry.CHUNK):
        pass


def _reply(error: _NotServedError) -> bytes:
    text = f"{error}\n".encode(errors="replace")
    reason = {400: "Bad Request", 403: "Forbidden", 405: "Method Not Allowed"}.get(
        error.status, "Bad Gateway"
    )
    head = f"HTTP/1.1 {error.status} {reason}\r\nContent-Type: text/plain\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text
