# SPDX-License-Identifier: MIT
"""Each of the nineteen steps failing, failing with its undo, cancelled: the world is empty afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import pytest

from banger import steps
from banger.contract import errors, ports, privileged, resources
from banger.owner import composition, config, helper, operations, publish
from banger.storage import workdisk
from banger.vm import start
from tests.contract import conftest, publishing
from tests.contract.test_leftovers import nothing_is_left
from tests.contract.test_lifecycle import STEPS
from tests.fakes import helper as helpers
from tests.fakes import world as worlds

UNDOS = (
    "preflight",
    "socket_dir",
    "system_overlay",
    "dm_snapshot",
    "prepare_host_features",
    "tap",
    "metrics_file",
    "firecracker_launch",
)


class Sabotage:
    """Makes one step of the next start fail or hang, before or after its work is done."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self._steps = start.Start.steps
        self.reached = asyncio.Event()

    def fail(self, name: str, *, after: bool) -> None:
        async def broken(step: steps.Step) -> None:
            if after:
                await step.run()
            raise errors.OperationFailedError(f"{name} was told to fail")

        self._replace(name, broken)

    def hang(self, name: str) -> None:
        async def stuck(step: steps.Step) -> None:
            await step.run()
            self.reached.set()
            await asyncio.Event().wait()

        self._replace(name, stuck)

    def break_undos(self) -> None:
        """As `fail` or `hang` has left the steps, but none of them can be taken back."""
        planned = start.Start.steps

        async def broken() -> None:
            raise errors.OperationFailedError("the undo was told to fail")

        def without_undos(self: start.Start) -> list[steps.Step]:
            return [
                steps.Step(step.name, step.run, step.undo and broken, step.stage, step.detail)
                for step in planned(self)
            ]

        self._patch.setattr(start.Start, "steps", without_undos)

    def mend(self) -> None:
        self._patch.setattr(start.Start, "steps", self._steps)

    def _replace(self, name: str, run: Any) -> None:
        original = self._steps

        def planned(self: start.Start) -> list[steps.Step]:
            return [_with_run(step, run) if step.name == name else step for step in original(self)]

        self._patch.setattr(start.Start, "steps", planned)


def _with_run(step: steps.Step, run: Any) -> steps.Step:
    return steps.Step(step.name, lambda: run(step), step.undo, step.stage, step.detail, step.attributes)


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> Sabotage:
    return Sabotage(monkeypatch)


async def begun(daemon: conftest.Daemon) -> resources.Operation:
    """The start of a VM that has everything a rollback takes back, a published port too."""
    body = resources.CreateVm(name="web", publish=(f"{publishing.free_port()}:80",))
    return await daemon.services.vms.create(body)


async def assert_clean(daemon: conftest.Daemon, step: str) -> resources.Vm:
    vm = await assert_empty(daemon, step)
    assert not (daemon.paths.state / "vms" / vm.id).exists()
    return vm


async def assert_empty(daemon: conftest.Daemon, step: str) -> resources.Vm:
    assert daemon.world.leftovers() == {}
    vm = await daemon.services.vms.get("web")
    assert vm.state is resources.VmState.ERROR
    assert vm.last_error is not None
    assert vm.last_error.step == step
    for each in ports.parse_all(vm.publish):
        publish.bound(each).close()
    return vm


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", STEPS)
async def test_a_step_that_fails(
    daemon: conftest.Daemon, sabotage: Sabotage, name: str, after: bool
) -> None:
    sabotage.fail(name, after=after)
    operation = await daemon.done(await begun(daemon))
    assert operation.status is resources.OperationStatus.FAILED
    assert operation.error is not None
    assert operation.error.message == f"{name} was told to fail"
    vm = await assert_clean(daemon, name)
    assert vm.last_error is not None
    assert vm.last_error.op_id == operation.id
    sabotage.mend()
    again = await daemon.done(await daemon.services.vms.start("web"))
    assert again.status is resources.OperationStatus.SUCCEEDED, again.error


@pytest.mark.parametrize("name", STEPS)
async def test_a_step_that_fails_and_nothing_can_be_taken_back(
    daemon: conftest.Daemon, sabotage: Sabotage, name: str
) -> None:
    """Not then. What the start left is taken away in the background, and nobody waits for it."""
    sabotage.fail(name, after=True)
    sabotage.break_undos()
    operation = await daemon.done(await begun(daemon))
    assert operation.error is not None
    assert operation.error.message == f"{name} was told to fail"
    undone = [each for each in STEPS[: STEPS.index(name) + 1] if each in UNDOS]
    assert operation.error.also == tuple(
        f"rollback_{each}: the undo was told to fail" for each in reversed(undone)
    )
    sabotage.mend()
    await nothing_is_left(daemon.services)
    await assert_empty(daemon, name)
    assert not daemon.services.naming._running
    again = await daemon.done(await daemon.services.vms.start("web"))
    assert again.status is resources.OperationStatus.SUCCEEDED, again.error


@pytest.mark.parametrize("undo", UNDOS)
async def test_an_undo_that_fails_too_hides_nothing_and_stops_nothing(
    daemon: conftest.Daemon, sabotage: Sabotage, monkeypatch: pytest.MonkeyPatch, undo: str
) -> None:
    sabotage.fail("persist", after=False)
    planned = start.Start.steps

    def with_broken_undo(self: start.Start) -> list[steps.Step]:
        async def broken() -> None:
            raise errors.OperationFailedError("the undo was told to fail")

        return [
            steps.Step(s.name, s.run, broken, s.stage, s.detail) if s.name == undo else s
            for s in planned(self)
        ]

    monkeypatch.setattr(start.Start, "steps", with_broken_undo)
    operation = await daemon.done(await begun(daemon))
    assert operation.error is not None
    assert operation.error.message == "persist was told to fail"
    assert f"rollback_{undo}: the undo was told to fail" in operation.error.also
    sabotage.mend()
    await nothing_is_left(daemon.services)
    await assert_empty(daemon, "persist")
    again = await daemon.done(await daemon.services.vms.start("web"))
    assert again.status is resources.OperationStatus.SUCCEEDED, again.error
    gone = await daemon.done(await daemon.services.vms.delete("web"))
    assert gone.status is resources.OperationStatus.SUCCEEDED, gone.error
    assert daemon.world.leftovers() == {}


@pytest.mark.parametrize("name", STEPS)
async def test_a_step_that_is_cancelled(daemon: conftest.Daemon, sabotage: Sabotage, name: str) -> None:
    sabotage.hang(name)
    operation = await begun(daemon)
    async with asyncio.timeout(30):
        await sabotage.reached.wait()
        ended = await daemon.services.operations.cancel(operation.id)
    assert ended.status is resources.OperationStatus.CANCELLED
    vm = await assert_clean(daemon, name)
    assert vm.last_error is not None
    assert vm.last_error.code == "cancelled"
    sabotage.mend()
    again = await daemon.done(await daemon.services.vms.start("web"))
    assert again.status is resources.OperationStatus.SUCCEEDED, again.error


async def test_a_cancelled_start_takes_back_nothing_while_its_disk_is_being_made(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the disk appears when its undo is done, half made or in the way of the next start's."""
    loop, reached, go = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    make = workdisk._make

    def slow(*args: Any) -> None:
        make(*args)
        loop.call_soon_threadsafe(reached.set)
        go.wait(timeout=60)

    monkeypatch.setattr(workdisk, "_make", slow)
    operation = await begun(daemon)
    await reached.wait()
    daemon.services.operations.request_cancel(operation.id)
    loop.call_later(0.05, go.set)
    assert (await daemon.done(operation)).status is resources.OperationStatus.CANCELLED
    await assert_clean(daemon, "prepare_host_features")


async def test_stop_ends_a_start_that_hangs(daemon: conftest.Daemon, sabotage: Sabotage) -> None:
    sabotage.hang("wait_vsock_agent")
    await daemon.services.vms.create(resources.CreateVm(name="web"))
    await sabotage.reached.wait()
    operation = await daemon.done(await daemon.services.vms.stop("web"))
    assert operation.status is resources.OperationStatus.SUCCEEDED, operation.error
    assert daemon.world.leftovers() == {}


@pytest.mark.parametrize("verb", ["stop", "kill", "delete"])
async def test_starts_that_wait_behind_one_that_hangs_end_with_it(
    daemon: conftest.Daemon, sabotage: Sabotage, verb: str
) -> None:
    """Each of them would hang as the first did, and whoever ends the VM wait for all of them."""
    vms, operations = daemon.services.vms, daemon.services.operations
    await daemon.create(start=False)
    sabotage.hang("wait_vsock_agent")
    starts = [await vms.start("web") for _ in range(3)]
    await sabotage.reached.wait()
    ended = await daemon.done(await getattr(vms, verb)("web"))
    assert ended.error is None
    found = [operations.get(each.id).status for each in starts]
    assert found == [resources.OperationStatus.CANCELLED] * 3
    assert daemon.world.leftovers() == {}


async def test_a_start_behind_a_stop_is_the_last_word(daemon: conftest.Daemon, sabotage: Sabotage) -> None:
    sabotage.hang("wait_vsock_agent")
    await daemon.services.vms.create(resources.CreateVm(name="web"))
    await sabotage.reached.wait()
    sabotage.mend()
    await daemon.services.vms.stop("web")
    started = await daemon.done(await daemon.services.vms.start("web"))
    assert started.error is None
    assert (await daemon.services.vms.get("web")).state is resources.VmState.RUNNING


async def test_a_request_to_root_is_awaited_even_when_cancelled(daemon: conftest.Daemon) -> None:
    """Otherwise the tap would be made after its undo had found nothing to delete."""
    entered, release = asyncio.Event(), asyncio.Event()

    async def slow(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.CreateTap):
            entered.set()
            await release.wait()

    daemon.world.before = slow
    operation = await daemon.services.vms.create(resources.CreateVm(name="web"))
    await entered.wait()
    cancelling = asyncio.create_task(daemon.services.operations.cancel(operation.id))
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(cancelling), 0.05)
    assert not cancelling.done()
    release.set()
    await cancelling
    assert daemon.world.leftovers() == {}


async def test_a_helper_that_hangs_holds_an_undo_no_longer_than_its_limit(
    paths: config.Paths, world: worlds.World
) -> None:
    """The one undo is reported while it hangs and afterwards; the others take back what is theirs."""
    release = asyncio.Event()

    async def hook(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.PrepareJail):
            raise errors.OperationFailedError("no jail today")
        if isinstance(request, privileged.DeleteTap):
            await release.wait()

    world.before = hook
    op_id, tell = operations.current_op_id.get, operations.note
    client = helper.Client(paths.helper_socket, op_id, tell=tell, take_back_s=1, slow_s=0.2)
    async with (
        helpers.FakeHelper(world).serving(paths.helper_socket),
        composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, client, "0" * 64) as services,
    ):
        operation = await conftest.Daemon(services, paths, world).create()
        notes = [e.detail async for e in services.operations.events(operation.id) if e.kind == "note"]
        release.set()
    assert operation.error is not None
    assert operation.error.message == "no jail today"
    assert operation.error.also == ("rollback_tap: the root helper did not answer delete_tap within 1 s",)
    assert "still waiting for the root helper after 0.2 s: delete_tap" in notes
    assert not any(vm.snapshot or vm.work_disk or vm.jail for vm in world.vms.values())


async def test_whatever_a_rollback_asks_of_root_has_the_shorter_limit(
    daemon: conftest.Daemon, sabotage: Sabotage
) -> None:
    sabotage.fail("persist", after=False)
    await daemon.create()
    asked = [type(request) for request in daemon.world.requests]
    rollback = asked[asked.index(privileged.GrantVsock) + 1 :]
    assert set(rollback) == set(helper.TAKES_BACK)
    assert helper.TAKE_BACK_DEADLINE_S < steps.UNDO_TIMEOUT_S


async def test_a_guest_whose_kernel_panics_says_why(daemon: conftest.Daemon) -> None:
    daemon.world.behaviour.panic = "VFS: Unable to mount root fs"
    operation = await daemon.create()
    assert operation.error is not None
    assert "VFS: Unable to mount root fs" in operation.error.message
    await assert_clean(daemon, "wait_vsock_agent")


async def test_an_agent_that_never_answers_is_not_waited_for_for_ever(impatient: conftest.Daemon) -> None:
    impatient.world.behaviour.silent = True
    operation = await impatient.create()
    assert operation.error is not None
    assert operation.error.code == "timed_out"
    assert "did not answer within 1 s" in operation.error.message
    for what in ("`banger vm logs web`", "`agent_deadline_s`", "`sudo banger system restart`"):
        assert what in operation.error.hint
    await assert_clean(impatient, "wait_vsock_agent")


async def test_a_failed_start_of_a_throw_away_vm_leaves_no_row(
    daemon: conftest.Daemon, sabotage: Sabotage
) -> None:
    sabotage.fail("tap", after=True)
    body = resources.CreateVm(name="web", remove_on_failure=True)
    operation = await daemon.done(await daemon.services.vms.create(body))
    assert operation.status is resources.OperationStatus.FAILED
    assert await daemon.services.vms.list() == []
    assert daemon.world.leftovers() == {}


async def test_a_cancel_that_comes_while_the_error_is_kept_does_not_hide_it(
    daemon: conftest.Daemon, sabotage: Sabotage
) -> None:
    """The rollback is over, and the throw-away VM is being deleted: the longest part of keeping an error."""
    entered, release = asyncio.Event(), asyncio.Event()

    async def slow(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.PurgeLogs):
            entered.set()
            await release.wait()

    sabotage.fail("tap", after=True)
    daemon.world.before = slow
    body = resources.CreateVm(name="web", remove_on_failure=True)
    operation = await daemon.services.vms.create(body)
    async with asyncio.timeout(30):
        await entered.wait()
        daemon.services.operations.request_cancel(operation.id)
        await asyncio.sleep(0)
        release.set()
    ended = await daemon.done(operation)
    assert ended.status is resources.OperationStatus.FAILED
    assert ended.error is not None
    assert (ended.error.message, ended.error.step) == ("tap was told to fail", "tap")
    assert await daemon.services.vms.list() == []
    assert daemon.world.leftovers() == {}


async def test_a_user_s_overlay_survives_a_start_that_fails(
    daemon: conftest.Daemon, sabotage: Sabotage
) -> None:
    created = (await daemon.create()).vm
    assert created is not None
    await daemon.done(await daemon.services.vms.stop("web"))
    files = daemon.paths.state / "vms" / created.id
    sabotage.fail("persist", after=False)
    operation = await daemon.done(await daemon.services.vms.start("web"))
    assert operation.status is resources.OperationStatus.FAILED
    assert {path.name for path in files.iterdir()} == {"overlay.cow", "work.ext4"}
