# SPDX-License-Identifier: MIT
"""Published ports of a guest with a network, which may be hostile: this host plays it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest

from banger.contract import errors, names
from banger.net import carry
from banger.owner import guest as guests
from banger.owner import publish
from tests.contract import conftest, publishing

MIB = 1 << 20


async def _no_agent() -> guests.Stream:
    raise errors.UnavailableError("nobody asks an agent here")


async def test_a_guest_that_takes_nothing_holds_no_connection_beyond_its_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both have said their last, and what the guest does not take is still to be sent."""
    monkeypatch.setattr(names, "guest_address", lambda *_: "127.0.0.1")
    real, both, said_all = asyncio.open_connection, carry.both, asyncio.Event()
    told, ended = asyncio.Event(), asyncio.Event()

    async def with_much_room(*args: object, **kwargs: object) -> object:
        reader, writer = await real(*args, **kwargs)  # type: ignore[arg-type] # as they came
        writer.transport.set_write_buffer_limits(64 * MIB)
        return reader, writer

    async def both_told(one: Awaitable[None], other: Awaitable[None]) -> None:
        await both(one, other)
        told.set()

    monkeypatch.setattr(asyncio, "open_connection", with_much_room)
    monkeypatch.setattr(carry, "both", both_told)
    taken: list[bytes | ConnectionError] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write_eof()
        await ended.wait()
        try:
            taken.append(await reader.read())
        except ConnectionError as error:
            taken.append(error)
        said_all.set()
        writer.close()

    port = publishing.free_port()
    publisher = publish.Publisher(conftest.NETWORK, lambda _: guests.GuestClient(_no_agent))
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server, asyncio.timeout(30):
        service = server.sockets[0].getsockname()[1]
        await publisher.serve(publishing.row(f"{port}:{service}", network=True))
        reader, writer = await real("127.0.0.1", port)
        writer.write(bytes(32 * MIB))
        writer.write_eof()
        assert await reader.read() == b""
        await told.wait()
        await publisher.close()
        ended.set()
        await said_all.wait()
        writer.close()
    assert isinstance(taken[0], ConnectionResetError)
