# SPDX-License-Identifier: MIT
"""What a host runs out of, and what else goes wrong on it, against the daemon over a fake world.

Each fault is an error with a name and a remedy, and is the fault of what it hit alone.
"""

from __future__ import annotations

from typing import Any

import pytest

from banger.contract import errors, privileged, resources
from banger.owner import store
from banger.vm import record
from tests.contract import conftest

SUCCEEDED = resources.OperationStatus.SUCCEEDED


async def _act(daemon: conftest.Daemon, act: str, name: str = "web") -> resources.Operation:
    return await daemon.done(await getattr(daemon.services.vms, act)(name))


# --- what the soak found ---


async def test_two_clean_ups_that_fail_are_both_named(daemon: conftest.Daemon) -> None:
    await daemon.create()

    async def refuse(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.DeleteGuestRules | privileged.DetachWorkDisk):
            raise errors.OperationFailedError(f"{type(request).__name__} is busy")

    daemon.world.before = refuse
    stopped = await _act(daemon, "stop")
    assert stopped.error is not None
    assert stopped.error.message == "DeleteGuestRules is busy"
    assert "cleaning up work_disk: DetachWorkDisk is busy" in stopped.error.also
    daemon.world.before = _nothing
    assert (await _act(daemon, "delete")).status is SUCCEEDED
    assert daemon.world.leftovers() == {}


async def _nothing(_: privileged.Request[Any]) -> None:
    return


async def test_a_start_that_is_done_does_not_fail_for_its_timings(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = store.Store.save

    def full(rows: store.Store, vm: record.VmRecord) -> None:
        if vm.last_start:
            raise errors.NoSpaceError("no space left for banger's database")
        save(rows, vm)

    monkeypatch.setattr(store.Store, "save", full)
    created = await daemon.create()
    assert created.error is None
    vm = await daemon.services.vms.get("web")
    assert vm.state is resources.VmState.RUNNING
    assert vm.pid, "it is watched"


async def test_a_create_that_comes_as_the_daemon_stops_leaves_no_row(daemon: conftest.Daemon) -> None:
    await daemon.services.operations.close()
    with pytest.raises(errors.UnavailableError, match="is stopping"):
        await daemon.services.vms.create(resources.CreateVm(name="web"))
    assert await daemon.services.vms.list() == []


# --- records on the disk ---


def test_a_record_that_is_no_text_is_said_and_harms_no_other(daemon: conftest.Daemon) -> None:
    images = daemon.services.images
    broken = daemon.paths.state / "images" / "aaaaaaaaaaaa"
    broken.mkdir()
    (broken / "image.json").write_bytes(b'{"id": "\xff"}')
    assert [image.name for image in images.list()] == ["tiny"]
    with pytest.raises(errors.OperationFailedError, match="cannot be read") as caught:
        images.records.read("aaaaaaaaaaaa")
    assert "make it again" in caught.value.hint
