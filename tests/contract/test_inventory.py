# SPDX-License-Identifier: MIT
"""What is on the host and whose it is, over a fake world: `banger gc` beside a running daemon."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from banger import run
from banger.contract import errors, inventory, names, privileged, resources
from banger.contract.inventory import Kind
from banger.owner import composition, config
from tests.contract import api_served, cli_process, conftest
from tests.fakes import world as worlds

STRANGER = "ffffffffffff"
RUNTIME = {
    Kind.VMM,
    Kind.SNAPSHOT,
    Kind.LOOP,
    Kind.TAP,
    Kind.RULES,
    Kind.JAIL,
    Kind.CGROUP,
    Kind.SOCKET,
}


@pytest.fixture
async def served(daemon: conftest.Daemon) -> AsyncIterator[api_served.Served]:
    async with api_served.serving(daemon) as made:
        yield made


async def take(daemon: conftest.Daemon) -> inventory.Inventory:
    return await daemon.services.inventory.take()


async def collect(daemon: conftest.Daemon) -> resources.Operation:
    return await daemon.done(daemon.services.inventory.begin_collecting())


def of(found: inventory.Inventory, owner: str) -> set[Kind]:
    return {thing.kind for thing in found.things if thing.owner == owner}


def left(found: inventory.Inventory) -> set[tuple[Kind, str]]:
    return {(thing.kind, thing.name) for thing in found.leftovers}


async def test_everything_of_a_vm_that_runs_is_its_own(daemon: conftest.Daemon) -> None:
    await daemon.create()
    found = await take(daemon)
    assert found.leftovers == ()
    assert of(found, "web") == RUNTIME | {Kind.LOGS, Kind.DISKS, Kind.ADDRESS, Kind.UID}
    assert of(found, "tiny") == {Kind.IMAGE, Kind.KERNEL}
    assert of(found, "banger") == {Kind.BRIDGE}


async def test_a_stopped_vm_keeps_disks_logs_and_leases(daemon: conftest.Daemon) -> None:
    await daemon.create()
    await daemon.done(await daemon.services.vms.stop("web"))
    found = await take(daemon)
    assert of(found, "web") == {Kind.LOGS, Kind.DISKS, Kind.ADDRESS, Kind.UID}
    assert found.leftovers == ()
    await daemon.done(await daemon.services.vms.delete("web"))
    assert of(await take(daemon), "web") == set()


async def test_what_nobody_owns_is_taken_away_and_nothing_else(daemon: conftest.Daemon) -> None:
    await daemon.create()
    await daemon.create("idle", start=False)
    idle = await daemon.services.vms.get("idle")
    web = await daemon.services.vms.get("web")
    daemon.world.vms[STRANGER] = worlds.VmState(snapshot=True, base_loops=True, logs=True)
    daemon.world.vms[idle.id] = worlds.VmState(tap=True)
    strays = [
        daemon.paths.state / "vms" / STRANGER,
        daemon.paths.state / "vms" / "odd",
        daemon.paths.state / "images" / ".cccccccccccc.new",
        daemon.paths.state / "kernels" / ".cccccccccccc.gone",
        daemon.paths.cache / ".work-1",
        daemon.paths.cache / "pinned" / ".fetch-1",
        daemon.paths.cache / "recipes" / ".build-1",
    ]
    for path in strays:
        path.mkdir(parents=True)
        (path / "half").write_bytes(b"x")
    elsewhere = daemon.paths.run / "elsewhere"
    elsewhere.mkdir(parents=True)
    plain = [
        daemon.paths.state / "vms" / "notes",
        daemon.paths.state / "images" / "notes",
        daemon.paths.state / "kernels" / ".notes",
        daemon.paths.state / ".banger.db.v3.new",
    ]
    for path in plain:
        path.write_bytes(b"x")
    links = [daemon.paths.state / "vms" / "eeeeeeeeeeee", daemon.paths.state / "images" / "eeeeeeeeeeee"]
    for path in links:
        path.symlink_to(elsewhere)
    misnamed = daemon.paths.state / "images" / "not-an-id"
    misnamed.mkdir()
    strays += [*plain, *links, misnamed]
    theirs = [daemon.paths.state / "notes", daemon.paths.cache / "notes"]
    for path in theirs:
        path.write_bytes(b"x")
    found = await take(daemon)
    assert {Path(thing.name) for thing in found.things if thing.foreign} == {*theirs}
    files = {Kind.DISKS, Kind.STAGED, Kind.IMAGE, Kind.KERNEL}
    assert {Path(name) for kind, name in left(found) if kind in files} == {*strays}
    assert {kind for kind, name in left(found)} == files | {
        Kind.SNAPSHOT, Kind.LOOP, Kind.LOGS, Kind.TAP
    }  # fmt: skip
    assert {thing.why for thing in found.leftovers if thing.vm_id == idle.id} == {"idle is created"}
    assert (await collect(daemon)).status is resources.OperationStatus.SUCCEEDED
    assert (await take(daemon)).leftovers == ()
    assert not any(path.exists() or path.is_symlink() for path in strays)
    assert all(path.exists() for path in (*theirs, elsewhere))
    assert set(daemon.world.leftovers()) == {web.id}
    assert (await daemon.services.vms.get("web")).pid == web.pid


async def test_what_an_operation_works_on_is_not_left_over(daemon: conftest.Daemon) -> None:
    entered, release = asyncio.Event(), asyncio.Event()

    async def slow(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.LaunchVmm):
            entered.set()
            await release.wait()

    daemon.world.before = slow
    began = await daemon.services.vms.create(resources.CreateVm(name="web"))
    await entered.wait()
    found = await take(daemon)
    assert found.leftovers == ()
    assert {thing.why for thing in found.things if thing.kind is Kind.TAP} == {
        f"operation {began.id} is at work"
    }
    await collect(daemon)
    release.set()
    assert (await daemon.done(began)).status is resources.OperationStatus.SUCCEEDED


async def test_what_begins_to_be_made_as_one_looks_is_not_left_over(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No event lies between looking at the operations and at what they make, so a moment is made here."""
    running = daemon.services.operations
    begun = running.list
    made = daemon.paths.state / "images" / ".cccccccccccc.new"

    def begins() -> list[resources.Operation]:
        assert threading.current_thread() is threading.main_thread(), "the loop changes them meanwhile"
        made.mkdir()
        return begun()

    monkeypatch.setattr(running, "list", begins)
    assert (await take(daemon)).leftovers == ()
    assert made.exists()


@pytest.mark.parametrize("how", ["stop", "delete"])
async def test_what_goes_as_one_looks_is_not_left_over(daemon: conftest.Daemon, how: str) -> None:
    """`banger gc` says by its status whether something is left over, also beside others' work."""
    await daemon.create()

    async def meanwhile(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.ListWorld):
            daemon.world.after = worlds._nothing
            await daemon.done(await getattr(daemon.services.vms, how)("web"))

    daemon.world.after = meanwhile
    assert (await take(daemon)).leftovers == ()


async def test_keys_that_are_being_made_are_not_left_over(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the first start, or for who asks for ssh, of which there is no operation."""
    loop, really = asyncio.get_running_loop(), run.run

    def meanwhile(argv: Sequence[str], **more: Any) -> run.Result:
        made = really(argv, **more)
        if argv[0] == "ssh-keygen":
            ended = asyncio.run_coroutine_threadsafe(collect(daemon), loop).result(10)
            assert ended.error is None
        return made

    monkeypatch.setattr(run, "run", meanwhile)
    await daemon.create(start=False)
    started = await daemon.done(await daemon.services.vms.start("web"))
    assert started.error is None
    assert (daemon.paths.state / "ssh" / "id_ed25519").exists()


async def test_a_process_is_owned_by_slot_and_strangers_are_left_alone(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    await daemon.create()
    listed = await daemon.world.call(privileged.ListWorld())
    others = (
        privileged.Other("process", "77 e2fsck", slot=1),
        privileged.Other("process", "78 e2fsck", slot=9),
        privileged.Other("snapshot", "fc-rootfs-mine"),
        privileged.Other("staged", "/var/lib/banger-root/node-1"),
        privileged.Other("tap", "banger-tap0"),
    )

    async def more(*_: object) -> privileged.Result:
        return privileged.World(listed.vms, bridge=True, others=others)

    handlers: dict[Any, Any] = worlds.HANDLERS
    monkeypatch.setitem(handlers, privileged.ListWorld, more)
    found = await take(daemon)
    assert left(found) == {(Kind.PROCESS, "78 e2fsck")}
    assert [thing.name for thing in found.things if thing.foreign] == ["fc-rootfs-mine"]
    assert "77 e2fsck" in {thing.name for thing in found.things if thing.owner == "web"}
    assert "banger-tap0" in {thing.name for thing in found.things if thing.owner == "banger"}


async def test_one_that_cannot_be_taken_away_keeps_no_other_and_is_said(daemon: conftest.Daemon) -> None:
    for vm_id in ("eeeeeeeeeeee", STRANGER):
        daemon.world.vms[vm_id] = worlds.VmState(tap=True)

    async def busy(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.TearDown) and request.vm_id == "eeeeeeeeeeee":
            raise errors.ConflictError("the tap is busy")

    daemon.world.before = busy
    ended = await collect(daemon)
    assert ended.error is not None
    assert ended.error.message == "the tap is busy"
    assert set(daemon.world.leftovers()) == {"eeeeeeeeeeee"}


async def test_what_its_user_deletes_meanwhile_is_no_failure(daemon: conftest.Daemon) -> None:
    await daemon.create("web", start=False)
    vm = await daemon.services.vms.get("web")
    first = "000000000000"
    for vm_id in (first, vm.id):
        daemon.world.vms[vm_id] = worlds.VmState(tap=True)

    async def deleted(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.PurgeLogs) and request.vm_id == first:
            await daemon.done(await daemon.services.vms.delete("web"))

    daemon.world.before = deleted
    ended = await collect(daemon)
    assert ended.error is None
    assert daemon.world.leftovers() == {}


async def test_a_dead_vm_that_cannot_be_taken_down_is_watched_on(daemon: conftest.Daemon) -> None:
    await daemon.create()
    vm = await daemon.services.vms.get("web")

    async def busy(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.TearDown):
            raise errors.ConflictError("the device is busy")

    daemon.world.before = busy
    await killed(daemon, vm.id)
    with pytest.raises(errors.ConflictError):
        await daemon.services.vms.endings.take_down(names.VmId(vm.id))
    daemon.world.before = worlds._nothing
    async with asyncio.timeout(30):
        while (await daemon.services.vms.get("web")).state is resources.VmState.RUNNING:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def killed(daemon: conftest.Daemon, vm_id: str) -> None:
    vmm = daemon.world.vm(vm_id).vmm
    assert vmm is not None
    await vmm.kill()


async def test_a_daemon_that_starts_sweeps_what_was_half_made(
    paths: config.Paths, world: worlds.World
) -> None:
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64):
        pass  # there is a database: without one these would be taken for VMs that have lost theirs
    half = [
        paths.cache / ".work-1",
        paths.state / "images" / ".cccccccccccc.new",
        paths.state / "vms" / "odd",
    ]
    for path in half:
        path.mkdir(parents=True)
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        assert not any(path.exists() for path in half)
        assert (await services.inventory.take()).leftovers == ()


async def test_the_command(served: api_served.Served) -> None:
    async def gc(*arguments: str) -> cli_process.Done:
        return await asyncio.to_thread(cli_process.Cli(served.path).run, "gc", *arguments)

    await served.daemon.create()
    clean = await gc()
    assert (clean.status, "each has its owner" in clean.text) == (0, True), clean.err
    assert (await gc("--json")).json == {"things": [], "removed": [], "leftovers": 0}
    explained = await gc("--explain")
    assert "it runs" in explained.text
    assert "tap-" in explained.text
    served.daemon.world.vms[STRANGER] = worlds.VmState(tap=True)
    found = await gc()
    assert (found.status, "tap-ffffffff" in found.text, "nobody" in found.text) == (1, True, True)
    applied = await gc("--apply", "--json")
    assert applied.status == 0
    assert [thing["name"] for thing in applied.json["removed"]] == ["tap-ffffffff"]
    assert set(served.daemon.world.leftovers()) == {(await served.daemon.services.vms.get("web")).id}
