# SPDX-License-Identifier: MIT
"""Layers that break off, lie about themselves or are given up on their way, and what the next pull finds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from banger import run
from banger.contract import errors
from banger.images import blobs, connections, credentials, reference, registry
from tests.contract.image_client import BASE, LIMITS, TOP, Client
from tests.fakes import registry as registries


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with registries.serving() as made:
        made.add_image("v1", BASE, TOP)
        yield Client(tmp_path, made)


def _digest(data: bytes) -> reference.Digest:
    return reference.digest_of(data)


async def test_a_break_is_taken_up_where_it_was(client: Client) -> None:
    path = f"/blobs/{_digest(BASE)}"
    client.registry.faults += [registries.on(path, times=4, then=registries.breaks_after(1_200_000))]
    made = await client.pull()
    assert made.layers[0].path.read_bytes() == BASE
    assert client.registry.sent[_digest(BASE)] == len(BASE)
    ranges = [each.headers.get("range") for each in client.registry.asked if path in each.path]
    assert ranges == [None, *(f"bytes={count * 1_200_000}-" for count in range(1, 5))]


async def test_the_next_pull_takes_up_what_the_last_one_left(client: Client) -> None:
    path = f"/blobs/{_digest(BASE)}"
    client.registry.faults += [
        registries.on(path, then=registries.breaks_after(3_000_000)),
        registries.on(path, times=3, then=registries.breaks_after(0)),
    ]
    with pytest.raises(errors.UnavailableError):
        await client.pull()
    assert client.left() == [_digest(BASE).replace(":", "-")]
    assert not client.store.has(_digest(BASE), len(BASE))
    client.registry.faults.clear()
    await client.pull()
    assert client.registry.sent[_digest(BASE)] == len(BASE)


async def test_a_partial_that_lies_is_thrown_away(client: Client) -> None:
    partial = client.root / "blobs" / "partial" / _digest(BASE).replace(":", "-")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"not what it says" * 1000)
    made = await client.pull()
    assert made.layers[0].path.read_bytes() == BASE


async def test_a_registry_without_ranges_sends_all_again(client: Client) -> None:
    client.registry.ranges = False
    client.registry.faults += [
        registries.on(f"/blobs/{_digest(BASE)}", then=registries.breaks_after(2_000_000))
    ]
    assert (await client.pull()).layers[0].path.read_bytes() == BASE


async def test_a_range_whose_begin_is_no_number_of_bytes_is_refused(client: Client) -> None:
    def lies(handler: Any) -> None:
        handler.answer(206, b"", **{"Content-Range": f"bytes {'9' * 5000}-9/9"})

    client.registry.faults += [
        registries.on(f"/blobs/{_digest(BASE)}", then=registries.breaks_after(2_000_000)),
        registries.on(f"/blobs/{_digest(BASE)}", then=lies),
    ]
    with pytest.raises(errors.ProtocolError, match="another range than was asked for"):
        await client.pull()


async def test_a_registry_that_refuses_ranges_is_asked_for_all_again(client: Client) -> None:
    """As some proxies do before one: a break would else end this pull and each one after it."""
    path = f"/blobs/{_digest(BASE)}"

    def refuses(handler: registries._Handler) -> bool:
        if path not in handler.path or "Range" not in handler.headers:
            return False
        handler.answer(416, b"")
        return True

    client.registry.faults += [refuses, registries.on(path, then=registries.breaks_after(2_000_000))]
    assert (await client.pull()).layers[0].path.read_bytes() == BASE
    ranges = [each.headers.get("range") for each in client.registry.asked if path in each.path]
    assert ranges == [None, "bytes=2000000-", None]


async def test_a_wrong_byte_is_refused_and_not_kept(client: Client) -> None:
    wrong = BASE[:-1] + b"!"
    client.registry.faults += [registries.on(f"/blobs/{_digest(BASE)}", then=registries.gives(wrong))]
    with pytest.raises(errors.ProtocolError, match="not what its digest"):
        await client.pull()
    assert client.left() == []
    assert not client.store.path(_digest(BASE)).exists()
    assert (await client.pull()).layers[0].path.read_bytes() == BASE


async def test_a_body_that_goes_on_is_cut_off(client: Client) -> None:
    client.registry.faults += [
        registries.on(f"/blobs/{_digest(TOP)}", then=registries.gives(TOP + bytes(8 << 20)))
    ]
    with pytest.raises(errors.ProtocolError, match=f"longer than the {len(TOP)} bytes"):
        await client.pull()
    assert not client.store.path(_digest(TOP)).exists()
    assert _digest(TOP).replace(":", "-") not in client.left()


async def test_a_body_that_is_always_short_ends_with_what_is_missing(client: Client) -> None:
    client.registry.faults += [
        registries.on(f"/blobs/{_digest(TOP)}", times=99, then=registries.gives(TOP[:100]))
    ]
    client.registry.ranges = False
    with pytest.raises(errors.UnavailableError, match="ended early"):
        await client.pull()


@pytest.mark.parametrize(
    ("headers", "asked"),
    [({"Retry_After": "3600"}, 1), ({}, LIMITS.attempts)],
    ids=["with a time", "without"],
)
async def test_a_registry_that_refuses_a_layer_is_asked_no_more_often(
    client: Client, headers: dict[str, str], asked: int
) -> None:
    """What has been tried often enough, or not before a time that it named."""
    path = f"/blobs/{_digest(BASE)}"
    client.registry.faults += [registries.on(path, times=99, then=registries.status(429, **headers))]
    with pytest.raises(errors.UnavailableError, match="too often"):
        await client.pull()
    assert client.registry.count("GET", path) == asked


async def test_what_comes_is_told_before_it_is_written(client: Client) -> None:
    """On a slow line a batch takes a minute."""
    said, told = asyncio.Event(), list[int]()
    go = threading.Event()

    def slowly(handler: registries._Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(TOP)))
        handler.end_headers()
        handler.wfile.write(TOP[:1000])
        go.wait(20)
        handler.wfile.write(TOP[1000:])

    def hear(current: int) -> None:
        told.append(current)
        said.set()

    client.registry.faults += [registries.on(f"/blobs/{_digest(TOP)}", then=slowly)]
    wanted = reference.parse(f"{client.registry.host}/team/app:v1")
    async with connections.Connections(limits=LIMITS) as wire:
        asked = registry.Registry(wanted, wire, credentials.Store(()), say=client.watch.note)
        fetching = asyncio.create_task(
            client.store.fetch(_digest(TOP), len(TOP), lambda at: asked.blob(_digest(TOP), at), hear)
        )
        async with asyncio.timeout(20):
            await said.wait()
        assert told == [1000]
        go.set()
        await fetching
    assert told == sorted(told)
    assert told[-1] == len(TOP)


def _open_partials() -> list[str]:
    opened = list[str]()
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            opened.append(os.readlink(each))
    return [path for path in opened if "/partial/" in path]


async def test_cancelling_while_a_partial_is_opened_leaves_no_descriptor(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, go, loop = asyncio.Event(), threading.Event(), asyncio.get_running_loop()
    take_up = blobs._Partial._take_up

    def slowly(partial: blobs._Partial) -> None:
        take_up(partial)  # and so it no longer looks whether it is cancelled
        loop.call_soon_threadsafe(opening.set)
        go.wait(20)

    monkeypatch.setattr(blobs._Partial, "_take_up", slowly)
    pulling = asyncio.create_task(client.pull())
    await opening.wait()
    pulling.cancel()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await pulling
    assert _open_partials() == []


def _stops_in_the_middle(handler: registries._Handler) -> None:
    """Of a document, which is small, half comes."""
    name = handler.path.rpartition("/")[2]
    registry = handler.registry
    data = registry.blobs.get(name) or registry.manifests[name][1]
    handler.send_response(200)
    handler.send_header("Content-Type", registries.MANIFEST)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.hang_up()


async def test_documents_that_break_off_are_asked_for_again(client: Client) -> None:
    config = next(name for name, data in client.registry.blobs.items() if b"diff_ids" in data)
    client.registry.faults += [
        registries.on("/manifests/sha256", times=2, then=_stops_in_the_middle),
        registries.on(f"/blobs/{config}", times=2, then=_stops_in_the_middle),
    ]
    assert (await client.pull()).layers[0].path.read_bytes() == BASE


@pytest.mark.parametrize("part", ["/manifests/sha256", "/blobs/"])
async def test_documents_that_always_break_off_are_given_up(client: Client, part: str) -> None:
    client.registry.faults += [registries.on(part, times=99, then=_stops_in_the_middle)]
    with pytest.raises(errors.UnavailableError, match="cannot be reached"):
        await client.pull()
    assert client.registry.count("GET", part) == LIMITS.attempts


async def test_a_manifest_that_is_not_what_was_asked_for_is_refused(client: Client) -> None:
    digest = client.registry.add_image("v1", TOP)
    client.registry.faults += [registries.on(f"/manifests/{digest}", then=registries.gives(b"{}"))]
    with pytest.raises(errors.ProtocolError, match="another manifest"):
        await client.pull()


async def test_cancelling_leaves_what_came_for_the_next(client: Client) -> None:
    said = threading.Event()

    def stall(handler: registries._Handler) -> None:
        registries.breaks_after(3_000_000)(handler)
        handler.close_connection = False  # and says nothing more
        said.wait(20)

    client.registry.faults += [registries.on(f"/blobs/{_digest(BASE)}", then=stall)]
    partial = client.root / "blobs" / "partial" / _digest(BASE).replace(":", "-")
    pulling = asyncio.create_task(client.pull())
    async with asyncio.timeout(20):
        while not (partial.exists() and partial.stat().st_size >= 1 << 20):  # noqa: ASYNC110  # a file
            await asyncio.sleep(0.01)
    pulling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pulling
    said.set()
    kept = partial.stat().st_size
    await client.pull()
    assert client.registry.sent[_digest(BASE)] == 3_000_000 + len(BASE) - kept


async def test_cancelling_while_a_batch_is_written_keeps_it_once(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.registry.add_image("v1", BASE)
    take = blobs._Partial.take
    writing = threading.Event()

    def slowly(partial: blobs._Partial, pieces: Iterable[bytes]) -> None:
        writing.set()
        with contextlib.suppress(errors.CancelledError):
            for _ in range(2000):
                run.check_cancelled()
                time.sleep(0.01)
        take(partial, pieces)

    monkeypatch.setattr(blobs._Partial, "take", slowly)
    pulling = asyncio.create_task(client.pull())
    assert await asyncio.to_thread(writing.wait, 20)
    pulling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pulling
    (left,) = (client.root / "blobs" / "partial").iterdir()
    assert BASE.startswith(left.read_bytes())
    assert left.stat().st_size >= 1 << 20
