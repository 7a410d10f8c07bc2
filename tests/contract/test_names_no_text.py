# SPDX-License-Identifier: MIT
"""A file's name may be no UTF-8, and what the daemon says of it is text all the same."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import msgspec
import pytest

from banger.contract import errors, inventory, resources
from banger.vm import start
from tests.contract import api_served, conftest

NAME = os.fsdecode(b"odd-\xff")
SAID = "odd-\\udcff"


@pytest.fixture
async def served(daemon: conftest.Daemon) -> AsyncIterator[api_served.Served]:
    async with api_served.serving(daemon) as made:
        yield made


async def test_what_lies_beside_ours_is_listed_and_taken_away(served: api_served.Served) -> None:
    """One such file of anybody's, and `banger gc` could say nothing of any other."""
    state = served.daemon.paths.state
    stranger, leftover = state / NAME, state / "vms" / NAME
    leftover.parent.mkdir(exist_ok=True)
    for path in (stranger, leftover):
        path.write_bytes(b"x")
    found = await served.get("/v1/inventory", inventory.Inventory)
    assert [thing.name for thing in found.things if thing.foreign] == [str(state / SAID)]
    assert [thing.name for thing in found.leftovers] == [str(state / "vms" / SAID)]
    ended = await served.done("POST", "/v1/inventory/collect")
    assert ended.status is resources.OperationStatus.SUCCEEDED, ended.error
    assert stranger.exists()
    assert not leftover.exists()


async def test_a_start_that_fails_on_one_says_so(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it is to be copied into the guest, by `file_sync`, and may not be read."""

    async def broken(plan: start.Start) -> None:
        raise errors.OperationFailedError(f"cannot read {NAME}: Permission denied")

    monkeypatch.setattr(start.Start, "_bridge", broken)
    operation = await daemon.create()
    assert operation.error is not None
    assert operation.error.message == f"cannot read {SAID}: Permission denied"
    assert msgspec.json.encode(operation)
    vm = await daemon.services.vms.get("web")
    assert vm.state is resources.VmState.ERROR
    assert vm.last_error is not None
    assert vm.last_error.message == operation.error.message
    events = [event async for event in daemon.services.operations.events(operation.id)]
    assert msgspec.json.encode(events)
