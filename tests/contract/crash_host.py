# SPDX-License-Identifier: MIT
"""What survives a crash: a helper, its world and the VMMs in it; and a daemon's life beside them.

The test's side of the crash drill; the daemon's is `crash_daemon`.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from multiprocessing import connection
from typing import Any

import msgspec

from banger.contract import guest, privileged, resources
from banger.owner import config
from tests.contract import crash_daemon
from tests.contract.crash_daemon import Order, Report
from tests.fakes import world as worlds

RUNNING = resources.VmState.RUNNING
ACTS: dict[str, tuple[str, ...]] = {
    "create": (),
    "throw_away": (),
    "start": ("create", "stop"),
    "fail": ("create", "stop"),
    "stop": ("create",),
    "kill": ("create",),
    "restart": ("create",),
    "delete": ("create",),
}
"""Operations, and what comes before them. `fail` is a start whose last step fails."""
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.contract.crash_daemon"])
AGENT = "agent"
_TRUE_WITHIN_S = 10.0


class KilledError(Exception):
    """The daemon is no more."""


class Life:
    """A daemon from its start to its end."""

    def __init__(self, pid: int, pipe: connection.Connection) -> None:
        self.pid = pid
        self._pipe = pipe

    async def _ask(self, order: Order) -> Report:
        return await asyncio.to_thread(self._exchange, msgspec.json.encode(order))

    def _exchange(self, order: bytes) -> Report:
        try:
            self._pipe.send_bytes(order)
            return msgspec.json.decode(self._pipe.recv_bytes(), type=Report)
        except (EOFError, OSError):
            raise KilledError from None

    async def hello(self) -> None:
        await self._ask(Order("hello"))

    async def arm(self) -> None:
        await self._ask(Order("arm"))

    async def do(self, *names: str) -> Report:
        """The report of the last; those before it succeed."""
        for name in names[:-1]:
            report = await self._ask(Order("do", name))
            assert report.error == "", f"{name}: {report.error}"
        return await self._ask(Order("do", names[-1])) if names else Report()

    async def make(self, way: str, subject: str) -> Report:
        """An image; or a workspace."""
        return await self._ask(Order("do", way, subject))

    async def look(self) -> Report:
        return await self._ask(Order("look"))


class Host:
    """What survives: a helper, its world, and the VMMs in it.

    `strike` is called at each part of a request, and of what an agent is asked (there without one).
    """

    def __init__(self, paths: config.Paths, world: worlds.World) -> None:
        self.paths = paths
        self.world = world
        self.parts: list[str] = []
        self.strike: Callable[[privileged.Request[Any] | None], Awaitable[None]] = nothing
        for part in ("before", "middle", "after"):
            setattr(world, part, self._hook(part))
        world.behaviour.on_agent = self._asked

    def _hook(self, part: str) -> worlds.Hook:
        async def heard(request: privileged.Request[Any]) -> None:
            self.parts.append(f"{type(request).__name__} {part}")
            await self.strike(request)

        return heard

    async def _asked(self, kind: guest.FrameType, part: str) -> None:
        self.parts.append(f"{AGENT} {kind.name} {part}")
        await self.strike(None)

    async def answered(self) -> None:
        """Until no agent is asked: who asked has the answer a moment before `strike` hears of it."""
        while asked := [task for vm in self.world.vms.values() if vm.vmm for task in vm.vmm.answering]:
            await asyncio.wait(asked)

    @contextlib.asynccontextmanager
    async def daemon(
        self, at: int = -1, *, files: bool = False, power: bool = False, armed: bool = False
    ) -> AsyncIterator[Life]:
        """A daemon that is ready. Leaving the block ends it; that it is dead already is fine.

        Raises KilledError for one that is `armed` from its start and does not outlive that.
        """
        ours, theirs = FORKS.Pipe()
        process = FORKS.Process(target=crash_daemon.live, args=(self.paths, at, files, power, armed, theirs))
        await asyncio.to_thread(process.start)
        theirs.close()
        assert process.pid is not None
        try:
            life = Life(process.pid, ours)
            await life.hello()
            yield life
        finally:
            ours.close()
            await asyncio.to_thread(process.join)

    async def act(
        self, act: str, at: int = -1, *, files: bool = False, power: bool = False
    ) -> Report | None:
        """Does what comes before, then the operation; None when it killed the daemon."""
        async with self.daemon(at, files=files, power=power) as life:
            await life.do(*ACTS[act])
            await life.arm()
            await self.answered()
            self.parts.clear()
            try:
                report = await life.do(act)
                await self.answered()
                return report
            except KilledError:
                return None

    async def judge(self, where: str, *, there: bool | None = None) -> None:
        """The next daemon finds order, works, and leaves nothing. `there`: whether there has to be a VM."""
        self.strike = nothing
        async with self.daemon() as life:
            await self.judge_living(life, where, there=there)

    async def judge_living(self, life: Life, where: str, *, there: bool | None = None) -> None:
        found = await self.true(life, where)
        assert there is None or bool(found.vms) is there, where
        if not found.vms:
            acts = ["create"]
        elif found.vms[0].state is RUNNING:
            acts = ["stop"]
        else:
            acts = ["start"]
        for act in (*acts, "delete"):
            again = await life.do(act)
            assert again.error == "", f"{where}: {act} afterwards: {again.error}"
            await self.true(life, f"{where}: {act} afterwards")
        assert self.world.leftovers() == {}, where
        assert not any(vm.logs for vm in self.world.vms.values()), where
        vms = self.paths.state / "vms"
        assert not vms.exists() or not any(vms.iterdir()), where

    async def true(self, life: Life, where: str) -> Report:
        """Everything has an owner and rows say what is so, at once or as soon as the daemon has noticed."""
        deadline = time.monotonic() + _TRUE_WITHIN_S
        while True:
            report = await life.look()
            wrong = self._wrong(report)
            if not wrong:
                return report
            assert time.monotonic() < deadline, f"{where}: {wrong}"
            await asyncio.sleep(0.02)  # the daemon notices by itself; nothing tells us that it has

    def _wrong(self, report: Report) -> str:
        if report.leftovers:
            return f"nobody owns {report.leftovers}"
        running = {vm.id for vm in report.vms if vm.state is RUNNING}
        alive = {vm_id for vm_id, vm in self.world.vms.items() if vm.runs}
        if running != alive:
            return f"rows say that {running} run, and {alive} do"
        left = set(self.world.leftovers())
        return f"{left - running} have something left" if left - running else ""


async def nothing(_: privileged.Request[Any] | None) -> None:
    return
