# SPDX-License-Identifier: MIT
"""One VM's life in the soak, as its client sees it: chosen by dice, and never left before its VM is gone."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections import Counter
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
from websockets import exceptions
from websockets.asyncio import client as websockets

from banger.contract import errors, resources
from tests.contract import api_served, soak

T = TypeVar("T")
STUCK_S = 120.0
_PAUSE_S = 0.1
_RUNNING = resources.VmState.RUNNING
_FAULT = "this is a fault in banger"


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes

    def events(self) -> list[resources.Event]:
        lines = (line.removeprefix(b"data: ") for line in self.body.splitlines() if line)
        return [msgspec.json.decode(line, type=resources.Event) for line in lines]


@dataclass(slots=True)
class Client:
    """Asks the daemon, whichever lives. None is the answer of one that died meanwhile."""

    services: soak.Services
    done: Counter[str] = field(default_factory=Counter)
    faults: list[errors.ErrorBody] = field(default_factory=list)

    async def ask(self, method: str, path: str, body: object = None) -> Answer | None:
        """One connection for one request: the client is to cost little beside the daemon."""
        await self.services.up.wait()
        content = b"" if body is None else msgspec.json.encode(body)
        head = f"{method} {path} HTTP/1.1\r\nHost: banger\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        try:
            reader, writer = await asyncio.open_unix_connection(str(self.services.paths.socket))
            try:
                writer.write(head.encode() + content)
                return _answer(await reader.read())
            finally:
                writer.close()
        except OSError:
            await asyncio.sleep(_PAUSE_S)
            return None

    async def vm(self, name: str) -> resources.Vm | None:
        """None when there is none."""
        while True:
            answer = await self.ask("GET", f"/v1/vms/{name}")
            if answer is not None and answer.status == 404:
                return None
            if answer is not None and answer.status == 200:
                return msgspec.json.decode(answer.body, type=resources.Vm)
            if answer is not None:
                self._judge(msgspec.json.decode(answer.body, type=errors.ErrorBody))

    async def begin(self, method: str, path: str, body: object = None) -> str:
        """The operation's id; nothing when it was refused."""
        answer = await self.ask(method, path, body)
        if answer is None:
            return ""
        if answer.status == 202:
            return msgspec.json.decode(answer.body, type=resources.Operation).id
        self._judge(msgspec.json.decode(answer.body, type=errors.ErrorBody))
        return ""

    async def do(self, act: str, method: str, path: str, body: object = None) -> bool:
        """Whether it succeeded, as far as one knows."""
        operation_id = await self.begin(method, path, body)
        ended = await self.ended(operation_id) if operation_id else None
        succeeded = ended is not None and ended.status is resources.OperationStatus.SUCCEEDED
        self.done[act if succeeded else f"{act} failed"] += 1
        return succeeded

    async def ended(self, operation_id: str) -> resources.Operation | None:
        answer = await self.ask("GET", f"/v1/operations/{operation_id}/events")
        events = answer.events() if answer is not None and answer.status == 200 else []
        if not events or events[-1].result is None:
            return None
        if events[-1].result.error is not None:
            self._judge(events[-1].result.error)
        return events[-1].result

    def _judge(self, error: errors.ErrorBody) -> None:
        """A failure has a name and a message of ours, never an exception's."""
        if not error.code or not error.message or _FAULT in error.hint:
            self.faults.append(error)
        self.done[f"error {error.code}"] += 1

    async def exec(self, name: str, status: int) -> None:
        path = str(self.services.paths.socket)
        await self.services.up.wait()
        try:
            async with websockets.unix_connect(
                path, f"ws://banger/v1/vms/{name}/exec", compression=None, ping_interval=None
            ) as link:
                await link.send(json.dumps({"argv": ["exit", str(status)]}))
                end = await api_served.last_word(link, resources.ExecEnd)
        except (OSError, exceptions.WebSocketException, AssertionError):
            self.done["exec lost"] += 1
            return
        if end.error is not None:
            self._judge(end.error)
            return
        assert end.exit_status == status, end
        self.done["exec"] += 1


def _answer(data: bytes) -> Answer | None:
    """None for one that was cut off."""
    head, parted, body = data.partition(b"\r\n\r\n")
    if not parted:
        return None
    status = int(head.split(b" ", 2)[1])
    if b"transfer-encoding: chunked" not in head.lower():
        return Answer(status, body)
    whole = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        if not size:
            return None
        count = int(size, 16)
        if count == 0:
            return Answer(status, whole)
        whole, body = whole + body[:count], body[count + 2 :]


@dataclass(slots=True)
class Life:
    """From before its VM is there to after it is gone."""

    client: Client
    number: int
    dice: random.Random

    @property
    def name(self) -> str:
        return f"life-{self.number}"

    async def live(self) -> None:
        if self.client.services.may_kill and self.dice.random() < soak.FAULT_RATE:
            await self.client.services.kill_daemon(self.dice.choice([signal.SIGKILL, signal.SIGTERM]))
        await self._born()
        acts = (self._exec, self._stop, self._start, self._restart, self._kill, self._look, self._die)
        for _ in range(self.dice.randint(1, 3)):
            await self.dice.choice(acts)()
        await self._gone()

    async def _born(self) -> None:
        body: dict[str, object] = {"name": self.name, "nat": self.dice.random() < 0.2}
        timed = self.dice.random()
        if timed < 0.05:
            body["ttl_s"] = self.dice.randint(20, 60)
        elif timed < 0.1:
            body["idle_stop_s"] = self.dice.randint(20, 60)
        body["remove_on_failure"] = self.dice.random() < 0.1
        if self.dice.random() < soak.FAULT_RATE:
            await self._cancelled("POST", "/v1/vms", body)
            return
        if await self.client.do("create", "POST", "/v1/vms", body) and timed < 0.1:
            await self._out_of_time()

    async def _out_of_time(self) -> None:
        """The daemon stops it by itself; a fault may have ended it before."""
        while (vm := await self.client.vm(self.name)) is not None and vm.state is _RUNNING:
            await self.client.services.advance(15)
            await asyncio.sleep(_PAUSE_S)  # so that others get on; time here is simulated
        if vm is not None and vm.stopped_because:
            self.client.done["stopped by time"] += 1

    async def _cancelled(self, method: str, path: str, body: object = None) -> None:
        """Begins it, and gives it up at a moment of the dice's choice."""
        operation_id = await self.client.begin(method, path, body)
        if operation_id:
            await asyncio.sleep(self.dice.uniform(0, 0.05))
            await self.client.ask("DELETE", f"/v1/operations/{operation_id}")
            await self.client.ended(operation_id)
            self.client.done["cancelled"] += 1

    async def _turn(self, act: str) -> None:
        path = f"/v1/vms/{self.name}/{act}"
        if self.dice.random() < soak.FAULT_RATE:
            await self._cancelled("POST", path)
        else:
            await self.client.do(act, "POST", path)

    async def _stop(self) -> None:
        await self._turn("stop")

    async def _start(self) -> None:
        await self._turn("start")

    async def _restart(self) -> None:
        await self._turn("restart")

    async def _kill(self) -> None:
        await self._turn("kill")

    async def _exec(self) -> None:
        await self.client.exec(self.name, self.dice.randint(0, 127))

    async def _look(self) -> None:
        paths = ("/v1/vms", f"/v1/vms/{self.name}/stats", "/v1/operations", "/v1/inventory")
        await self.client.ask("GET", self.dice.choice(paths))

    async def _die(self) -> None:
        """The VMM ends by itself, and the daemon says so."""
        vm = await self.client.vm(self.name)
        if vm is None or vm.state is not _RUNNING:
            return
        await self.client.services.faults.kill_vmm(vm.id)
        while (now := await self.client.vm(self.name)) is not None and now.boot_id == vm.boot_id:
            if now.state is not _RUNNING:
                break
            await asyncio.sleep(_PAUSE_S)  # the daemon notices by itself; nothing tells us that it has
        self.client.done["died"] += 1

    async def _gone(self) -> None:
        while await self.client.vm(self.name) is not None:
            await self.client.do("delete", "DELETE", f"/v1/vms/{self.name}")
