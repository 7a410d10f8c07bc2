# SPDX-License-Identifier: MIT
"""A DNS server on one address, UDP and TCP, in the daemon's event loop. What it answers is a handler's.

UDP sockets are read by hand, many packets at a wake-up: twice as quick as asyncio's transports. TCP
connections are few, short, and as slow as the client only for a bounded time.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import inspect
import ipaddress
import logging
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Final

from banger.contract import errors
from banger.net import tcp_server, wire

_log = logging.getLogger(__name__)

Handler = Callable[[bytes, str, bool], bytes | Awaitable[bytes | None] | None]
"""From a packet, its sender's address, and whether it came by TCP, to the reply.

None says nothing. It never raises, and cuts what goes by UDP to what the asker takes.
"""

_BATCH: Final = 64
_BUFFER_BYTES: Final = 1 << 20
_MAX_TCP: Final = 1024
"""Like `_MAX_PENDING`, what 64 guests have that take all that one may."""
_MAX_TCP_OF_GUEST: Final = 16
_IDLE_S: Final = 10.0
_MAX_PENDING: Final = 4096
_IP_FREEBIND: Final = 15
_IP_PKTINFO: Final = 8
_TOLD_BYTES: Final = socket.CMSG_SPACE(12)


class Server:
    """Listens from `start` to `close`."""

    def __init__(self, address: ipaddress.IPv4Address, port: int, handler: Handler) -> None:
        self._address = address
        self._port = port
        self._handler = handler
        self._device = ""
        self._udp: socket.socket | None = None
        self._tcp = tcp_server.TcpServer(self._serve, most=_MAX_TCP)
        self._pending: set[asyncio.Task[None]] = set()
        self._connected: collections.Counter[str] = collections.Counter()

    @property
    def endpoint(self) -> str:
        return f"{self._address}:{self._port}"

    async def start(self, *, not_there_yet: bool = False, device: str = "") -> None:
        """Both sockets or none. Raises ConflictError when the port is taken.

        `not_there_yet`: the address may be added later. `device`: packets that came in elsewhere are
        dropped; it may be made later too, and made anew.
        """
        self._device = device
        tcp = _bound(socket.SOCK_STREAM, self._address, self._port, not_there_yet)
        try:
            self._port = tcp.getsockname()[1]  # a test's 0 becomes the same for both
            udp = _bound(socket.SOCK_DGRAM, self._address, self._port, not_there_yet)
        except BaseException:
            tcp.close()
            raise
        tcp.listen(_MAX_TCP)
        self._tcp.start(tcp)
        self._udp = udp
        asyncio.get_running_loop().add_reader(udp, self._read, udp)

    async def close(self) -> None:
        if self._udp is not None:
            asyncio.get_running_loop().remove_reader(self._udp)
            self._udp.close()
            self._udp = None
        await self._tcp.close()
        tasks = list(self._pending)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- UDP ---

    def _read(self, udp: socket.socket) -> None:
        """A batch, then others have their turn."""
        wanted = _link_number(self._device)
        for _ in range(_BATCH):
            try:
                data, told, _flags, peer = udp.recvmsg(wire.MAX_QUERY_BYTES + 1, _TOLD_BYTES)
            except BlockingIOError:
                return
            except OSError:  # what ICMP says of an earlier reply
                continue
            if self._device and _came_in_by(told) != wanted:
                continue
            reply = self._handler(data, peer[0], False)
            if inspect.isawaitable(reply):
                self._later(udp, reply, peer)
            elif reply is not None:
                _send(udp, reply, peer)

    def _later(self, udp: socket.socket, reply: Awaitable[bytes | None], peer: tuple[str, int]) -> None:
        if len(self._pending) >= _MAX_PENDING and inspect.iscoroutine(reply):
            reply.close()
            return
        task = asyncio.ensure_future(_answer_later(udp, reply, peer))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    # --- TCP ---

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = (writer.get_extra_info("peername") or ("",))[0]  # none where it is gone already
        self._connected[peer] += 1
        try:
            if self._device and self._connected[peer] > _MAX_TCP_OF_GUEST:  # on the loopback all are one
                return
            while True:
                async with asyncio.timeout(_IDLE_S):
                    if not await self._exchange(reader, writer, peer):
                        return
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            return
        finally:
            self._connected[peer] -= 1
            self._connected += collections.Counter()  # drops who has none
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str) -> bool:
        """One message; false for what is none, which ends the connection."""
        size = int.from_bytes(await reader.readexactly(2), "big")
        if not wire.HEADER_BYTES <= size <= wire.MAX_QUERY_BYTES:
            return False
        reply = self._handler(await reader.readexactly(size), peer, True)
        if inspect.isawaitable(reply):
            reply = await reply
        if reply is None:
            return False
        writer.write(len(reply).to_bytes(2, "big") + reply)
        await writer.drain()
        return True


def _link_number(name: str) -> int:
    """0, as which nothing comes in, when there is no such link."""
    try:
        return socket.if_nametoindex(name) if name else 0
    except OSError:
        return 0


def _came_in_by(told: list[tuple[int, int, bytes]]) -> int:
    """The number of the link, from the kernel's `struct in_pktinfo`."""
    for level, kind, data in told:
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            return int.from_bytes(data[:4], sys.byteorder)
    return -1


def _send(udp: socket.socket, reply: bytes, peer: tuple[str, int]) -> None:
    """What does not fit into the socket is lost, as on any network."""
    with contextlib.suppress(OSError):
        udp.sendto(reply, peer)


async def _answer_later(udp: socket.socket, reply: Awaitable[bytes | None], peer: tuple[str, int]) -> None:
    found = await reply
    if found is not None:
        _send(udp, found, peer)


def _bound(
    kind: socket.SocketKind, address: ipaddress.IPv4Address, port: int, not_there_yet: bool
) -> socket.socket:
    made = socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if kind is socket.SOCK_STREAM:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        else:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            made.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        if not_there_yet:
            made.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        made.bind((str(address), port))
    except OSError as error:
        made.close()
        raise errors.ConflictError(
            f"cannot answer DNS at {address}:{port}: {error.strerror}",
            hint=f"`ss -lnptu sport = :{port}` shows who listens there; `dns_listen` in "
            "/etc/banger/config.toml chooses another port, or none",
        ) from error
    return made
