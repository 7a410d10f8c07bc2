# SPDX-License-Identifier: MIT
"""A start's own time, on fakes: what rows, steps, events and the wire to the helper cost, with no machine.

The rival does what nobody could leave out: the same privileged requests to the same fake helper one after
the other, the same work disk, and the wait for the agent; without rows, steps, undos, events or progress.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, Final

import msgspec

from banger.contract import names, privileged, resources
from banger.owner import guest
from banger.storage import workdisk
from bench import fake_host, host, report

ROUNDS: Final = 30
AT_ONCE: Final = 100
AIM_MS: Final = 25
_SHOWN_STEPS: Final = 4
Requests = Sequence[privileged.Request[Any]]


def run(_: host.Host) -> report.Report:
    return asyncio.run(measure(rounds=ROUNDS, at_once=AT_ONCE))


async def measure(*, rounds: int, at_once: int) -> report.Report:
    async with fake_host.running() as daemon:
        first = await daemon.start("first")
        requests = tuple(daemon.ops.requests[-_length(daemon.ops.requests, first.id) :])
        ours, theirs, vms = [], [], []
        for number in range(rounds):
            name, rival = f"vm-{number}", Rival(daemon, requests)
            began = time.perf_counter()
            vms.append(await daemon.start(name))
            ours.append(_ms_since(began))
            theirs.append(await _timed_ms(rival.start()))
            await rival.tear_down()
            await daemon.delete(name)
        many_ms = await _timed_ms(_all(daemon.start(f"many-{n}") for n in range(at_once)))
        await _all(daemon.delete(f"many-{n}") for n in range(at_once))
        rivals = [Rival(daemon, requests) for _ in range(at_once)]
        many_rival_ms = await _timed_ms(_all(rival.start() for rival in rivals))
        await _all(rival.tear_down() for rival in rivals)
    return report.Report(
        name="pipeline",
        rival="the same requests, work disk and wait for the agent, without a daemon",
        rows=(
            report.Row("one start", report.median(ours), "ms", report.median(theirs), f"< {AIM_MS} ms"),
            report.Row(f"{at_once} starts at once, in all", many_ms, "ms", many_rival_ms, "no error"),
            report.Row("of that, for each", many_ms / at_once, "ms", many_rival_ms / at_once),
        ),
        notes=(f"one start: {report.spread(ours, 'ms')}; longest steps: {_longest(vms)}",),
    )


def _length(requests: Requests, vm_id: str) -> int:
    """From the start's first request for this VM to the last."""
    first = next(at for at, request in enumerate(requests) if getattr(request, "vm_id", "") == vm_id)
    return len(requests) - first


class Rival:
    """The work of one start, for a VM that no daemon knows of."""

    def __init__(self, daemon: fake_host.FakeHost, requests: Requests) -> None:
        self._ops = daemon.ops.ops
        self._layout = daemon.paths.layout
        self._requests = requests
        self._vm_id = names.VmId(names.new_id())
        self._slot = next(_slots)

    async def start(self) -> None:
        vm_id, layout = self._vm_id, self._layout
        layout.vm_dir(vm_id).mkdir(parents=True)
        layout.overlay(vm_id).write_bytes(b"\0")  # the fake helper refuses an empty one
        for request in self._requests:
            if isinstance(request, privileged.AttachWorkDisk):
                path = layout.work_disk(vm_id)
                await asyncio.to_thread(workdisk.create, path, size_mib=fake_host.DISK_MIB)
            await self._ops.call(self._own(request))
        await guest.GuestClient(guest.vsock_connector(layout.vsock_socket(vm_id))).health()

    async def tear_down(self) -> None:
        await self._ops.call(privileged.TearDown(vm_id=self._vm_id))

    def _own(self, request: privileged.Request[Any]) -> privileged.Request[Any]:
        own = {"vm_id": self._vm_id, "slot": self._slot}
        has = {name: value for name, value in own.items() if hasattr(request, name)}
        return msgspec.structs.replace(request, **has)


_slots = itertools.count(1000)  # above those the daemon leases


def _longest(vms: Sequence[resources.Vm]) -> str:
    """Medians of the steps that take most of a start."""
    steps: dict[str, list[float]] = {}
    for vm in vms:
        for timing in vm.last_start:
            steps.setdefault(timing.name, []).append(timing.elapsed_ms)
    found = sorted(((report.median(values), name) for name, values in steps.items()), reverse=True)
    return ", ".join(f"{name} {ms:.1f} ms" for ms, name in found[:_SHOWN_STEPS])


async def _all(work: Iterable[Awaitable[object]]) -> None:
    await asyncio.gather(*work)


async def _timed_ms(work: Awaitable[None]) -> float:
    began = time.perf_counter()
    await work
    return _ms_since(began)


def _ms_since(began: float) -> float:
    return (time.perf_counter() - began) * 1000
