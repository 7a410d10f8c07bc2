# SPDX-License-Identifier: MIT
"""The pulse of an agent: on one connection, without a process of its own, whatever else asks for it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from banger.contract import errors
from banger.owner import guest, pulse
from tests.contract import agent

KEPT = 4


@pytest.fixture(params=["shipped", "sanitized"])
def agent_socket(request: pytest.FixtureRequest) -> Iterator[Path]:
    with agent.running(request.param) as path:
        yield path


async def _no_other() -> object:
    raise AssertionError("there was no need to ask otherwise")


def _connector(path: Path) -> guest.Connector:
    return lambda: asyncio.open_unix_connection(str(path))


def _connected(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(30)
    made.connect(str(path))
    return made


def _answers(client: socket.socket) -> bool:
    try:
        client.sendall(b"?")
        return client.recv(1) == b"?"
    except (BrokenPipeError, ConnectionResetError):
        return False


async def test_it_beats_on_one_connection(agent_socket: Path) -> None:
    connections = 0

    async def connect() -> guest.Stream:
        nonlocal connections
        connections += 1
        return await asyncio.open_unix_connection(str(agent.pulse_path(agent_socket)))

    asked = pulse.Pulse(connect, _no_other)
    for _ in range(600):
        await asked.ask()
    asked.close()
    assert connections == 1


async def test_requests_are_served_beside_it(agent_socket: Path) -> None:
    client = guest.GuestClient(_connector(agent_socket))
    asked = pulse.Pulse(_connector(agent.pulse_path(agent_socket)), _no_other)
    await asked.ask()
    assert (await client.health()).uptime_ms > 0
    await asked.ask()
    asked.close()


def test_the_newest_are_kept(agent_socket: Path) -> None:
    path = agent.pulse_path(agent_socket)
    clients = []
    for _ in range(3 * KEPT):
        clients.append(_connected(path))
        assert _answers(clients[-1])
    assert [_answers(each) for each in clients] == [False] * (2 * KEPT) + [True] * KEPT
    for each in clients:
        each.close()


def test_who_takes_no_answers_is_hung_up_on(agent_socket: Path) -> None:
    with _connected(agent.pulse_path(agent_socket)) as flood:
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            flood.sendall(bytes(16 << 20))
        with _connected(agent.pulse_path(agent_socket)) as other:
            assert _answers(other)


def test_who_leaves_makes_room(agent_socket: Path) -> None:
    stays = _connected(agent.pulse_path(agent_socket))
    assert _answers(stays)
    for _ in range(3 * KEPT):
        with _connected(agent.pulse_path(agent_socket)) as other:
            assert _answers(other)
            other.shutdown(socket.SHUT_WR)
            assert other.recv(1) == b"", "the agent has seen that it left"
    assert _answers(stays)
    stays.close()


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def _asked_of(serve: Serve, path: Path, talk: Callable[[pulse.Pulse], Awaitable[None]]) -> None:
    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serve(reader, writer)
        writer.close()

    async with await asyncio.start_unix_server(accepted, path):
        asked = pulse.Pulse(_connector(path), _no_other)
        try:
            await talk(asked)
        finally:
            asked.close()


async def test_a_lie_is_told_and_then_asked_anew(short_path: Path) -> None:
    lies = iter([b"\xff", b"\xff"])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        byte = await reader.read(1)
        writer.write(next(lies, byte))
        await writer.drain()

    async def talk(asked: pulse.Pulse) -> None:
        for _ in range(2):
            with pytest.raises(errors.ProtocolError):
                await asked.ask()
        await asked.ask()

    await _asked_of(serve, short_path / "s", talk)


async def test_an_answer_that_comes_late_is_nobody_s(short_path: Path) -> None:
    late = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        byte = await reader.read(1)
        if not late.is_set():
            late.set()
            await reader.read(1)
        writer.write(byte)

    async def talk(asked: pulse.Pulse) -> None:
        waiting = asyncio.create_task(asked.ask())
        await late.wait()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await asked.ask()

    await _asked_of(serve, short_path / "s", talk)


async def test_who_hangs_up_is_said(short_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)

    async def talk(asked: pulse.Pulse) -> None:
        with pytest.raises(errors.UnavailableError, match="hung up"):
            await asked.ask()

    await _asked_of(serve, short_path / "s", talk)


async def test_an_agent_without_it_is_asked_otherwise() -> None:
    others = 0

    async def otherwise() -> object:
        nonlocal others
        others += 1
        return None

    async def refused() -> guest.Stream:
        raise errors.UnavailableError("nobody listens there")

    asked = pulse.Pulse(refused, otherwise)
    await asked.ask()
    await asked.ask()
    asked.close()
    assert others == 2
