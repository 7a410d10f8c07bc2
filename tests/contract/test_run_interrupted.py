# SPDX-License-Identifier: MIT
"""`vm run` ended in each stage of its start by each signal: nothing is left, or the VM is kept and named."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

from banger.contract import privileged, resources
from banger.owner import composition, config, operations
from banger.vm import start
from tests.contract import api_served, cli_process, conftest, gates
from tests.fakes import world as worlds

# What root is asked for in each stage, while the start stands still.
REQUESTS: dict[resources.Stage, type[privileged.Request[Any]]] = {
    resources.Stage.PREFLIGHT: privileged.TearDown,
    resources.Stage.PREPARE_ROOTFS: privileged.CreateSnapshot,
    resources.Stage.PREPARE_HOST_FEATURES: privileged.AttachWorkDisk,
    resources.Stage.BOOT_FIRECRACKER: privileged.LaunchVmm,
    resources.Stage.WAIT_VSOCK_AGENT: privileged.GrantVsock,
}
# In the last two it is asked for nothing: there a step of ours stands still, the first one after its work.
STEPS = {resources.Stage.WAIT_GUEST_READY: "_after_start", resources.Stage.FINALIZE: "_persist"}
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: -9}

ENDS = [
    *(
        (stage, number)
        for stage in resources.Stage
        if stage in {*REQUESTS, *STEPS}
        for number in (signal.SIGINT, signal.SIGKILL)
    ),
    (resources.Stage.PREPARE_ROOTFS, signal.SIGTERM),
    (resources.Stage.WAIT_VSOCK_AGENT, signal.SIGHUP),
    (resources.Stage.WAIT_GUEST_READY, signal.SIGTERM),
    (resources.Stage.FINALIZE, signal.SIGHUP),
]


@pytest.fixture
async def served(daemon: conftest.Daemon) -> AsyncIterator[api_served.Served]:
    async with api_served.serving(daemon) as made:
        yield made


@pytest.mark.parametrize("remove", [True, False], ids=["rm", "kept"])
@pytest.mark.parametrize(("stage", "number"), ENDS)
async def test_an_end_in_any_stage_of_the_start(
    served: api_served.Served,
    monkeypatch: pytest.MonkeyPatch,
    stage: resources.Stage,
    number: signal.Signals,
    *,
    remove: bool,
) -> None:
    world, operations = served.daemon.world, served.daemon.services.operations
    reached, cancelled = asyncio.Event(), asyncio.Event()

    async def stand_still(request: privileged.Request[Any]) -> None:
        if isinstance(request, REQUESTS.get(stage, ())) and not reached.is_set():
            # From there on the guest says nothing: the last of these stages waits for it.
            world.behaviour.silent = True
            reached.set()
            await cancelled.wait()

    world.before = stand_still
    if stage in STEPS:
        step = getattr(start.Start, STEPS[stage])

        async def hold(plan: start.Start) -> None:
            if stage is resources.Stage.WAIT_GUEST_READY:
                await step(plan)
            reached.set()
            await cancelled.wait()
            pytest.fail("the step went on")

        monkeypatch.setattr(start.Start, STEPS[stage], hold)
    words = ("vm", "run", "--name", "shop", *(["--rm"] if remove else []), "--", "true")
    with cli_process.Cli(served.path).started(*words) as process:
        assert process.stderr is not None
        await asyncio.wait_for(reached.wait(), cli_process.DEADLINE_S)
        # What it shows of its progress says that it watches, and the daemon its life.
        assert await asyncio.to_thread(process.stderr.readline)
        (create,) = operations.list()
        process.send_signal(number)
        async with asyncio.timeout(cli_process.DEADLINE_S):
            # Nothing announces it, and root's work, which stands still, cannot be called back before.
            while not operations._entries[create.id].cancel_requested:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        cancelled.set()
        status = await asyncio.to_thread(process.wait, cli_process.DEADLINE_S)
        said = process.stderr.read().decode()
    ended = await served.daemon.done(create)
    assert (ended.status, status) == (resources.OperationStatus.CANCELLED, STATUS[number]), said
    assert world.leftovers() == {}
    left = [(vm.name, vm.state) for vm in await served.daemon.services.vms.list()]
    if remove:
        assert left == []
        assert number is signal.SIGKILL or "nothing is left of shop" in said
    else:
        assert left == [("shop", resources.VmState.ERROR)]
        assert number is signal.SIGKILL or "shop is kept, error" in said


GAPS = [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGHUP, True), (signal.SIGINT, False)]


@pytest.mark.parametrize(("number", "remove"), GAPS)
async def test_an_end_after_the_vm_was_made_and_before_its_command_is_known(
    served: api_served.Served, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, *, remove: bool
) -> None:
    reached, let_go = asyncio.Event(), asyncio.Event()
    images = type(served.daemon.services.images)
    get = images.get

    async def hold(self: Any, ref: str) -> resources.Image:
        reached.set()
        await let_go.wait()
        return get(self, ref)

    monkeypatch.setattr(images, "get", hold)
    words = ("vm", "run", "--name", "shop", *(["--rm"] if remove else []))
    with cli_process.Cli(served.path).started(*words) as process:
        await asyncio.wait_for(reached.wait(), cli_process.DEADLINE_S)
        process.send_signal(number)
        status = await asyncio.to_thread(process.wait, cli_process.DEADLINE_S)
        let_go.set()
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert status == STATUS[number], said
    left = [vm.name for vm in await served.daemon.services.vms.list()]
    assert left == ([] if remove else ["shop"])
    assert ("nothing is left of shop" if remove else "shop goes on") in said


@pytest.mark.parametrize(
    ("number", "remove"), [(signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGHUP, False)]
)
async def test_an_end_while_its_kernel_is_pulled(
    served: api_served.Served, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, *, remove: bool
) -> None:
    reached = asyncio.Event()

    async def pull(progress: operations.Progress) -> None:
        progress.stage(resources.Stage.PULL_KERNEL, "pulling tiny")
        reached.set()
        await asyncio.Event().wait()

    kernels = served.daemon.services.kernels
    monkeypatch.setattr(type(kernels), "how_to_obtain", lambda *_: pull)
    words = ("vm", "run", "--name", "shop", "--kernel", "mine", *(["--rm"] if remove else []), "--", "true")
    with cli_process.Cli(served.path).started(*words) as process:
        await asyncio.wait_for(reached.wait(), cli_process.DEADLINE_S)
        assert process.stderr is not None
        assert await asyncio.to_thread(process.stderr.readline)
        process.send_signal(number)
        status = await asyncio.to_thread(process.wait, cli_process.DEADLINE_S)
        said = process.stderr.read().decode()
    assert status == STATUS[number], said
    assert await served.daemon.services.vms.list() == []
    assert "nothing is left of shop" in said


async def test_the_next_start_of_one_that_was_kept_works(
    served: api_served.Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    await test_an_end_in_any_stage_of_the_start(
        served, monkeypatch, resources.Stage.BOOT_FIRECRACKER, signal.SIGINT, remove=False
    )
    served.daemon.world.behaviour.silent = False
    assert (await served.done("POST", "/v1/vms/shop/start")).status is resources.OperationStatus.SUCCEEDED


@pytest.mark.parametrize("comes", [True, False], ids=["comes", "gone"])
async def test_a_vm_whose_client_is_gone_before_it_watches_goes_too(
    served: api_served.Served, *, comes: bool
) -> None:
    """It was killed between asking for the VM and hearing of it, so no connection of its own ever ends."""
    vms, sessions = served.daemon.services.vms, served.daemon.services.sessions
    sessions.claims.within_s = 0.0 if not comes else 3600.0
    body = {"name": "shop", "remove_on_failure": True, "for_command": True}
    await served.done("POST", "/v1/vms", body)
    if comes:
        async with sessions.exec("shop", resources.ExecRequest(argv=("true",), remove=True)):
            pass
        assert sessions.claims._waiting == {}
        assert [vm.name for vm in await vms.list()] == ["shop"]
        return
    async with asyncio.timeout(cli_process.DEADLINE_S):
        # Nothing announces that the daemon begins to.
        while await vms.list():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    for operation in served.daemon.services.operations.list():
        await served.daemon.done(operation)
    assert served.daemon.world.leftovers() == {}


@pytest.mark.parametrize("remove", [True, False])
async def test_one_that_nobody_has_come_for_goes_with_its_daemon(
    paths: config.Paths, world: worlds.World, *, remove: bool
) -> None:
    """Its client may come within a minute, and to that daemon alone."""
    compose = composition.compose
    async with compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        body = resources.CreateVm(name="shop", remove_on_failure=remove, for_command=True)
        made = await conftest.Daemon(services, paths, world).done(await services.vms.create(body))
        assert made.error is None
    async with compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        assert await services.vms.list() == []
    assert world.leftovers() == {}


async def test_who_comes_before_the_vm_is_there_has_come(daemon: conftest.Daemon) -> None:
    """As a client that does not wait for the start to end: its VM was deleted a minute later, under it."""
    vms, sessions = daemon.services.vms, daemon.services.sessions
    sessions.claims.within_s = 0.0
    gate = gates.Gate(daemon.world, privileged.LaunchVmm)
    making = await vms.create(resources.CreateVm(name="shop", remove_on_failure=True, for_command=True))
    await gate.reached.wait()
    request = resources.ExecRequest(argv=("true",), remove=True, hold=True)
    vm_id = sessions.announced("shop", request)
    gate.go.set()
    assert (await daemon.done(making)).error is None
    await asyncio.sleep(0.05)
    assert [operation.kind for operation in daemon.services.operations.list()] == ["vm.create"]
    await sessions.finished(vm_id, request)
    for operation in daemon.services.operations.list():
        await daemon.done(operation)
    assert await vms.list() == []
    assert not sessions.claims._claimed
