# SPDX-License-Identifier: MIT
"""Images cancelled at any stage, or their daemon killed: whole or not there, and made the next time.

What a full disk does is in the root tier's `test_image_disk_full`, what a registry can do in
`test_image_registry`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from banger import artefacts, run
from banger.contract import resources
from banger.images import ext4, publish, records
from banger.owner import config
from tests import oci_make
from tests.contract import api_served, conftest
from tests.contract import programs as programs_
from tests.fakes import registry as registries
from tests.unit import tars

Served = api_served.Served
Status = resources.OperationStatus
MIB: Final = 1 << 20
ZEROS: Final = 512
"""MiB of them, which are little to fetch and some work to unpack: there is time to interfere."""
BASE: Final = oci_make.tar({"srv/data": os.urandom(2 * MIB)})
PULLED: Final = ("asking for", "pulling", "unpacking layer 1", "unpacking layer 2", "making the file system")
IMPORTED: Final = ("reading", "2 layers", *PULLED[2:])


def _zeros() -> tuple[bytes, str]:
    """A compressed layer with a file of nothing, and its diff id. gzip members may follow each other."""
    head = tars.header(b"zeros", size=ZEROS * MIB)
    inner = hashlib.sha256(head)
    for _ in range(ZEROS):
        inner.update(bytes(MIB))
    inner.update(tars.END)
    parts = [gzip.compress(head), *[gzip.compress(bytes(MIB))] * ZEROS, gzip.compress(tars.END)]
    return b"".join(parts), f"sha256:{inner.hexdigest()}"


LAYER, DIFF_ID = _zeros()


@pytest.fixture
def registry() -> Iterator[registries.Registry]:
    """It has `team/app:v1`."""
    with registries.serving() as made:
        made.add_image("v1", oci_make.compressed(BASE), LAYER)
        document = json.loads(made.manifests["v1"][1])
        config = json.loads(made.blobs[document["config"]["digest"]])
        config["rootfs"]["diff_ids"] = [oci_make.digest(BASE), DIFF_ID]
        data = json.dumps(config).encode()
        document["config"] |= {"digest": made.add_blob(data), "size": len(data)}
        made.add_manifest("v1", document)
        yield made


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """The same as a layout."""
    root = tmp_path / "layout"
    stored = [
        oci_make.add(root, each, f"{oci_make.LAYER}+gzip") for each in (oci_make.compressed(BASE), LAYER)
    ]
    oci_make.described(root, "v1", stored, [oci_make.digest(BASE), DIFF_ID])
    return root


@pytest.fixture
async def served(daemon: conftest.Daemon) -> AsyncIterator[Served]:
    async with api_served.serving(daemon) as made:
        yield made


def _begins(event: resources.Event, word: str) -> bool:
    return event.kind in ("stage", "note") and event.detail.startswith(word)


def _left(paths: config.Paths) -> list[str]:
    """What only work that is going on may have there."""
    found = [path for path in (paths.state / "images").iterdir() if path.name.startswith(".")]
    for parent in (paths.cache / "imports", paths.cache / "recipes"):
        found += parent.iterdir() if parent.is_dir() else ()
    return [str(path) for path in found]


def _assert_whole(paths: config.Paths, images: list[resources.Image]) -> None:
    kept = records.Images(paths.state / "images")
    for image in images:
        if image.id != conftest.IMAGE_ID:
            ext4.check(kept.rootfs(image.id))
            assert kept.rootfs(image.id).stat().st_size == image.size_bytes
            assert kept.work_seed(image.id).exists()


# --- cancelled ---


async def _cancel_at(served: Served, path: str, body: dict[str, Any], word: str) -> resources.Operation:
    operation = await served.begin("POST", path, body)
    async with served.http.stream("GET", f"/v1/operations/{operation.id}/events") as answer:
        async for event in api_served.events(answer):
            if _begins(event, word):
                break
    cancelled = await served.http.delete(f"/v1/operations/{operation.id}")
    return msgspec.json.decode(cancelled.content, type=resources.Operation)


async def _assert_cancelled_everywhere(
    served: Served, path: str, body: dict[str, Any], stages: tuple[str, ...]
) -> None:
    for stage in stages:
        ended = await _cancel_at(served, path, body, stage)
        images = await served.get("/v1/images", list[resources.Image])
        assert _left(served.daemon.paths) == [], stage
        assert len(images) == (2 if ended.status is Status.SUCCEEDED else 1), stage
        # The last stage may be over before the request to cancel is there.
        assert ended.status is Status.CANCELLED or stage == stages[-1], stage
        for image in images[1:]:
            await served.http.delete(f"/v1/images/{image.id}")
    made = await served.done("POST", path, body)
    assert made.image is not None, made.error
    _assert_whole(served.daemon.paths, [made.image])


async def test_a_pull_cancelled_at_any_stage(served: Served, registry: registries.Registry) -> None:
    body = {"reference": f"{registry.host}/team/app:v1"}
    await _assert_cancelled_everywhere(served, "/v1/images/pull", body, PULLED)


async def test_an_import_cancelled_at_any_stage(served: Served, layout: Path) -> None:
    body = {"path": str(layout), "name": "laid"}
    await _assert_cancelled_everywhere(served, "/v1/images/import", body, IMPORTED)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
async def test_cancelled_as_it_is_published(
    served: Served, layout: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """While the disk takes its time to be sure of everything; or, at last, of the name."""
    root = served.daemon.paths.state / "images"
    syncing = _slow_down(monkeypatch, artefacts, "sync", lambda path: path == root or not late)
    operation = await served.begin("POST", "/v1/images/import", {"path": str(layout), "name": "laid"})
    await asyncio.wait_for(syncing.wait(), 20)
    ended = (await served.http.delete(f"/v1/operations/{operation.id}")).json()
    assert ended["status"] == "cancelled"
    assert _left(served.daemon.paths) == []
    assert len((await served.http.get("/v1/images")).json()) == 1


@pytest.mark.parametrize("way", ["register", "promote"])
async def test_a_copy_cancelled_in_the_middle(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str
) -> None:
    """Of an image that is here, or of a directory."""
    oci_make.layout(tmp_path / "small", "v1", [BASE], {})
    made = await served.done("POST", "/v1/images/import", {"path": str(tmp_path / "small"), "name": "laid"})
    assert made.image is not None, made.error
    path, body = "/v1/images/laid/promote", {"name": "other"}
    if way == "register":
        shutil.move(served.daemon.paths.state / "images" / made.image.id, tmp_path / "elsewhere")
        path, body = "/v1/images/register", {"path": str(tmp_path / "elsewhere")}
    before = await served.get("/v1/images", list[resources.Image])
    copying = _slow_down(monkeypatch, publish, "_copy_some")
    operation = await served.begin("POST", path, body)
    await asyncio.wait_for(copying.wait(), 20)
    ended = (await served.http.delete(f"/v1/operations/{operation.id}")).json()
    assert ended["status"] == "cancelled"
    assert _left(served.daemon.paths) == []
    assert await served.get("/v1/images", list[resources.Image]) == before


async def test_a_copy_whose_image_is_deleted_meanwhile_says_so(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It spoke of a path of ours that is not there, and of who looks for it."""
    oci_make.layout(tmp_path / "small", "v1", [BASE], {})
    made = await served.done("POST", "/v1/images/import", {"path": str(tmp_path / "small"), "name": "laid"})
    assert made.image is not None, made.error
    copy, images = publish.copy_sparse, served.daemon.services.images

    def deleted_after_the_first(source: Path, target: Path) -> None:
        copy(source, target)
        images.delete("laid")

    monkeypatch.setattr(publish, "copy_sparse", deleted_after_the_first)
    ended = await served.done("POST", "/v1/images/laid/promote", {"name": "other"})
    assert ended.error is not None
    assert ended.error.message == "image laid was deleted while it was copied"
    assert ended.error.hint == "`banger image list` shows what there is"
    assert _left(served.daemon.paths) == []


def _slow_down(
    monkeypatch: pytest.MonkeyPatch,
    module: object,
    name: str,
    is_meant: Callable[[Any], bool] = lambda _: True,
) -> asyncio.Event:
    """Work that goes on until it is cancelled, which no real disk can be told; set when it has begun."""
    begun, loop, really = asyncio.Event(), asyncio.get_running_loop(), getattr(module, name)

    def slowly(*arguments: Any) -> Any:
        if not is_meant(arguments[0]):
            return really(*arguments)
        loop.call_soon_threadsafe(begun.set)
        deadline = time.monotonic() + 10
        with contextlib.suppress(Exception):
            while time.monotonic() < deadline:
                run.check_cancelled()
                time.sleep(0.01)
        return really(*arguments)

    monkeypatch.setattr(module, name, slowly)
    return begun


# --- killed ---


@pytest.fixture
async def programs(paths: config.Paths) -> AsyncIterator[programs_.Programs]:
    async with programs_.running(paths) as made:
        yield made


async def _kill_at(programs: programs_.Programs, path: str, body: dict[str, Any], word: str) -> None:
    operation = await programs.begin("POST", path, body)
    async with (
        programs.http() as client,
        client.stream("GET", f"/v1/operations/{operation.id}/events") as answer,
    ):
        async for event in api_served.events(answer):
            if _begins(event, word):
                break
        await programs.end(signal.SIGKILL)
    await programs.start()


async def _images(programs: programs_.Programs) -> list[resources.Image]:
    async with programs.http() as client:
        return msgspec.json.decode((await client.get("/v1/images")).content, type=list[resources.Image])


async def test_a_daemon_killed_while_it_makes_an_image(
    programs: programs_.Programs, registry: registries.Registry, layout: Path
) -> None:
    """What the next one lists is whole, and what the last one left is gone.

    The crash drill has every instant of a pull; here is one of each way to an image.
    """
    pulled = ("/v1/images/pull", {"reference": f"{registry.host}/team/app:v1"})
    imported = ("/v1/images/import", {"path": str(layout), "name": "laid"})
    for path, body in (pulled, imported):
        await _kill_at(programs, path, body, "unpacking layer 1")
        assert _left(programs.paths) == [], path
        assert len(await _images(programs)) == 1
    for path, body in (pulled, imported):
        made = await programs.done("POST", path, body)
        assert made.image is not None, made.error
    _assert_whole(programs.paths, await _images(programs))
    assert [path.name for path in programs.paths.cache.glob("blobs/partial/*")] == []
