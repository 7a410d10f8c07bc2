# SPDX-License-Identifier: MIT
"""The daemon's API as clients meet it: the real server on a real unix socket, over a fake world."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
import msgspec
from websockets.asyncio import client as websockets

from banger.contract import errors, resources
from banger.owner import app, server
from tests.contract import conftest

T = TypeVar("T")


@dataclass(slots=True)
class Served:
    """A daemon that answers at `path`."""

    daemon: conftest.Daemon
    path: Path
    http: httpx.AsyncClient
    stop: asyncio.Event

    async def get(self, path: str, kind: type[T]) -> T:
        return _decoded(await self.http.get(path), kind)

    async def begin(self, method: str, path: str, body: object = None) -> resources.Operation:
        answer = await self.http.request(method, path, json=body)
        assert answer.status_code == 202, answer.text
        return _decoded(answer, resources.Operation)

    async def done(self, method: str, path: str, body: object = None) -> resources.Operation:
        """The operation that this request began, once it has ended."""
        return (await self.watch((await self.begin(method, path, body)).id))[-1].result or pytest_fail()

    async def watch(self, operation_id: str) -> list[resources.Event]:
        async with self.http.stream("GET", f"/v1/operations/{operation_id}/events") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            return [event async for event in events(answer)]

    async def error(self, method: str, path: str, status: int, body: object = None) -> errors.ErrorBody:
        """What this request is refused with."""
        answer = await self.http.request(method, path, json=body)
        assert answer.status_code == status, answer.text
        return _decoded(answer, errors.ErrorBody)

    def command(self, ref: str) -> websockets.connect:
        return websockets.unix_connect(
            str(self.path), f"ws://banger/v1/vms/{ref}/exec", compression=None, ping_interval=None
        )

    def connection(self, ref: str) -> websockets.connect:
        return websockets.unix_connect(
            str(self.path), f"ws://banger/v1/vms/{ref}/connect", compression=None, ping_interval=None
        )


def pytest_fail() -> resources.Operation:
    raise AssertionError("the last event has no result")


def _decoded(answer: httpx.Response, kind: type[T]) -> T:
    assert answer.headers["content-type"].startswith("application/json"), answer.text
    return msgspec.json.decode(answer.content, type=kind)


async def events(answer: httpx.Response) -> AsyncIterator[resources.Event]:
    async for line in answer.aiter_lines():
        if line:
            yield msgspec.json.decode(line.removeprefix("data: "), type=resources.Event)


@contextlib.asynccontextmanager
async def serving(daemon: conftest.Daemon) -> AsyncIterator[Served]:
    stop = asyncio.Event()
    path = daemon.paths.socket
    with server.listening(path) as listener:
        task = asyncio.create_task(
            server.serve(
                app.create_app(daemon.services),
                listener,
                stop=stop,
                before_shutdown=daemon.services.operations.close,
            )
        )
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://banger", timeout=50) as http:
                yield Served(daemon, path, http, stop)
        finally:
            stop.set()
            async with asyncio.timeout(50):
                await task


@contextlib.asynccontextmanager
async def with_web(daemon: conftest.Daemon) -> AsyncIterator[Served]:
    """Serving, with one running VM, `web`, whose port 22 echoes."""
    await daemon.create()
    async with serving(daemon) as made:
        yield made


async def last_word(link: websockets.ClientConnection, kind: type[T]) -> T:
    """What the daemon says in the end; what comes before is not looked at."""
    async for message in link:
        if isinstance(message, str):
            return msgspec.json.decode(message, type=kind)
    raise AssertionError("the daemon said no last word")
