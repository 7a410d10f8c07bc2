# SPDX-License-Identifier: MIT
"""A VM's life on the fake world: what each command makes, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import shutil
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.contract import errors, guest, names, privileged, resources
from banger.owner import composition, config, routes, store
from tests.contract import conftest, gates
from tests.fakes import vmm
from tests.fakes import world as worlds

STEPS = [
    "preflight",
    "cleanup_runtime",
    "bridge",
    "socket_dir",
    "prepare_sockets",
    "system_overlay",
    "dm_snapshot",
    "fsck_snapshot",
    "patch_root_overlay",
    "prepare_host_features",
    "tap",
    "metrics_file",
    "firecracker_binary",
    "firecracker_launch",
    "socket_access",
    "vsock_access",
    "wait_vsock_agent",
    "post_start_features",
    "persist",
]
STAGES = [
    "preflight",
    "prepare_rootfs",
    "prepare_host_features",
    "boot_firecracker",
    "wait_vsock_agent",
    "wait_guest_ready",
    "finalize",
]


def _composed(
    paths: config.Paths, world: worlds.World, host_boot_id: str = ""
) -> contextlib.AbstractAsyncContextManager[routes.Services]:
    network = conftest.NETWORK
    return composition.compose(conftest.SETTINGS, network, paths, world, "0" * 64, host_boot_id=host_boot_id)


CAPABILITIES = {
    "prepare_work_disk",
    "prepare_packet_rules",
    "prepare_read_only",
    "prepare_publish",
    "prepare_dns",
}


async def test_a_start_runs_the_nineteen_steps_in_their_order(daemon: conftest.Daemon) -> None:
    operation = await daemon.create()
    assert operation.status is resources.OperationStatus.SUCCEEDED, operation.error
    assert operation.vm is not None
    ran = [timing.name for timing in operation.vm.last_start]
    assert [name for name in ran if name not in CAPABILITIES] == STEPS


@pytest.mark.parametrize(("has_our_guest", "patched"), [(False, 1), (True, 0)])
async def test_only_an_image_with_another_guest_binary_is_patched(
    daemon: conftest.Daemon, has_our_guest: bool, patched: int
) -> None:
    if has_our_guest:
        about = daemon.paths.state / "images" / conftest.IMAGE_ID / "image.json"
        about.write_text(about.read_text().replace("1" * 64, "0" * 64))
    await daemon.create()
    assert daemon.world.asked(privileged.PatchRoot) == patched


async def test_a_client_sees_the_stages_once_each_in_their_order(daemon: conftest.Daemon) -> None:
    operation = await daemon.create()
    events = [event async for event in daemon.services.operations.events(operation.id)]
    assert [event.stage for event in events if event.kind == "stage"] == STAGES
    assert events[-1].kind == "end"
    assert events[-1].result == operation


async def test_running_means_an_agent_answered(daemon: conftest.Daemon) -> None:
    await daemon.create()
    vm = await daemon.services.vms.get("web")
    fake = daemon.world.vm(vm.id).vmm
    assert fake is not None
    assert (vm.state, vm.boot_id, vm.pid) == (resources.VmState.RUNNING, fake.boot_id, fake.pid)


async def test_stop_flushes_first_and_leaves_only_disks(daemon: conftest.Daemon) -> None:
    created = (await daemon.create()).vm
    assert created is not None
    fake = daemon.world.vm(created.id).vmm
    assert fake is not None
    operation = await daemon.done(await daemon.services.vms.stop("web"))
    assert operation.vm is not None
    assert operation.vm.state is resources.VmState.STOPPED
    assert (fake.flushes_before_power_off, fake.flushes) == (1, 1)
    assert daemon.world.leftovers() == {}
    disks = {path.name for path in (daemon.paths.state / "vms" / created.id).iterdir()}
    assert disks == {"overlay.cow", "work.ext4"}


async def test_a_guest_that_will_not_power_off_is_ended_all_the_same(impatient: conftest.Daemon) -> None:
    impatient.world.behaviour.ignores_power_off = True
    await impatient.create()
    operation = await impatient.done(await impatient.services.vms.stop("web"))
    assert operation.vm is not None
    assert operation.vm.state is resources.VmState.STOPPED
    assert impatient.world.leftovers() == {}


@pytest.mark.parametrize("deaf", [vmm.Behaviour(ignores_power_off=True), vmm.Behaviour(silent=True)])
async def test_whoever_stops_a_guest_that_does_not_go_down_is_told_what_may_be_lost(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch, deaf: vmm.Behaviour
) -> None:
    created = (await daemon.create()).vm
    assert created is not None
    assert await _notes(daemon, await daemon.services.vms.stop("web")) == []
    await daemon.done(await daemon.services.vms.start("web"))
    fake = daemon.world.vm(created.id).vmm
    assert fake is not None
    fake._behaviour = deaf
    ends = daemon.services.vms.endings
    monkeypatch.setattr(ends, "_host", dataclasses.replace(ends._host, limits=conftest.IMPATIENT.limits))
    (note,) = await _notes(daemon, await daemon.services.vms.stop("web"))
    assert "web did not go down by itself" in note
    assert await _notes(daemon, await daemon.services.vms.stop("web")) == [], "it does not run"


async def _notes(daemon: conftest.Daemon, operation: resources.Operation) -> list[str]:
    await daemon.done(operation)
    return [
        event.detail
        async for event in daemon.services.operations.events(operation.id)
        if event.kind == "note"
    ]


async def test_what_is_saved_of_a_vm_while_it_stops_is_kept(daemon: conftest.Daemon) -> None:
    """As when a workspace has arrived, and its row is written, while the guest flushes."""
    await daemon.create()
    gate = gates.Gate(daemon.world, privileged.KillVmm)
    stopping = await daemon.services.vms.stop("web")
    await gate.reached.wait()
    rows = store.Store(daemon.paths.database)
    workspace = resources.Workspace(
        path="/root/repo",
        source="/src",
        head="",
        branch="main",
        worktree="",
        index="",
        prepared_at=datetime.now(UTC),
    )
    rows.save(rows.find("web").with_workspace(workspace))
    rows.close()
    gate.go.set()
    assert (await daemon.done(stopping)).status is resources.OperationStatus.SUCCEEDED
    vm = await daemon.services.vms.get("web")
    assert (vm.state, vm.workspace) == (resources.VmState.STOPPED, workspace)


async def test_a_second_start_checks_the_overlay_and_keeps_it(daemon: conftest.Daemon) -> None:
    await daemon.create()
    assert daemon.world.asked(privileged.CheckSnapshot) == 0
    await daemon.done(await daemon.services.vms.stop("web"))
    operation = await daemon.done(await daemon.services.vms.start("web"))
    assert operation.status is resources.OperationStatus.SUCCEEDED, operation.error
    assert daemon.world.asked(privileged.CheckSnapshot) == 1


async def test_a_work_disk_grows_while_the_vm_is_stopped_and_never_shrinks(daemon: conftest.Daemon) -> None:
    created = (await daemon.create()).vm
    assert created is not None
    alterations = daemon.services.alterations
    vms, path = daemon.services.vms, daemon.paths.layout.work_disk(names.VmId(created.id))
    with pytest.raises(errors.ConflictError, match="while it runs") as refused:
        await alterations.set("web", resources.SetVm(disk_size_mib=64))
    assert "vm stop web" in refused.value.hint
    await daemon.done(await vms.stop("web"))
    with pytest.raises(errors.BadRequestError, match="can only grow"):
        await alterations.set("web", resources.SetVm(disk_size_mib=15, memory_mib=256))
    changed = await alterations.set("web", resources.SetVm(disk_size_mib=64))
    assert (changed.disk_size_mib, changed.memory_mib) == (64, 128)
    assert path.stat().st_size == 16 << 20, "until it is started"
    operation = await daemon.done(await vms.start("web"))
    assert operation.status is resources.OperationStatus.SUCCEEDED, operation.error
    assert path.stat().st_size == 64 << 20


async def test_a_vm_that_has_no_work_disk_yet_may_have_a_smaller_one(daemon: conftest.Daemon) -> None:
    await daemon.create(start=False)
    await daemon.services.alterations.set("web", resources.SetVm(disk_size_mib=20))
    changed = await daemon.services.alterations.set("web", resources.SetVm(disk_size_mib=16))
    assert changed.disk_size_mib == 16


async def test_restart_gives_a_new_boot_id(daemon: conftest.Daemon) -> None:
    before = (await daemon.create()).vm
    after = (await daemon.done(await daemon.services.vms.restart("web"))).vm
    assert before is not None
    assert after is not None
    assert before.boot_id != after.boot_id


@pytest.mark.parametrize("running", [True, False])
async def test_delete_leaves_nothing(daemon: conftest.Daemon, running: bool) -> None:
    await daemon.create(start=running)
    operation = await daemon.done(await daemon.services.vms.delete("web"))
    assert operation.status is resources.OperationStatus.SUCCEEDED, operation.error
    assert daemon.world.leftovers() == {}
    assert not any(vm.logs for vm in daemon.world.vms.values())
    assert await daemon.services.vms.list() == []
    assert not any((daemon.paths.state / "vms").glob("*"))


async def test_a_vm_whose_disks_are_gone_is_gone(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when its deletion is cancelled meanwhile, as by a daemon that ends."""
    loop, deleting, release = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    remove = shutil.rmtree

    def slow(path: Path) -> None:
        loop.call_soon_threadsafe(deleting.set)
        release.wait(10)
        remove(path)

    await daemon.create()
    monkeypatch.setattr(shutil, "rmtree", slow)
    operation = await daemon.services.vms.delete("web")
    await asyncio.wait_for(deleting.wait(), 30)
    daemon.services.operations.request_cancel(operation.id)
    await asyncio.sleep(0)
    release.set()
    await daemon.done(operation)
    assert not any((daemon.paths.state / "vms").glob("*"))
    assert await daemon.services.vms.list() == []


async def test_kill_needs_no_guest(daemon: conftest.Daemon) -> None:
    created = (await daemon.create()).vm
    assert created is not None
    fake = daemon.world.vm(created.id).vmm
    operation = await daemon.done(await daemon.services.vms.kill("web"))
    assert operation.vm is not None
    assert operation.vm.state is resources.VmState.STOPPED
    assert fake is not None
    assert fake.flushes == 0
    assert daemon.world.leftovers() == {}


async def test_ten_creates_at_once(daemon: conftest.Daemon) -> None:
    results = await asyncio.gather(*(daemon.create(f"vm-{n}") for n in range(10)))
    assert {result.status for result in results} == {resources.OperationStatus.SUCCEEDED}
    vms = await daemon.services.vms.list()
    assert len({vm.address for vm in vms}) == 10


async def test_nobody_waits_for_another_vm_s_boot(paths: config.Paths, world: worlds.World) -> None:
    patient = msgspec.structs.replace(conftest.SETTINGS, agent_deadline_s=60)
    async with composition.compose(patient, conftest.NETWORK, paths, world, "0" * 64) as services:
        daemon = conftest.Daemon(services, paths, world)
        world.behaviour = vmm.Behaviour(silent=True)
        slow = await services.vms.create(resources.CreateVm(name="slow"))
        async with asyncio.timeout(30):
            async for event in services.operations.events(slow.id):
                if event.stage == "wait_vsock_agent":
                    break
        world.behaviour = vmm.Behaviour()
        others = await asyncio.gather(*(daemon.create(f"vm-{n}") for n in range(10)))
        assert {each.status for each in others} == {resources.OperationStatus.SUCCEEDED}
        assert services.operations.get(slow.id).status is resources.OperationStatus.RUNNING


@pytest.mark.parametrize(
    ("before", "now", "why"),
    [
        ("first", "second", "the host restarted while it ran"),
        ("first", "first", "its VMM was ended by SIGTERM"),
        ("", "second", "its VMM was ended by SIGTERM"),
        ("first", "", "its VMM was ended by SIGTERM"),
    ],
)
async def test_a_host_that_restarted_is_the_reason(
    paths: config.Paths, world: worlds.World, before: str, now: str, why: str
) -> None:
    async with _composed(paths, world, before) as services:
        created = (await conftest.Daemon(services, paths, world).create()).vm
    assert created is not None
    (paths.layout.logs / created.id / "ending.log").write_text("by signal 15;\n")
    fake = world.vm(created.id).vmm
    assert fake is not None
    await fake.kill()
    async with _composed(paths, world, now) as services:
        vm = await services.vms.get("web")
        assert vm.last_error is not None
        assert vm.last_error.message == f"web is no longer running: {why}"
        assert world.leftovers() == {}


async def test_an_invalid_request_leaves_no_row(daemon: conftest.Daemon) -> None:
    with pytest.raises(errors.NotFoundError, match="no image 'nope'"):
        await daemon.services.vms.create(resources.CreateVm(name="web", image="nope"))
    assert await daemon.services.vms.list() == []


async def test_a_taken_name_is_refused(daemon: conftest.Daemon) -> None:
    await daemon.create()
    with pytest.raises(errors.AlreadyExistsError, match="web") as caught:
        await daemon.services.vms.create(resources.CreateVm(name="web"))
    assert "`banger vm delete web`" in caught.value.hint


async def test_a_daemon_that_starts_again_adopts_what_runs(paths: config.Paths, world: worlds.World) -> None:
    async def start() -> tuple[str, int]:
        async with _composed(paths, world) as services:
            if not await services.vms.list():
                daemon = conftest.Daemon(services, paths, world)
                await daemon.create()
            vm = await services.vms.get("web")
            return vm.boot_id, vm.pid

    assert await start() == await start()


async def test_a_daemon_that_starts_again_collects_what_no_row_owns(
    paths: config.Paths, world: worlds.World
) -> None:
    async with _composed(paths, world):
        pass  # there is a database: without one these would be taken for VMs that have lost theirs
    world.vm("ffffffffffff").tap = True
    (paths.state / "vms" / "ffffffffffff").mkdir(parents=True)
    async with _composed(paths, world):
        assert world.leftovers() == {}
        assert not any((paths.state / "vms").iterdir())


async def test_disks_that_cannot_be_deleted_keep_no_daemon_from_starting_and_gc_says_so(
    paths: config.Paths, world: worlds.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root, whom no mode stops, only a mount would do it for real."""
    remove = shutil.rmtree

    def busy(path: Path, *, ignore_errors: bool = False) -> None:
        if path.parent.name != "vms":
            remove(path, ignore_errors=ignore_errors)
        elif not ignore_errors:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    async with _composed(paths, world):
        pass
    for name in ("ffffffffffff", "lost+found"):
        (paths.state / "vms" / name).mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", busy)
    async with _composed(paths, world) as services:
        daemon = conftest.Daemon(services, paths, world)
        ended = await daemon.done(services.inventory.begin_collecting())
    assert ended.error is not None
    assert "ffffffffffff cannot be deleted: Device or resource busy" in ended.error.message


@pytest.mark.parametrize("remove", [True, False])
async def test_the_vm_of_a_command_goes_when_its_daemon_dies(
    paths: config.Paths, world: worlds.World, remove: bool
) -> None:
    """The client went with the daemon, so nobody else knows any more that it was to be deleted."""
    async with _composed(paths, world) as services:
        await conftest.Daemon(services, paths, world).create()
        request = resources.ExecRequest(argv=("cat",), remove=remove)
        async with services.sessions.exec("web", request):
            pass
        # exec_finished is never called: a daemon that is killed finishes nothing
    async with _composed(paths, world) as services:
        left = [vm.name for vm in await services.vms.list()]
    assert left == ([] if remove else ["web"])
    assert (world.leftovers() == {}) == remove


async def test_a_daemon_that_is_stopped_leaves_the_deletion_to_the_next(
    paths: config.Paths, world: worlds.World
) -> None:
    request = resources.ExecRequest(argv=("cat",), remove=True)
    async with _composed(paths, world) as services:
        await conftest.Daemon(services, paths, world).create()
        web = services.sessions.announced("web", request)
        async with services.sessions.exec(web, request):
            await services.operations.close()
        await services.sessions.finished(web, request)
        assert [vm.name for vm in await services.vms.list()] == ["web"]
    async with _composed(paths, world) as services:
        assert await services.vms.list() == []
    assert world.leftovers() == {}


@pytest.mark.parametrize("remove", [True, False])
async def test_a_throw_away_vm_whose_create_was_cut_short_goes(
    paths: config.Paths, world: worlds.World, remove: bool
) -> None:
    reached, never = asyncio.Event(), asyncio.Event()

    async def hang(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.LaunchVmm):
            reached.set()
            await never.wait()

    async with _composed(paths, world) as killed:
        world.before = hang
        await killed.vms.create(resources.CreateVm(name="web", remove_on_failure=remove))
        await reached.wait()
        # From here on the first daemon is as good as dead: all it has is a request that hangs.
        world.settle_s = 0.1
        async with _composed(paths, world) as services:
            left = [(vm.name, vm.state) for vm in await services.vms.list()]
            assert world.leftovers() == {}
        never.set()
    assert left == ([] if remove else [("web", resources.VmState.CREATED)])


async def test_a_throw_away_create_that_succeeded_is_kept(paths: config.Paths, world: worlds.World) -> None:
    async with _composed(paths, world) as services:
        body = resources.CreateVm(name="web", remove_on_failure=True)
        await conftest.Daemon(services, paths, world).done(await services.vms.create(body))
    async with _composed(paths, world) as services:
        assert (await services.vms.get("web")).state is resources.VmState.RUNNING


async def test_exec_echoes_what_it_is_sent(daemon: conftest.Daemon) -> None:
    await daemon.create()
    sent = bytes(range(256)) * 4096
    request = resources.ExecRequest(argv=("cat",))
    got = bytearray()
    async with daemon.services.sessions.exec("web", request) as running:

        async def feed() -> None:
            await running.write(sent)
            await running.close_stdin()

        feeding = asyncio.create_task(feed())
        async for event in running.output():
            if isinstance(event, guest.ExitStatus):
                assert event.as_shell == 0
            else:
                got += event[1]
        await feeding
    assert bytes(got) == sent


async def test_exec_in_a_stopped_vm_says_how_to_start_it(daemon: conftest.Daemon) -> None:
    await daemon.create(start=False)
    with pytest.raises(errors.NotRunningError, match="web is not running"):
        async with daemon.services.sessions.exec("web", resources.ExecRequest(argv=("true",))):
            pass


async def test_a_vmm_that_takes_its_time_to_die_is_seen_all_the_same(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sockets close before the kernel has taken it from its cgroup."""
    await daemon.create()
    (vm,) = daemon.world.vms.values()
    assert vm.vmm is not None
    dying = [privileged.Vmm(pid=vm.vmm.pid)] * 3
    handlers: dict[Any, Any] = worlds.HANDLERS
    find = handlers[privileged.FindVmm]
    shown: list[int] = []

    async def found(world: worlds.World, request: privileged.FindVmm) -> privileged.Result:
        shown.append((await daemon.services.vms.get("web")).pid)
        return dying.pop() if dying else await find(world, request)

    monkeypatch.setitem(handlers, privileged.FindVmm, found)
    await vm.vmm.kill()
    async with asyncio.timeout(30):
        while (await daemon.services.vms.get("web")).state is resources.VmState.RUNNING:  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # the daemon notices by itself; nothing tells us that it has
    assert dying == []
    assert shown == [vm.vmm.pid] * 4  # until it is gone
    assert daemon.world.leftovers() == {}
