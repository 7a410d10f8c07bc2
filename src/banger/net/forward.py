# SPDX-License-Identifier: MIT
"""HTTP as a proxy speaks it between strangers: exactly one request is read, and its answer passed on.

What is not exactly a request is refused: whoever reads it next must read the same in it. An answer is from
where the asking side chose, and can mislead nobody else.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Iterator
from typing import Final

from banger.net import carry

Place = tuple[str, int]
"""A host's name, without the brackets of an address, and a port."""

CONNECT: Final = "CONNECT"
END: Final = b"\r\n\r\n"
PORTS: Final = {"http": 80, "https": 443}
_REQUEST: Final = re.compile(rb"([A-Z]{1,20}) ([\x21-\x7e]{1,16384}) HTTP/1\.([01])")
_HEADER: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}):[\t ]*([\t\x20-\x7e\x80-\xff]*)")
_AUTHORITY: Final = re.compile(r"(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::([0-9]{1,5}))?")
_STATUS: Final = re.compile(rb"HTTP/1\.([01]) ([0-9]{3})(?: .*)?")
_CHUNK_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})[\t ]*(?:;.*)?\r\n")
_DROPPED: Final = frozenset(
    (
        *(b"connection", b"expect", b"host", b"keep-alive", b"proxy-authorization", b"proxy-connection"),
        *(b"te", b"trailer", b"upgrade"),
    )
)
"""What is between two neighbours alone, and what is said anew."""
_BODY: Final = frozenset((b"content-length", b"transfer-encoding"))
_PERSISTENCE: Final = frozenset((b"connection", b"proxy-connection"))
_EMPTY: Final = frozenset((b"204", b"304"))
_MAX_WHY: Final = 200


class NotServedError(Exception):
    """Why what was asked for is not passed on, and the status that says so."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """`path`, `headers` and `is_last` are of what is not a tunnel."""

    method: str
    host: str
    port: int
    path: str = ""
    headers: tuple[bytes, ...] = ()
    is_last: bool = False
    """No other is to follow on the connection."""

    @property
    def scheme(self) -> str:
        return "https" if self.method == CONNECT else "http"

    @property
    def authority(self) -> str:
        """As it is written in a request."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.scheme == "http" and self.port == PORTS["http"] else f"{host}:{self.port}"


def parse(head: bytes) -> Asked:
    """Of a tunnel, or a GET or HEAD without a body. Raises NotServedError."""
    first, *headers = head.removesuffix(END).split(b"\r\n")
    request = _REQUEST.fullmatch(first)
    if request is None:
        raise NotServedError(400, "no request to a proxy")
    method, target = request[1].decode(), request[2].decode()
    if method == CONNECT:
        return Asked(method, *_place(target, "https"))
    scheme, authority, path = _address(target)
    if scheme != "http" or method not in ("GET", "HEAD"):
        raise NotServedError(405, f"{method} of {scheme or 'no'} addresses is not served, only GET of http")
    told = list(_told(headers))
    if any(name in _BODY for name, _ in told):
        raise NotServedError(400, "a request with a body is not served")
    kept = tuple(b"%s: %s" % each for each in told if each[0] not in _DROPPED)
    return Asked(method, *_place(authority, scheme), path, kept, request[3] == b"0" or _is_closing(told))


def head(asked: Asked, *, by_proxy: bool, more: tuple[str, ...] = ()) -> bytes:
    """What is said to the host that was asked for, or to a proxy; `more` are headers."""
    target = f"http://{asked.authority}{asked.path}" if by_proxy else asked.path
    lines = [f"{asked.method} {target} HTTP/1.1", f"Host: {asked.authority}"]
    lines += [*(["Connection: close"] if asked.is_last else []), *more]
    return b"\r\n".join([*(line.encode() for line in lines), *asked.headers, b"", b""])


def refusal(error: NotServedError) -> bytes:
    """Why stands in the first line, which is what apt shows of it."""
    why = re.sub(r"[^ -~]", "?", str(error))[:_MAX_WHY]
    first = f"HTTP/1.1 {error.status} {why}\r\nContent-Type: text/plain\r\nConnection: close\r\n"
    return f"{first}Content-Length: {len(why) + 1}\r\n\r\n{why}\n".encode()


def status(answer: bytes) -> bytes:
    """Of an answer's head; empty when it is none."""
    found = _STATUS.fullmatch(answer.partition(b"\r\n")[0])
    return found[2] if found is not None else b""


async def answer(there: asyncio.StreamReader) -> bytes:
    """The head of one. Raises NotServedError for what is none, EOFError when none comes."""
    found = await there.readuntil(END)
    while status(found).startswith(b"1"):
        found = await there.readuntil(END)
    if not status(found):
        raise NotServedError(502, "the answer is none")
    return found


async def relay(
    asked: Asked, answer: bytes, there: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bool:
    """Passes it on, head and body; whether the same connection may be asked again.

    Raises EOFError when the connection ends before the answer does.
    """
    lines = (line.partition(b":") for line in answer.split(b"\r\n")[1:])
    told = [(name.strip().lower(), value) for name, _, value in lines]
    writer.write(answer)
    again = not (asked.is_last or answer.startswith(b"HTTP/1.0") or _is_closing(told))
    sizes = {value.strip() for name, value in told if name == b"content-length"}
    if asked.method == "HEAD" or status(answer) in _EMPTY:
        pass
    elif any(name == b"transfer-encoding" for name, _ in told):
        await _chunks(there, writer)
    elif len(sizes) == 1 and (size := sizes.pop()).isdigit() and len(size) < 19:
        await _exactly(int(size), there, writer)
    else:
        await carry.pump(there, writer)
        again = False
    await writer.drain()
    return again


async def _exactly(size: int, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while size:
        data = await there.read(min(size, carry.CHUNK))
        if not data:
            raise EOFError
        size -= len(data)
        writer.write(data)
        await writer.drain()


async def _chunks(there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        line = await there.readuntil(b"\r\n")
        found = _CHUNK_SIZE.fullmatch(line)
        if found is None:
            raise EOFError
        writer.write(line)
        if size := int(found[1], 16):
            await _exactly(size + 2, there, writer)
            continue
        while line != b"\r\n":
            line = await there.readuntil(b"\r\n")
            writer.write(line)
            await writer.drain()
        return


def _told(headers: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Names in lower case. Raises for what is no header, such as one that goes on from the line before."""
    for each in headers:
        found = _HEADER.fullmatch(each)
        if found is None:
            raise NotServedError(400, "no header")
        yield found[1].lower(), found[2]


def _is_closing(told: list[tuple[bytes, bytes]]) -> bool:
    return any(name in _PERSISTENCE and b"close" in value.lower() for name, value in told)


def _address(target: str) -> tuple[str, str, str]:
    scheme, separator, rest = target.partition("://")
    authority, query = re.match(r"([^/?#]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    path = query.partition("#")[0]
    return scheme.lower() if separator else "", authority, path if path.startswith("/") else f"/{path}"


def _place(authority: str, scheme: str) -> Place:
    """Without a user: apt and curl say that in a header."""
    found = _AUTHORITY.fullmatch(authority)
    port = int(found[2] or PORTS[scheme]) if found is not None else 0
    if found is None or not 0 < port < 1 << 16:
        raise NotServedError(400, "no address of a host")
    return found[1].strip("[]").lower(), port
