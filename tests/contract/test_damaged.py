# SPDX-License-Identifier: MIT
"""What the owner's files have lost, or say no more: it is named, and keeps nothing from being taken away."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from banger.contract import errors, names, ports, resources
from banger.owner import composition, config, routes
from tests.contract import conftest
from tests.fakes import world as worlds


async def test_an_image_that_lost_its_seed_gives_no_vm_an_empty_home(daemon: conftest.Daemon) -> None:
    seed = daemon.paths.state / "images" / conftest.IMAGE_ID / "work-seed.tar"
    kept = seed.read_bytes()
    seed.unlink()
    created = await daemon.create()
    assert created.error is not None
    assert (created.error.code, created.error.step) == ("not_found", "prepare_host_features")
    assert str(seed) in created.error.message
    assert daemon.world.leftovers() == {}
    seed.write_bytes(kept)
    assert (await daemon.done(await daemon.services.vms.start("web"))).error is None


@pytest.mark.parametrize("disk", ["overlay.cow", "work.ext4"])
async def test_a_vm_that_lost_a_disk_is_given_no_empty_one(daemon: conftest.Daemon, disk: str) -> None:
    """Where it was moved away, or a delete was interrupted: nobody would have said that work is gone."""
    created = (await daemon.create()).vm
    assert created is not None
    await daemon.done(await daemon.services.vms.stop("web"))
    path = daemon.paths.layout.vm_dir(names.VmId(created.id)) / disk
    kept = path.rename(path.with_suffix(".aside"))
    failed = await daemon.done(await daemon.services.vms.start("web"))
    assert failed.error is not None
    assert (failed.error.code, failed.error.step) == ("not_found", "preflight")
    assert str(path) in failed.error.message
    assert not path.exists()
    kept.rename(path)
    assert (await daemon.done(await daemon.services.vms.start("web"))).error is None


async def test_a_vm_whose_row_is_corrupt_is_deleted_like_any_other(
    paths: config.Paths, world: worlds.World
) -> None:
    """By what its columns say, or by its id: what it has on the host follows from that."""
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        daemon = conftest.Daemon(services, paths, world)
        for name in ("web", "other", "third"):
            assert (await daemon.create(name)).error is None
        _spoil(paths.database, "web")
        assert (await daemon.done(await services.vms.delete("web"))).error is None
        assert {vm.name for vm in await services.vms.list()} == {"other", "third"}
        _spoil(paths.database, "third")
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        daemon = conftest.Daemon(services, paths, world)
        found = {vm.name: vm for vm in await services.vms.list()}
        assert found["other"].state is resources.VmState.RUNNING
        assert found["third"].last_error is not None
        assert "banger vm delete third" in found["third"].last_error.hint
        assert (await daemon.done(await services.vms.delete("third"))).error is None
        assert set(world.leftovers()) == {found["other"].id}
        assert [path.name for path in (paths.state / "vms").iterdir()] == [found["other"].id]


async def test_a_vm_whose_row_is_corrupt_runs_on_and_is_stopped_in_order(
    paths: config.Paths, world: worlds.World
) -> None:
    """The next daemon takes it over: what is in it can be had, and its guest flushes before it ends."""
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        created = (await conftest.Daemon(services, paths, world).create()).vm
    assert created is not None
    _spoil(paths.database, "web")
    before = _columns(paths.database)
    fake = world.vm(created.id).vmm
    assert fake is not None
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        shown = await services.vms.get("web")
        assert (shown.state, shown.pid) == (resources.VmState.RUNNING, created.pid)
        assert (shown.vcpus, shown.memory_mib, shown.disk_size_mib) == (0, 0, 0)
        assert shown.last_error is not None
        assert "row of web is corrupt" in shown.last_error.message
        assert "`banger vm cp`" in shown.last_error.hint
        assert _columns(paths.database) == before
        daemon = conftest.Daemon(services, paths, world)
        assert (await daemon.done(await services.vms.stop("web"))).error is None
        assert (fake.flushes_before_power_off, fake.flushes) == (1, 1)
        assert world.leftovers() == {}
        assert (await services.vms.get("web")).state is resources.VmState.ERROR
        assert paths.layout.work_disk(names.VmId(created.id)).exists()
        assert _columns(paths.database) == [(*before[0][:3], "stopped", *before[0][4:])]


Ask = Callable[[routes.Services], Awaitable[object]]
_ASKED: dict[str, Ask] = {
    "start": lambda services: _done(services, services.vms.start("web")),
    "restart": lambda services: _done(services, services.vms.restart("web")),
    "set": lambda services: services.alterations.set("web", resources.SetVm(vcpus=2)),
    "set at once": lambda services: services.alterations.set("web", resources.SetVm(idle_stop_s=3600)),
    "extend": lambda services: services.alterations.extend("web", resources.ExtendVm(by_s=3600)),
    "publish": lambda services: services.alterations.change_ports(
        "web", ports.ChangePorts(publish=("1:1",))
    ),
}


@pytest.mark.parametrize("is_up", [True, False], ids=["up", "down"])
@pytest.mark.parametrize("ask", _ASKED.values(), ids=_ASKED)
async def test_nothing_is_made_up_of_a_vm_whose_row_is_corrupt(
    daemon: conftest.Daemon, ask: Ask, *, is_up: bool
) -> None:
    await daemon.create(start=is_up)
    _spoil(daemon.paths.database, "web")
    before = _columns(daemon.paths.database)
    with pytest.raises(
        errors.BangerError, match="row of web is corrupt" if is_up else "corrupt|not running"
    ):
        await ask(daemon.services)
    assert _columns(daemon.paths.database) == before
    assert [vm.runs for vm in daemon.world.vms.values()] == [True] * is_up


async def test_a_vm_whose_row_is_corrupt_and_that_ended_is_cleaned_up(
    paths: config.Paths, world: worlds.World
) -> None:
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        created = (await conftest.Daemon(services, paths, world).create()).vm
    assert created is not None
    _spoil(paths.database, "web")
    fake = world.vm(created.id).vmm
    assert fake is not None
    await fake.kill()
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        assert world.leftovers() == {}
        assert (await services.vms.get("web")).state is resources.VmState.ERROR
        assert [row[3] for row in _columns(paths.database)] == ["error"]
        assert [row[-1] for row in _columns(paths.database)] == [b"{"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("publish", '["8O80:80"]'), ("publish", '["1:1","1:2"]'), ("allow", '["1.2.3.x/8"]')],
)
async def test_a_row_that_means_nothing_is_as_corrupt(
    paths: config.Paths, world: worlds.World, field: str, value: str
) -> None:
    """A damaged letter leaves a row that can be read: it keeps no daemon down, and hides no other."""
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        for name in ("web", "other"):
            assert (await conftest.Daemon(services, paths, world).create(name)).error is None
    with contextlib.closing(sqlite3.connect(paths.database, isolation_level=None)) as outside:
        change = "UPDATE vms SET record = json_set(record, ?, json(?)) WHERE name = 'web'"
        outside.execute(change, (f"$.{field}", value))
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        found = {vm.name: vm for vm in await services.vms.list()}
        assert {vm.state for vm in found.values()} == {resources.VmState.RUNNING}
        assert found["other"].last_error is None
        assert found["web"].last_error is not None
        assert "row of web is corrupt" in found["web"].last_error.message
        daemon = conftest.Daemon(services, paths, world)
        assert (await daemon.done(await services.vms.delete("web"))).error is None


@pytest.mark.parametrize("damage", ["cut short", "gone", "unreadable"])
@pytest.mark.parametrize(
    ("kind", "their_id"), [("image", conftest.IMAGE_ID), ("kernel", conftest.KERNEL_ID)]
)
async def test_an_image_or_kernel_whose_record_is_lost_is_deleted_by_its_id(
    daemon: conftest.Daemon, kind: str, their_id: str, damage: str
) -> None:
    """As the error and the inventory say. Its VMs are shown, stopped and deleted as ever."""
    await daemon.create()
    record = daemon.paths.state / f"{kind}s" / their_id / f"{kind}.json"
    record.unlink()
    if damage == "cut short":
        record.write_text('{"id":')
    elif damage == "unreadable":
        record.mkdir()  # a bad block answers as wrongly
    services = daemon.services
    service = services.images if kind == "image" else services.kernels
    [vm] = await services.vms.list()
    assert getattr(vm, kind) == their_id
    assert (await daemon.done(await services.vms.restart("web"))).error is None
    with pytest.raises(errors.ConflictError, match="used by web"):
        service.delete(their_id)
    assert (await daemon.done(await services.vms.delete("web"))).error is None
    service.delete(their_id)
    assert list((daemon.paths.state / f"{kind}s").iterdir()) == []
    with pytest.raises(errors.NotFoundError):
        service.delete(their_id)


async def _done(services: routes.Services, begun: Awaitable[resources.Operation]) -> None:
    ended = await services.operations.wait((await begun).id)
    if ended.error is not None:
        raise errors.OperationFailedError(ended.error.message)


def _spoil(database: Path, name: str) -> None:
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as outside:
        outside.execute("UPDATE vms SET record = '{' WHERE name = ?", (name,))


def _columns(database: Path) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as outside:
        columns = "id, name, slot, state, image_id, kernel_id, created_at, CAST(record AS BLOB)"
        return outside.execute(f"SELECT {columns} FROM vms").fetchall()  # noqa: S608
