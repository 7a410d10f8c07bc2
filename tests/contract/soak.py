# SPDX-License-Identifier: MIT
"""VM lives by the thousand over a host on which one thing in a hundred goes wrong, and what they leave.

The world and its VMMs live in this process, soak_daemon.py and soak_helper.py in their own. A fault is drawn
for each request to root, each start of a VMM, each change of a row and each life. In the first half the
services are killed besides; in the second they live on, so that what they hold can be compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from banger.contract import errors, privileged
from banger.owner import config
from tests.contract import conftest, soak_control
from tests.contract.soak_control import Held, Order, Start
from tests.fakes import helper as helpers
from tests.fakes import vmm
from tests.fakes import world as worlds

FAULT_RATE = 0.01
_SLOW_S = 0.1
_TREE = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Sample:
    """What both services hold after so many lives, with nothing going on."""

    lives: int
    hours: float
    daemon_starts: int
    daemon: Held
    helper: Held

    def __str__(self) -> str:
        daemon, helper = self.daemon, self.helper
        return (
            f"{self.lives:6} lives {self.hours:5.1f} h, daemon {self.daemon_starts}:"
            f" {daemon.rss_kib} KiB {daemon.descriptors} fds {daemon.tasks} tasks {daemon.objects} objects;"
            f" helper: {helper.rss_kib} KiB {helper.descriptors} fds {helper.threads} threads"
            f" {helper.objects} objects"
        )


@dataclass(slots=True)
class Faults:
    """Strikes the world. `struck` counts by kind."""

    world: worlds.World
    dice: random.Random
    kill_helper: Callable[[], None]
    rate: float = 0.0
    struck: Counter[str] = field(default_factory=Counter)
    _late: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        world = self.world
        world.before, world.middle, world.after = self._before, self._middle, self._after

    def _drawn(self, *kinds: str) -> str:
        if self.dice.random() >= self.rate:
            return ""
        kind = self.dice.choice(kinds)
        self.struck[kind] += 1
        return kind

    async def _before(self, request: privileged.Request[Any]) -> None:
        self.world.requests.clear()
        kind = self._drawn(
            "refused",
            "no space",
            "slow",
            "cut before",
            "refused after",
            "cut after",
            "vmm dies",
            "helper dies",
        )
        match kind:
            case "refused":
                raise errors.OperationFailedError("Device or resource busy", hint="the soak's fault")
            case "no space":
                raise errors.NoSpaceError("no space left on the host", hint="the soak's fault")
            case "slow":
                await asyncio.sleep(_SLOW_S)
            case "cut before":
                raise helpers.Killed
            case "refused after" | "cut after":
                self._late[id(request)] = kind
            case "vmm dies":
                await self.kill_vmm(getattr(request, "vm_id", ""))
            case "helper dies":
                self.kill_helper()

    async def _after(self, request: privileged.Request[Any]) -> None:
        kind = self._late.pop(id(request), "")
        if kind == "refused after":
            raise errors.DeadlineError("it was done too late", hint="the soak's fault")
        if kind == "cut after":
            raise helpers.Killed

    async def _middle(self, request: privileged.Request[Any]) -> None:
        if not isinstance(request, privileged.LaunchVmm):
            if self._drawn("cut in the middle"):
                raise helpers.Killed
            return
        match self._drawn("silent guest", "panic", "will not power off"):
            case "silent guest":
                self.world.behaviour = vmm.Behaviour(silent=True)
            case "panic":
                self.world.behaviour = vmm.Behaviour(panic="the soak's fault")
            case "will not power off":
                self.world.behaviour = vmm.Behaviour(ignores_power_off=True)
            case _:
                self.world.behaviour = vmm.Behaviour()

    async def kill_vmm(self, vm_id: str) -> None:
        found = self.world.vms.get(vm_id)
        if found is not None and found.vmm is not None:
            await found.vmm.kill()


class Services:
    """Both services over a world; either can be killed, and is started again as systemd would."""

    def __init__(self, paths: config.Paths, world: worlds.World, seed: int) -> None:
        self.paths = paths
        self.world = world
        self.faults = Faults(world, random.Random(seed), self.kill_helper)
        self.may_kill = True
        self.up = asyncio.Event()
        self.daemon_starts = 0
        self.ahead_s = 0.0
        self._seed = seed
        self._top = paths.state.parent
        self._helper: subprocess.Popen[bytes] | None = None
        self._daemon: asyncio.subprocess.Process | None = None
        self._busy = asyncio.Lock()
        self._logs: dict[str, BinaryIO] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self._listener.bind(str(self.paths.helper_socket))
        self._listener.listen(256)
        self._notified.bind(str(self._top / "notify"))
        fake = helpers.FakeHelper(self.world, records=_Forgetful())
        with contextlib.ExitStack() as logs:
            for service in ("daemon", "helper"):
                self._logs[service] = logs.enter_context((self._top / f"{service}.log").open("wb"))
            async with fake.serving(soak_control.world_socket(self._top)):
                try:
                    self._start_helper()
                    await self._start_daemon()
                    yield
                finally:
                    self._listener.close()
                    self._notified.close()
                    if self._daemon is not None:
                        self._daemon.kill()
                        await self._daemon.wait()
                    self._end_helper()

    def kill_helper(self) -> None:
        """At once; whoever asks meanwhile is answered by the next one, which the socket starts."""
        if self.may_kill:
            self._end_helper()
            self._start_helper()

    async def kill_daemon(self, number: signal.Signals) -> None:
        async with self._busy:
            assert self._daemon is not None
            self.up.clear()
            self.faults.struck[f"daemon {number.name}"] += 1
            self._daemon.send_signal(number)
            await self._daemon.wait()
            await self._start_daemon()

    async def order(self, service: str, order: Order) -> Held | None:
        reader, writer = await asyncio.open_unix_connection(
            str(soak_control.control_socket(self._top, service))
        )
        writer.write(msgspec.json.encode(order) + b"\n")
        answer = await reader.read()
        writer.close()
        return msgspec.json.decode(answer, type=Held | None)

    async def advance(self, seconds: float) -> None:
        self.ahead_s += seconds
        with contextlib.suppress(OSError, msgspec.MsgspecError):  # the next one is told at its start
            await self.order("daemon", Order(advance_s=seconds))

    async def strike(self, rate: float) -> None:
        self.faults.rate = rate
        await self.order("daemon", Order(fault_rate=rate))

    def log_of(self, service: str) -> str:
        """What it wrote to its standard error, over all its lives."""
        return (self._top / f"{service}.log").read_text(errors="replace")

    async def sample(self, lives: int) -> Sample:
        """The quietest of a few looks: what is done now and then, such as looking at rules, is no leak."""
        looks = []
        for _ in range(5):
            looks.append([await self.order(name, Order(measure=True)) for name in ("daemon", "helper")])
            await asyncio.sleep(0.05)
        daemons, helpers = zip(*looks, strict=True)
        daemon = min(filter(None, daemons), key=lambda held: held.tasks)
        helper = min(filter(None, helpers), key=lambda held: held.descriptors)
        return Sample(lives, self.ahead_s / 3600, self.daemon_starts, daemon, helper)

    def _start_helper(self) -> None:
        self._helper = subprocess.Popen(
            self._command("helper"),
            cwd=_TREE,
            stderr=self._logs["helper"],
            pass_fds=(self._listener.fileno(),),
        )

    def _end_helper(self) -> None:
        if self._helper is not None:
            self._helper.kill()
            self._helper.wait()

    async def _start_daemon(self) -> None:
        """A daemon that an injected fault keeps from starting is started again, as its unit says."""
        loop = asyncio.get_running_loop()
        while True:
            self.daemon_starts += 1
            self._daemon = await asyncio.create_subprocess_exec(
                *self._command("daemon"),
                cwd=_TREE,
                stderr=self._logs["daemon"],
                env={**os.environ, "NOTIFY_SOCKET": self._notified.getsockname()},
            )
            ended = asyncio.create_task(self._daemon.wait())
            ready = asyncio.create_task(self._is_ready(loop))
            async with asyncio.timeout(60):
                await asyncio.wait({ended, ready}, return_when=asyncio.FIRST_COMPLETED)
            for task in (ended, ready):
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            if self._daemon.returncode is None:
                break
            self.faults.struck["daemon did not start"] += 1
        self.up.set()

    async def _is_ready(self, loop: asyncio.AbstractEventLoop) -> None:
        """The one before says that it stops."""
        while await loop.sock_recv(self._notified, 64) != b"READY=1":
            pass

    def _command(self, service: str) -> tuple[str, ...]:
        start = Start(
            top=str(self._top),
            seed=self._seed + self.daemon_starts,
            fault_rate=self.faults.rate,
            ahead_s=self.ahead_s,
            listener=self._listener.fileno(),
        )
        return (sys.executable, "-m", f"tests.contract.soak_{service}", msgspec.json.encode(start).decode())


class _Forgetful(list[helpers.Record]):
    def append(self, _: helpers.Record, /) -> None:
        return


def furnished(top: Path) -> tuple[config.Paths, worlds.World]:
    """An empty host below a directory."""
    paths = conftest.laid_out(top)
    conftest.furnish(paths)
    helper = paths.helper_dir
    return paths, worlds.World(state=paths.state, jails=helper / "jails", logs=helper / "logs")
