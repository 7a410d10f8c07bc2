# SPDX-License-Identifier: MIT
"""bangerd as a program, killed at any instant: VMs run on, nothing leaks, and nobody's VM is forgotten."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections.abc import AsyncIterator

import pytest
from websockets.asyncio import client as websockets

from banger.contract import resources
from banger.owner import config
from tests.contract import programs as programs_

_KILLS = 6


@pytest.fixture
async def programs(paths: config.Paths) -> AsyncIterator[programs_.Programs]:
    """Both run; the daemon has started for the first time."""
    async with programs_.running(paths) as made:
        yield made


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_vm_outlives_its_daemon(programs: programs_.Programs, number: signal.Signals) -> None:
    created = await programs.done("POST", "/v1/vms", {"name": "web"})
    assert created.vm is not None, created.error
    await programs.end(number)
    await programs.start()
    [vm] = await programs.vms()
    assert (vm.state, vm.pid, vm.boot_id) == (created.vm.state, created.vm.pid, created.vm.boot_id)
    deleted = await programs.done("DELETE", "/v1/vms/web")
    assert deleted.status is resources.OperationStatus.SUCCEEDED, deleted.error
    assert await programs.leftovers() == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("remove", [True, False])
async def test_the_vm_of_a_command_goes_with_its_daemon(
    programs: programs_.Programs, number: signal.Signals, remove: bool
) -> None:
    await programs.done("POST", "/v1/vms", {"name": "web", "remove_on_failure": remove})
    async with websockets.unix_connect(str(programs.paths.socket), "ws://banger/v1/vms/web/exec") as link:
        await link.send(json.dumps({"argv": ["cat"], "remove": remove}))
        await link.send(b"here")
        assert await link.recv() == b"\x01here"
        await programs.end(number)
    await programs.start()
    assert [vm.name for vm in await programs.vms()] == ([] if remove else ["web"])
    assert await programs.leftovers() == (0 if remove else 1)


async def test_killed_again_and_again_in_the_middle_of_starts(programs: programs_.Programs) -> None:
    """Of each create only a row may be left; those of throw-away VMs go as well."""
    dice = random.Random(7)
    for number in range(_KILLS):
        bodies = [{"name": f"{name}-{number}", "remove_on_failure": name == "rm"} for name in ("rm", "kept")]
        await asyncio.gather(*(programs.begin("POST", "/v1/vms", body) for body in bodies))
        await asyncio.sleep(dice.uniform(0, 0.2))
        await programs.end(signal.SIGKILL)
        await programs.start()
    vms = await programs.vms()
    running = [vm.name for vm in vms if vm.state is resources.VmState.RUNNING]
    created = [vm.name for vm in vms if vm.state is resources.VmState.CREATED]
    assert sorted(running + created) == sorted(vm.name for vm in vms)
    assert not [name for name in created if name.startswith("rm-")]
    assert {f"kept-{number}" for number in range(_KILLS)} <= {vm.name for vm in vms}
    assert {path.name for path in (programs.paths.state / "vms").iterdir()} <= {vm.id for vm in vms}
    print(f"{len(running)} ran, {len(created)} did not")
    for name in running:
        deleted = await programs.done("DELETE", f"/v1/vms/{name}")
        assert deleted.status is resources.OperationStatus.SUCCEEDED, deleted.error
    assert await programs.leftovers() == 0
