# SPDX-License-Identifier: MIT
"""A VMM that ends without our doing: it is noticed, cleaned up, and its row says why."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from banger.contract import guest, names, privileged, resources
from banger.owner import operations
from tests.contract import conftest, gates


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        ("", "its VMM ended unexpectedly"),
        ("by signal 9;", "its VMM was ended by SIGKILL"),
        ("by signal 99;", "its VMM was ended by signal 99"),
        ("by signal x;", "its VMM ended unexpectedly"),
        ("by signal 9999;", "its VMM ended unexpectedly"),
        ("by signal 9; oom 0 oom_kill 1 ", "for want of memory: the host had none left"),
        ("by signal 9; oom 2 oom_kill 1 ", "for want of memory: its control group was full"),
        ("with status 150;", "its VMM ended on SIGSEGV (status 150)"),
        ("with status 0;", ""),
        ("signal 9;", "its VMM ended unexpectedly"),
    ],
)
@pytest.mark.parametrize("memory", ["", "Killed process 93 (cc1plus)"])
async def test_a_vmm_that_ends_by_itself_is_seen_and_cleaned_up(
    daemon: conftest.Daemon, memory: str, seen: str, why: str
) -> None:
    created = (await daemon.create()).vm
    assert created is not None
    logs = daemon.paths.layout.logs / created.id
    if memory:
        (logs / "console.log").write_text(f"[    9.1] Out of memory: {memory}, UID 0 total-vm:9kB\n")
    if seen:
        (logs / "ending.log").write_text(f"{seen}\n")
    fake = daemon.world.vm(created.id).vmm
    assert fake is not None
    await fake.kill()
    vm = await _ended(daemon)
    if not why:
        assert vm.state is resources.VmState.STOPPED
        return
    assert vm.state is resources.VmState.ERROR
    assert vm.last_error is not None
    assert why in vm.last_error.message
    assert (f"ran out of memory ({memory})" in vm.last_error.message) == bool(memory)
    assert ("vm set web --memory 256M" in vm.last_error.hint) == bool(memory)
    assert ("stop other VMs" in vm.last_error.hint) == ("host" in why)
    assert daemon.world.leftovers() == {}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("", ""),
        (guest.NO_CONSOLE, "its guest was reset without going down first, as by a panic of its kernel"),
        (f"{guest.NO_CONSOLE} and more\nnoise\n{guest.GOODBYE}", ""),
        (f"{guest.NO_CONSOLE}\n{guest.GOODBYE}\n{guest.NO_CONSOLE}", "its guest was reset"),
    ],
)
async def test_an_end_without_a_goodbye_is_no_orderly_one(
    daemon: conftest.Daemon, said: str, why: str
) -> None:
    """Where the kernel cannot tell of its panic, and our agent says that it will tell of an orderly end."""
    created = (await daemon.create()).vm
    assert created is not None
    logs = daemon.paths.layout.logs / created.id
    (logs / "console.log").write_text(f"{said}\n")
    (logs / "ending.log").write_text("with status 0;\n")
    fake = daemon.world.vm(created.id).vmm
    assert fake is not None
    await fake.kill()
    vm = await _ended(daemon)
    assert vm.state is (resources.VmState.ERROR if why else resources.VmState.STOPPED)
    assert (vm.last_error is not None) == bool(why)
    if vm.last_error is not None:
        assert why in vm.last_error.message
        assert "vm set web --kernel debian-6.12" in vm.last_error.hint
    assert daemon.world.leftovers() == {}


@pytest.mark.parametrize("how", ["stop", "kill"])
@pytest.mark.parametrize("is_noticed", [True, False], ids=["noticed", "not yet noticed"])
async def test_a_stop_of_one_that_had_ended_keeps_why_until_it_starts_again(
    daemon: conftest.Daemon, how: str, *, is_noticed: bool
) -> None:
    created = (await daemon.create()).vm
    assert created is not None
    vms, vm_id = daemon.services.vms, names.VmId(created.id)
    (daemon.paths.layout.logs / created.id / "ending.log").write_text("by signal 11;\n")
    fake = daemon.world.vm(vm_id).vmm
    assert fake is not None
    if is_noticed:
        await fake.kill()
        await _ended(daemon)
        stopping = await getattr(vms, how)("web")
    else:
        async with vms._lifecycle.hold(vm_id, ""):
            stopping = await getattr(vms, how)("web")
            while stopping.id not in vms._lifecycle.wanting(vm_id):  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0)
            await fake.kill()
    done = await daemon.done(stopping)
    assert done.error is None
    vm = await vms.get("web")
    assert (vm.state, daemon.world.leftovers()) == (resources.VmState.STOPPED, {})
    assert vm.last_error is not None
    assert "its VMM was ended by SIGSEGV" in vm.last_error.message
    told = [event.detail async for event in daemon.services.operations.events(done.id)]
    assert not [each for each in told if "did not go down" in each]
    assert (await daemon.done(await vms.start("web"))).error is None
    assert (await vms.get("web")).last_error is None


async def test_a_stop_that_cut_a_start_short_was_no_error(daemon: conftest.Daemon) -> None:
    await daemon.create(start=False)
    gate = gates.Gate(daemon.world, privileged.CreateTap)
    starting = await daemon.services.vms.start("web")
    await gate.reached.wait()
    stopping = await daemon.services.vms.stop("web")
    gate.go.set()
    assert (await daemon.done(starting)).status is resources.OperationStatus.CANCELLED
    assert (await daemon.done(stopping)).error is None
    vm = await daemon.services.vms.get("web")
    assert (vm.state, vm.last_error) == (resources.VmState.STOPPED, None)


async def test_a_guest_that_goes_down_by_itself_already_is_waited_for(daemon: conftest.Daemon) -> None:
    """Its agent is among the first to end; its file systems are unmounted after that."""
    created = (await daemon.create()).vm
    assert created is not None
    fake = daemon.world.vm(created.id).vmm
    assert fake is not None
    daemon.world.behaviour.silent = True
    ran: list[bool] = []

    async def look(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.KillVmm):
            ran.append(fake.is_running)

    daemon.world.before = look
    stopping = await daemon.services.vms.stop("web")
    asyncio.get_running_loop().call_later(0.1, fake._go_down)
    stopped = (await daemon.done(stopping)).vm
    assert stopped is not None
    assert (stopped.state, stopped.last_error, ran) == (resources.VmState.STOPPED, None, [False])


@pytest.mark.parametrize("is_late", [True, False], ids=["late", "refused"])
async def test_a_guest_that_could_not_flush_in_time_is_asked_to_power_off_all_the_same(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch, *, is_late: bool
) -> None:
    """One whose disk is slow, or that cannot write to one of many, ends its services and unmounts."""
    created = (await daemon.create()).vm
    assert created is not None
    ends, ran, asked = daemon.services.vms.endings, list[bool](), list[guest.FrameType]()
    fake = daemon.world.vm(created.id).vmm
    assert fake is not None

    async def slow(kind: guest.FrameType, when: str) -> None:
        asked.append(kind)
        if kind is guest.FrameType.FLUSH and when == "before":
            await (asyncio.Event().wait() if is_late else refuse())

    async def refuse() -> None:
        raise ConnectionResetError

    async def look(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.KillVmm):
            ran.append(fake.is_running)

    limits = dataclasses.replace(ends._host.limits, flush_s=0.2)
    monkeypatch.setattr(ends, "_host", dataclasses.replace(ends._host, limits=limits))
    daemon.world.behaviour.on_agent, daemon.world.before = slow, look
    done = await daemon.done(await daemon.services.vms.stop("web"))
    assert (done.error, guest.FrameType.POWER_OFF in asked, ran) == (None, True, [False])


async def _ended(daemon: conftest.Daemon) -> resources.Vm:
    async with asyncio.timeout(30):
        vm = await daemon.services.vms.get("web")
        while vm.state is resources.VmState.RUNNING:
            await asyncio.sleep(0.01)  # nothing announces it: that the daemon noticed is what is tested
            vm = await daemon.services.vms.get("web")
    return vm


async def test_what_is_done_for_a_vm_that_ended_belongs_to_no_operation(daemon: conftest.Daemon) -> None:
    """In both journals it stood under the id of the start, which had ended hours before."""
    asked: list[tuple[str, str]] = []

    async def heard(request: privileged.Request[Any]) -> None:
        asked.append((type(request).__name__, operations.current_op_id.get()))

    created = await daemon.create()
    assert created.vm is not None
    daemon.world.before = heard
    fake = daemon.world.vm(created.vm.id).vmm
    assert fake is not None
    await fake.kill()
    await _ended(daemon)
    assert "TearDown" in dict(asked)
    assert {op_id for _, op_id in asked} == {""}


async def test_a_host_key_goes_with_its_vm(daemon: conftest.Daemon) -> None:
    """Whoever has its name next brings another one, and would be taken for an impostor."""
    await daemon.create()
    await daemon.create("other")
    keys = daemon.paths.state / "ssh" / "hosts"
    for name in ("web", "other"):
        (keys / f"{name}.vm").write_text("pinned")
    await daemon.done(await daemon.services.vms.stop("web"))
    assert (keys / "web.vm").exists()
    await daemon.done(await daemon.services.vms.delete("web"))
    assert [path.name for path in keys.iterdir()] == ["other.vm"]


async def test_a_host_key_that_was_pinned_too_late_is_not_the_next_vm_s(daemon: conftest.Daemon) -> None:
    """An ssh client that began before the delete, or a daemon that was killed right after it, leaves one."""
    keys = daemon.paths.state / "ssh" / "hosts"
    keys.mkdir(parents=True)
    for name in ("web", "old", "other"):
        (keys / f"{name}.vm").write_text("of one that is gone")
    await daemon.create()
    assert sorted(path.name for path in keys.iterdir()) == ["old.vm", "other.vm"]
    await daemon.done(await daemon.services.vms.stop("web"))
    await daemon.services.alterations.set("web", resources.SetVm(name="old"))
    assert [path.name for path in keys.iterdir()] == ["other.vm"]
