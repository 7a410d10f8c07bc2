# SPDX-License-Identifier: MIT
"""Two pulls that want the same layer from registries of which one does not come to an end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from banger.images import blobs, bundle, reference
from tests.contract.image_client import BASE, TOP, Client
from tests.fakes import registry as registries

PATIENCE_S = 0.1
HALF = 2_000_000
PATH = f"/blobs/{reference.digest_of(BASE)}"


class Pulls:
    """One cache, and two registries that have the same image; the first gives as much as it is told."""

    def __init__(self, root: Path, first: registries.Registry, second: registries.Registry) -> None:
        self.first, self.second = Client(root, first), Client(root, second)
        self.asked, self.go = asyncio.Event(), threading.Event()
        self._loop = asyncio.get_running_loop()
        self.have_patience(PATIENCE_S)
        for client in (self.first, self.second):
            client.registry.add_image("v1", BASE, TOP)

    def have_patience(self, patience_s: float) -> None:
        self.first.store = self.second.store = blobs.Blobs(
            self.first.root / "blobs", blobs.Tries(attempts=3, first_wait_s=0.01, patience_s=patience_s)
        )

    def fault(self, gives: Callable[[registries._Handler, bytes, threading.Event], None]) -> None:
        """Of the first registry, for the first who asks it for the layer."""

        def then(handler: registries._Handler) -> None:
            self._loop.call_soon_threadsafe(self.asked.set)
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(BASE)))
            handler.end_headers()
            with contextlib.suppress(OSError):
                gives(handler, BASE, self.go)
            handler.hang_up()

        self.first.registry.faults.append(registries.on(PATH, then=then))

    async def begun(self) -> asyncio.Task[bundle.Bundle]:
        """The first, which has asked for the layer."""
        task = asyncio.create_task(self.first.pull())
        await self.asked.wait()
        return task


@pytest.fixture
async def pulls(tmp_path: Path) -> AsyncIterator[Pulls]:
    with registries.serving() as first, registries.serving() as second:
        made = Pulls(tmp_path, first, second)
        yield made
        made.go.set()


def _stops(handler: registries._Handler, data: bytes, go: threading.Event) -> None:
    handler.wfile.write(data[:HALF])
    go.wait(20)


def _trickles(handler: registries._Handler, data: bytes, go: threading.Event) -> None:
    for at in range(len(data)):
        handler.wfile.write(data[at : at + 1])
        if go.wait(0.005):
            return


def _lies(handler: registries._Handler, data: bytes, go: threading.Event) -> None:
    handler.wfile.write(bytes(HALF))
    go.wait(20)


async def _a_batch_is_there(pulls: Pulls) -> None:
    partial = pulls.first.root / "blobs" / "partial" / reference.digest_of(BASE).replace(":", "-")
    async with asyncio.timeout(20):
        while not (partial.exists() and partial.stat().st_size >= 1 << 20):  # noqa: ASYNC110  # a file
            await asyncio.sleep(0.01)


async def test_who_waits_goes_on_where_a_silent_registry_stopped(pulls: Pulls) -> None:
    pulls.fault(_stops)
    begun = await pulls.begun()
    await _a_batch_is_there(pulls)
    made = await pulls.second.pull()
    assert made.layers[0].path.read_bytes() == BASE
    sent = pulls.second.registry.sent[reference.digest_of(BASE)]
    assert len(BASE) - HALF <= sent <= len(BASE) - (1 << 20)
    assert (await begun).layers[0].path.read_bytes() == BASE  # as its registry is silent still


async def test_who_waits_does_not_wait_for_a_trickle(pulls: Pulls) -> None:
    pulls.fault(_trickles)
    begun = await pulls.begun()
    assert (await pulls.second.pull()).layers[0].path.read_bytes() == BASE
    assert (await begun).layers[0].path.read_bytes() == BASE


async def test_what_a_registry_that_lies_gave_is_nobody_else_s_fault(pulls: Pulls) -> None:
    pulls.fault(_lies)
    begun = await pulls.begun()
    assert (await pulls.second.pull()).layers[0].path.read_bytes() == BASE
    await begun


async def test_where_both_are_slow_neither_keeps_the_other_from_its_end(pulls: Pulls) -> None:
    """They begin anew with each turn, so that turns that do not grow would have no end."""
    steps = 40

    def slow(handler: registries._Handler) -> bool:
        if PATH not in handler.path:
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(BASE)))
        handler.end_headers()
        with contextlib.suppress(OSError):
            for step in range(steps):
                handler.wfile.write(BASE[len(BASE) * step // steps : len(BASE) * (step + 1) // steps])
                pulls.go.wait(PATIENCE_S / 4)
        return True

    for client in (pulls.first, pulls.second):
        client.registry.faults.append(slow)
    for made in await asyncio.gather(pulls.first.pull(), pulls.second.pull()):
        assert made.layers[0].path.read_bytes() == BASE


async def test_a_registry_that_nobody_waits_for_has_its_time(pulls: Pulls) -> None:
    pulls.fault(_stops)
    begun = await pulls.begun()
    async with pulls.second.opened() as other:
        for _ in range(20):
            await other.digest()
    pulls.go.set()
    await begun
    assert pulls.first.registry.count("GET", PATH) == 2  # again after it hung up, and not before


async def test_who_waits_goes_on_when_the_first_is_cancelled(pulls: Pulls) -> None:
    pulls.have_patience(3600)
    pulls.fault(_stops)
    pulls.second.registry.add_image("v2", BASE, b"\x1f\x8b other")
    begun = await pulls.begun()
    waiting = asyncio.create_task(pulls.second.pull("team/app:v2"))
    async with pulls.second.opened() as other:
        while pulls.second.registry.count("GET", reference.digest_of(b"\x1f\x8b other")) == 0:
            await other.digest()
    begun.cancel()
    assert (await waiting).layers[0].path.read_bytes() == BASE
    assert begun.cancelled()


async def test_who_waits_sees_how_far_the_other_one_is(pulls: Pulls) -> None:
    pulls.have_patience(3600)
    pulls.fault(_stops)
    pulls.second.registry.add_image("v2", BASE)
    begun = await pulls.begun()
    await _a_batch_is_there(pulls)
    waiting = asyncio.create_task(pulls.second.pull("team/app:v2"))
    async with asyncio.timeout(20):
        while not pulls.second.watch.told:  # noqa: ASYNC110  # told by whoever pulls
            await asyncio.sleep(0.01)
    current, size, _ = pulls.second.watch.told[0]
    assert 0 < current < size == len(BASE)
    pulls.go.set()
    await asyncio.gather(begun, waiting)
    assert pulls.second.watch.told[-1] == (len(BASE), len(BASE), "layers")
