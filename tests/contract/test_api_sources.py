# SPDX-License-Identifier: MIT
"""Images, kernels and the runtime asked for twice at once: made once, or refused with a reason."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from banger.contract import errors, resources
from banger.images import publish, recipe, records
from banger.kernels import catalog
from banger.kernels import records as kernel_records
from banger.system import runtime
from tests.contract import api_served, conftest

Served = api_served.Served
Status = resources.OperationStatus

BUILD = {"recipe": "debian-bookworm", "name": "web"}
TWICE = [
    ("/v1/images/build", BUILD),
    ("/v1/kernels/pull", {"name": "generic-6.12"}),
    ("/v1/runtime/pull", None),
]


class Slow:
    """Stands in for what takes minutes and a network: building, pulling. Counts how often it is done."""

    def __init__(self) -> None:
        self.count = 0
        self.begun, self.release = threading.Event(), threading.Event()

    def build(self, images: records.Images, *_: object, **__: object) -> records.Image:
        self._work()
        return images.find("tiny")

    def pull(self, kernels: kernel_records.Kernels, *_: object, **__: object) -> kernel_records.Kernel:
        self._work()
        return kernels.find("tiny")

    def fetch(self, *_: object, **__: object) -> dict[str, Any]:
        self._work()
        return {}

    def _work(self) -> None:
        self.count += 1
        self.begun.set()
        assert self.release.wait(20)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    made = Slow()
    # Real ones need a network and take minutes; which operation does the work is all that is asked here.
    monkeypatch.setattr(publish, "build", made.build)
    monkeypatch.setattr(catalog, "pull", made.pull)
    monkeypatch.setattr(runtime, "pull", made.fetch)
    yield made
    made.release.set()


@pytest.fixture
async def served(daemon: conftest.Daemon, slow: Slow) -> AsyncIterator[Served]:
    async with api_served.serving(daemon) as made:
        yield made


async def _begun(served: Served, slow: Slow, path: str, body: object) -> resources.Operation:
    operation = await served.begin("POST", path, body)
    assert await asyncio.to_thread(slow.begun.wait, 10)
    return operation


@pytest.mark.parametrize(("path", "body"), TWICE)
async def test_the_same_twice_at_once_is_done_once(
    served: Served, slow: Slow, path: str, body: object
) -> None:
    first = await _begun(served, slow, path, body)
    second = await served.begin("POST", path, body)
    slow.release.set()
    ends = [(await served.watch(each.id))[-1].result for each in (first, second)]
    assert [end.status for end in ends if end] == [Status.SUCCEEDED] * 2
    assert slow.count == 1
    notes = [event.detail for event in await served.watch(second.id) if event.kind == "note"]
    assert [note for note in notes if first.id in note]


async def test_others_are_answered_while_a_recipe_is_read(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 KiB of TOML can take minutes."""
    begun, release = threading.Event(), threading.Event()

    def parse(text: bytes) -> recipe.Recipe:
        begun.set()
        assert release.wait(5)
        raise errors.BadRequestError("read")

    # How long a real one takes is no matter of this test.
    monkeypatch.setattr(recipe, "parse", parse)
    building = asyncio.create_task(served.error("POST", "/v1/images/build", 400, {"definition": "x"}))
    assert await asyncio.to_thread(begun.wait, 5)
    assert (await served.http.get("/v1/images")).status_code == 200
    release.set()
    assert (await building).message == "read"


async def test_others_are_answered_while_a_recipe_s_source_is_looked_at(
    served: Served, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be on a file system that does not answer, which no test can have without privilege."""
    begun, release = threading.Event(), threading.Event()

    def look(steps: recipe.TreeSteps) -> None:
        begun.set()
        assert release.wait(5)
        raise errors.BadRequestError("no file")

    monkeypatch.setattr(recipe.TreeSteps, "check_sources", look)
    building = asyncio.create_task(served.done("POST", "/v1/images/build", BUILD))
    assert await asyncio.to_thread(begun.wait, 5)
    assert (await served.http.get("/v1/images")).status_code == 200
    release.set()
    failed = (await building).error
    assert failed is not None
    assert (failed.message, slow.count) == ("no file", 0)


async def test_another_under_the_same_name_is_refused(served: Served, slow: Slow) -> None:
    first = await _begun(served, slow, "/v1/images/build", BUILD)
    other = {"path": "/srv/images/web", "name": "web"}
    error = await served.error("POST", "/v1/images/register", 409, other)
    assert (error.code, error.fields) == ("conflict", {"operation": first.id})
    assert first.id in error.message
    slow.release.set()
    assert (await served.watch(first.id))[-1].result
    failed = await served.done("POST", "/v1/images/register", other)
    assert failed.error is not None
    assert "is not an image directory" in failed.error.message


async def test_a_second_takes_over_from_a_first_that_is_cancelled(served: Served, slow: Slow) -> None:
    first = await _begun(served, slow, "/v1/images/build", BUILD)
    second = await served.begin("POST", "/v1/images/build", BUILD)
    served.daemon.services.operations.request_cancel(first.id)
    slow.release.set()
    ends = [(await served.watch(each.id))[-1].result for each in (first, second)]
    assert [end.status for end in ends if end] == [Status.CANCELLED, Status.SUCCEEDED]
    assert slow.count == 2


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/images/build", {**BUILD, "name": "../web"}),
        ("/v1/images/register", {"path": "/srv", "name": "Web"}),
        ("/v1/kernels/import", {"path": "/srv", "name": ""}),
    ],
)
async def test_a_name_that_is_none_is_refused_before_the_work(
    served: Served, slow: Slow, path: str, body: object
) -> None:
    await served.error("POST", path, 400, body)
    assert (slow.count, served.daemon.services.operations.list()) == (0, [])
