# SPDX-License-Identifier: MIT
"""What a host runs out of, and what else goes wrong on it, against the daemon over a fake world.

Each fault is an error with a name and a remedy, and is the fault of what it hit alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import errno
import os
import resource
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from banger.contract import errors, names, privileged, resources
from banger.owner import composition, config, helper, operations, store
from banger.storage import overlay
from banger.vm import record
from tests import wall_clock
from tests.contract import conftest
from tests.contract import programs as programs_
from tests.fakes import helper as helpers
from tests.fakes import vmm
from tests.fakes import world as worlds

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


async def test_a_directory_too_deep_for_sockets_is_said_and_leaves_nothing(short_path: Path) -> None:
    """The address of a socket has room for 107 bytes, and a jail's is a long one."""
    paths = dataclasses.replace(conftest.laid_out(short_path), helper_dir=short_path / ("deep" * 20))
    conftest.furnish(paths)
    world = worlds.World(paths.state, paths.helper_dir / "jails", paths.helper_dir / "logs")
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        created = await conftest.Daemon(services, paths, world).create()
        assert created.error is not None
        assert created.error.step == "prepare_sockets"
        assert "longer than 107 bytes" in created.error.message
        assert "a shorter path" in created.error.hint
        assert world.leftovers() == {}
        assert world.asked(privileged.CreateSnapshot) == 0


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


# --- files, memory, threads ---


async def test_a_daemon_without_a_free_descriptor_says_so_and_goes_on(
    paths: config.Paths, capfd: pytest.CaptureFixture[str]
) -> None:
    """Real limits of a real process. What runs is not touched by it, and the journal is not flooded."""
    async with programs_.running(paths) as programs:
        assert (await programs.done("POST", "/v1/vms", {"name": "web"})).error is None
        assert programs.daemon is not None
        pid = programs.daemon.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        async with programs.http() as client:
            await client.get("/v1/info")
            used = {int(number) for number in os.listdir(f"/proc/{pid}/fd")}
            full = next(number for number in range(len(used) + 1) if number not in used)
            # The client keeps its connection; there is room for no other, nor for what the work needs.
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (full, before[1]))
            # Silent ones have what it may have had open as we looked, and closes now.
            silent = [await asyncio.open_unix_connection(str(programs.paths.socket)) for _ in range(3)]
            error = await _refused(client, "/v1/vms", {"name": "other"})
            waiting = asyncio.create_task(programs.vms())
            logged = ""
            async with asyncio.timeout(30):
                while "cannot take connections" not in logged:
                    logged += capfd.readouterr().err
                    await asyncio.sleep(0.05)  # it knocks, and is let in when there is room again
            assert error.code == "unavailable", error
            assert "may open no more files" in error.message
            assert "LimitNOFILE" in error.hint
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
            await waiting
            for _, writer in silent:
                writer.close()
        states = {vm.name: str(vm.state) for vm in await programs.vms()}
        assert states in ({"web": "running"}, {"web": "running", "other": "error"})
        logged += capfd.readouterr().err
        assert logged.count("cannot take connections") == 1
        assert len(logged.splitlines()) < 20
        again = ("/v1/vms/other/start", None) if "other" in states else ("/v1/vms", {"name": "other"})
        assert (await programs.done("POST", *again)).error is None
        for name in ("web", "other"):
            assert (await programs.done("DELETE", f"/v1/vms/{name}")).error is None
        assert await programs.leftovers() == 0


async def _refused(client: httpx.AsyncClient, path: str, body: object) -> errors.ErrorBody:
    """At once, or by the operation; by the one connection that there is."""
    answer = await client.post(path, json=body)
    if answer.status_code == 202:
        begun = msgspec.json.decode(answer.content, type=resources.Operation)
        said = (await client.get(f"/v1/operations/{begun.id}/events")).text.strip().splitlines()
        ended = msgspec.json.decode(said[-1].removeprefix("data: "), type=resources.Event).result
        assert ended is not None
        assert ended.error is not None
        return ended.error
    return msgspec.json.decode(answer.content, type=errors.ErrorBody)


@pytest.mark.parametrize(
    ("error", "code", "hint"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "unavailable", "more memory"),
        (MemoryError(), "unavailable", "more memory"),
        (OSError(errno.ENFILE, "Too many open files in system"), "unavailable", "fs.file-max"),
        (RuntimeError("can't start new thread"), "unavailable", "TasksMax"),
        (OSError(errno.ENOSPC, "No space left on device"), "no_space", "df -i"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no_space", "df -h"),
    ],
    ids=repr,
)
async def test_what_a_start_finds_exhausted_is_named_with_its_remedy(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, hint: str
) -> None:
    await daemon.create("other")

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(overlay, "ensure", fail)
        failed = await daemon.create()
    assert failed.error is not None
    assert failed.error.code == code
    assert hint in failed.error.hint
    assert [(vm.name, str(vm.state)) for vm in await daemon.services.vms.list()] == [
        ("other", "running"),
        ("web", "error"),
    ]
    assert (await _act(daemon, "start")).error is None


@pytest.mark.parametrize(
    "door",
    [
        "banger.vm.sources.look",
        "banger.storage.workdisk.create",
        "banger.vm.boot_args.compose",
        "banger.vm.readiness.wait_for_agent",
        "banger.owner.store.Store.save",
    ],
)
async def test_wherever_a_start_has_no_memory_it_is_named_and_taken_back(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(door, fail)
        failed = await daemon.create()
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == ("unavailable", "the host has no memory left")
    assert daemon.world.leftovers() == {}
    assert (await _act(daemon, "start")).error is None
    assert (await _act(daemon, "delete")).error is None


@pytest.mark.parametrize("place", ["state", "root's"])
@pytest.mark.parametrize(
    ("free", "files", "said"), [(10, 5000, "no space left"), (1 << 30, 5, "no more files")]
)
async def test_a_start_asks_for_room_before_it_makes_anything(
    daemon: conftest.Daemon,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    free: int,
    files: int,
    said: str,
) -> None:
    layout = daemon.services.vms._host.layout
    full = layout.state if place == "state" else layout.jails.parent
    look = os.statvfs

    def looked(path: Path) -> os.statvfs_result:
        few = os.statvfs_result((4096, 4096, 1 << 31, free, free, 9999, files, files, 0, 255))
        return few if path == full else look(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", looked)
        failed = await daemon.create()
    assert failed.error is not None
    assert (failed.error.code, failed.error.step) == ("no_space", "preflight")
    assert f"{said} in" in failed.error.message.replace("can be made ", "")
    assert str(full) in failed.error.message
    assert failed.error.hint
    assert daemon.world.leftovers() == {}
    assert (await _act(daemon, "start")).error is None


async def test_a_door_that_cannot_be_opened_blames_nobody_behind_it(short_path: Path) -> None:
    """Out of descriptors, it is not the helper that does not answer."""
    client = helper.Client(short_path / "h.sock")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = max(map(int, os.listdir("/proc/self/fd"))) + 1
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                stack.callback(os.close, os.dup(0))
        with pytest.raises(errors.UnavailableError, match="may open no more files"):
            await client.call(privileged.GetHost())


# --- a slow disk, a VMM that hangs ---


async def test_a_slow_disk_holds_up_its_own_vm_and_no_other(
    paths: config.Paths, world: worlds.World
) -> None:
    """And whoever waits is told for what."""
    begun, go = asyncio.Event(), asyncio.Event()

    async def slow(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.CreateSnapshot) and not begun.is_set():
            begun.set()
            await go.wait()

    client = helper.Client(
        paths.helper_socket, operations.current_op_id.get, tell=operations.note, slow_s=0.1
    )
    async with (
        helpers.FakeHelper(world).serving(paths.helper_socket),
        composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, client, "0" * 64) as services,
    ):
        daemon = conftest.Daemon(services, paths, world)
        world.before = slow
        waiting = await services.vms.create(resources.CreateVm(name="slow"))
        await begun.wait()
        assert (await daemon.create("quick")).error is None
        assert (await _act(daemon, "delete", "quick")).error is None
        async for event in services.operations.events(waiting.id):
            if "still waiting for the root helper" in event.detail:
                assert "create_snapshot" in event.detail
                break
        go.set()
        assert (await daemon.done(waiting)).error is None


async def test_a_vmm_that_hangs_is_ended_within_the_limits(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sockets take connections and never answer, as those of a process that is stopped."""
    await daemon.create()
    await daemon.create("other")
    vm = await daemon.services.vms.get("web")
    hung = daemon.world.vms[vm.id].vmm
    assert hung is not None

    hung._behaviour = vmm.Behaviour(hangs=True)
    machine = daemon.services.vms.endings._host
    limits = dataclasses.replace(machine.limits, flush_s=0.2, power_off_s=0.2)
    monkeypatch.setattr(daemon.services.vms.endings, "_host", dataclasses.replace(machine, limits=limits))
    assert (await _act(daemon, "stop")).error is None
    states = {vm.name: str(vm.state) for vm in await daemon.services.vms.list()}
    assert states == {"web": "stopped", "other": "running"}


# --- clocks ---


@pytest.mark.parametrize("jump_h", [-48, 48])
async def test_a_wall_clock_that_jumps_during_a_start_changes_nothing(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch, jump_h: int
) -> None:
    """Neither what the client sees of it, nor when it is stopped, nor for how long it can be asked about."""
    wall, jumped = wall_clock.WallClock(monkeypatch), [False]

    async def jump(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.LaunchVmm) and not jumped[0]:
            jumped[0] = True
            wall.jump(jump_h * 3600)

    before = datetime.datetime.now(datetime.UTC)
    daemon.world.before = jump
    body = resources.CreateVm(name="web", ttl_s=3600, idle_stop_s=3600)
    created = await daemon.done(await daemon.services.vms.create(body))
    assert created.error is None
    assert abs(datetime.datetime.now(datetime.UTC) - before) > datetime.timedelta(hours=47)
    other = await daemon.create("other")
    assert daemon.services.operations.get(created.id).status is SUCCEEDED
    elapsed = [event.elapsed_ms async for event in daemon.services.operations.events(created.id)]
    assert elapsed == sorted(elapsed)
    assert elapsed[-1] < 60_000
    assert other.error is None
    left = [end.left_s for end in daemon.services.vms.lifetimes.ends(_row(daemon, "web"))]
    assert all(3500 < each <= 3600 for each in left)
    assert (await _act(daemon, "restart")).error is None


def _row(daemon: conftest.Daemon, name: str) -> record.VmRecord:
    return daemon.services.vms._store.find(name)


# --- daemons: in a loop, two at once, on damaged files ---


async def test_a_daemon_restarted_in_a_loop_leaves_guests_and_host_as_they_are(
    paths: config.Paths, world: worlds.World
) -> None:
    first: resources.Vm | None = None
    most = 0
    for _ in range(12):
        composed = composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64)
        async with composed as services:
            if first is None:
                await conftest.Daemon(services, paths, world).create()
                first = await services.vms.get("web")
            vm = await services.vms.get("web")
            assert (vm.state, vm.pid, vm.boot_id) == (first.state, first.pid, first.boot_id)
            assert (await services.inventory.take()).leftovers == ()
        async with asyncio.timeout(30):
            # The guest closes its ends of connections when it hears that the daemon has.
            while most and len(os.listdir("/proc/self/fd")) > most:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        most = most or len(os.listdir("/proc/self/fd"))
    assert set(world.leftovers()) == {vm.id}


async def test_of_two_daemons_on_one_state_the_second_is_refused(paths: config.Paths) -> None:
    async with programs_.running(paths) as programs:
        status, said = await programs.second()
        assert status == 3
        assert "another bangerd uses" in said
        assert "systemctl stop bangerd" in said
        assert (await programs.done("POST", "/v1/vms", {"name": "web"})).error is None
        assert (await programs.done("DELETE", "/v1/vms/web")).error is None
        assert await programs.leftovers() == 0


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
async def test_a_database_cut_short_is_said_and_nothing_is_deleted(
    paths: config.Paths, world: worlds.World, kept: float
) -> None:
    """The daemon starts on what is left of the rows, or says what to do; disks stay in either case."""
    composed = composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64)
    async with composed as services:
        daemon = conftest.Daemon(services, paths, world)
        for number in range(12):
            await daemon.create(f"vm-{number}", start=number == 0)
    with contextlib.closing(sqlite3.connect(paths.database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode = DELETE")
    disks = sorted((paths.state / "vms").rglob("*"))
    size = paths.database.stat().st_size
    os.truncate(paths.database, int(size * kept))
    async with contextlib.AsyncExitStack() as stack:
        caught = stack.enter_context(pytest.raises(errors.BangerError))
        again = composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64)
        await stack.enter_async_context(again)
    assert ("is missing or empty" if kept == 0 else "is damaged") in caught.value.message
    assert "put" in caught.value.hint
    assert "back" in caught.value.hint
    assert sorted((paths.state / "vms").rglob("*")) == disks
    assert names.VmId(next(iter(world.leftovers())))


async def test_what_a_starting_daemon_cannot_clean_up_it_cleans_up_later(
    paths: config.Paths, world: worlds.World
) -> None:
    """Else its row would say for ever that it runs."""
    composed = composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64)
    async with composed as services:
        await conftest.Daemon(services, paths, world).create()
    for vm in world.vms.values():
        assert vm.vmm is not None
        await vm.vmm.kill()
    failures, cleaned = 2, asyncio.Event()

    async def done(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.TearDown):
            cleaned.set()

    async def refuse(request: privileged.Request[Any]) -> None:
        nonlocal failures
        if isinstance(request, privileged.TearDown) and failures:
            failures -= 1
            raise errors.OperationFailedError("the device is busy")

    world.before, world.after = refuse, done
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        async with asyncio.timeout(20):
            await cleaned.wait()
            async with services.vms._lifecycle.hold((await services.vms.get("web")).id, ""):
                pass  # what goes on under this lock is over
        assert (await services.vms.get("web")).state is not resources.VmState.RUNNING
        assert world.leftovers() == {}
