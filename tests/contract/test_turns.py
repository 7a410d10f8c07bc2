# SPDX-License-Identifier: MIT
"""Several want one VM at once: what is seen between their turns, and what the others are told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from banger.contract import errors, ports, privileged, resources
from banger.owner import alterations
from tests.contract import conftest, gates

SUCCEEDED = resources.OperationStatus.SUCCEEDED


async def test_at_no_moment_is_a_start_overlooked(daemon: conftest.Daemon) -> None:
    """A host that goes down at that moment would not stop it: not from the stop before to its own turn."""
    await daemon.create()
    vms = daemon.services.vms
    await vms.stop("web")
    started = await vms.start("web")
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        while not daemon.services.operations.get(started.id).status.is_final:
            assert vms.is_up(vms._store.find("web"))
            await asyncio.sleep(0)
    assert (await vms.get("web")).state is resources.VmState.RUNNING


@pytest.mark.parametrize(
    "alter",
    [
        lambda to: to.set("web", resources.SetVm(nat=True)),
        lambda to: to.set("web", resources.SetVm(memory_mib=256)),
        lambda to: to.extend("web", resources.ExtendVm()),
        lambda to: to.change_ports("web", ports.ChangePorts()),
    ],
    ids=["what-a-running-one-can", "what-it-cannot", "time", "ports"],
)
async def test_who_alters_a_vm_that_is_worked_on_is_told_by_whom(
    daemon: conftest.Daemon, alter: Callable[[alterations.Alterations], Awaitable[resources.Vm]]
) -> None:
    """That it runs is not why: what a running one can change would need no stop."""
    await daemon.create()
    gate = gates.Gate(daemon.world, privileged.TearDown)
    restarting = await daemon.services.vms.restart("web")
    await gate.reached.wait()
    with pytest.raises(errors.ConflictError, match=f"operation {restarting.id} is at work on web") as caught:
        await alter(daemon.services.alterations)
    assert "wait until it has ended" in caught.value.hint
    gate.go.set()
    assert (await daemon.done(restarting)).status is SUCCEEDED
