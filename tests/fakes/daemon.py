# SPDX-License-Identifier: MIT
"""A fake daemon on a real unix socket: the routes of the API over VMs that are only rows.

A command "in a guest" is a real process of this machine (tests/fakes/command.py). Served by the same HTTP
server as the real daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import os
import socket
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib import parse

import msgspec
import uvicorn

from banger.contract import errors, inventory, names, requests, resources
from tests.fakes import command

Scope = dict[str, Any]
Receive = command.Receive
Send = command.Send

STATUS: Final = {
    "bad_request": 400,
    "unauthorized": 403,
    "not_found": 404,
    "already_exists": 409,
    "conflict": 409,
    "not_running": 409,
    "cancelled": 409,
    "unavailable": 503,
    "timed_out": 504,
    "no_space": 507,
}
STAGES: Final = ("preflight", "prepare_rootfs", "boot_firecracker", "wait_vsock_agent", "finalize")
VERBS: Final = {"start": "running", "restart": "running", "stop": "stopped", "kill": "stopped"}


@dataclasses.dataclass
class Running:
    """An operation, its events so far, and who wants to hear of more."""

    operation: resources.Operation
    changed: asyncio.Condition
    events: list[resources.Event] = dataclasses.field(default_factory=list)
    task: asyncio.Task[None] | None = None


@dataclasses.dataclass
class Behaviour:
    """What a test may ask for."""

    fail: errors.ErrorBody | None = None
    """Every operation ends with this."""
    stay_in_stage: str = ""
    """Operations reach this stage and stay there until cancelled."""
    logs: bytes = b""
    detail: str = ""
    image_run: resources.ImageRun = dataclasses.field(default_factory=resources.ImageRun)
    image_has_shell: bool = True


class FakeDaemon:
    """Serves in a thread of its own between `start` and `stop`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.behaviour = Behaviour()
        self.vms: dict[str, resources.Vm] = {}
        self.images: dict[str, resources.Image] = {}
        self.kernels: dict[str, resources.Kernel] = {}
        self.inventory = inventory.Inventory(())
        self.dns: resources.DnsStatus | None = None
        self.operations: dict[str, Running] = {}
        self.asked: list[tuple[str, str, Any]] = []
        self.execs: list[resources.ExecRequest] = []
        self.hung_up = threading.Event()
        """A client left an event stream that was bound to its life."""
        self.reached = threading.Event()
        """An operation is in the stage it was asked to stay in."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        config = uvicorn.Config(
            self._app, lifespan="off", log_level="critical", interface="asgi3", ws_per_message_deflate=False
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def start(self) -> None:
        self._socket.bind(str(self.path))
        self._socket.listen(64)
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def add_vm(self, name: str, state: str = "running", **fields: Any) -> resources.Vm:
        values: dict[str, Any] = {
            "id": names.new_id(),
            "name": name,
            "state": resources.VmState(state),
            "image": "debian-bookworm",
            "image_id": names.new_id(),
            "kernel": "generic-6.12",
            "kernel_id": names.new_id(),
            "vcpus": 1,
            "memory_mib": 512,
            "disk_size_mib": 2048,
            "network": True,
            "address": "172.31.240.2",
            "created_at": _now(),
            "started_at": _now() if state == "running" else None,
        }
        vm = resources.Vm(**(values | fields))
        self.vms[vm.id] = vm
        return vm

    def vm_named(self, name: str) -> resources.Vm | None:
        return next((vm for vm in self.vms.values() if vm.name == name), None)

    # --- the server ---

    def _serve(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix("/v1/")
        parts = [parse.unquote(part) for part in path.split("/")]
        if scope["type"] == "websocket":
            await self._exec(parts[1], receive, send)
            return
        query = dict(parse.parse_qsl(scope["query_string"].decode()))
        body = await _read(receive)
        method = scope["method"]
        self.asked.append((method, scope["path"], msgspec.json.decode(body) if body else None))
        try:
            if method == "GET" and parts[0] == "operations" and parts[-1] == "events":
                await self._events(parts[1], query, receive, send)
            elif method == "GET" and parts[0] == "vms" and parts[-1] == "logs":
                await _answer(send, 200, self.behaviour.logs, b"text/plain")
            elif method == "GET" and parts == ["images"] and query.get("ref"):
                found = [image for image in self.images.values() if query["ref"] in (image.id, image.name)]
                await _answer(send, 200, msgspec.json.encode(found))
            else:
                status, value = await self._route(method, parts, body)
                await _answer(send, status, msgspec.json.encode(value))
        except errors.BangerError as error:
            reply = msgspec.json.encode(errors.to_body(error, op_id="0123456789ab"))
            await _answer(send, STATUS.get(error.code, 500), reply)
        except msgspec.ValidationError as error:
            reply = msgspec.json.encode(errors.ErrorBody(code="bad_request", message=str(error)))
            await _answer(send, 400, reply)

    async def _route(self, method: str, parts: list[str], body: bytes) -> tuple[int, Any]:
        match method, parts:
            case "GET", ["info"]:
                return 200, resources.DaemonInfo(
                    version="0.1.0",
                    api_version=1,
                    pid=os.getpid(),
                    started_at=_now(),
                    helper_version="0.1.0",
                    dns=self.dns,
                )
            case "GET", ["inventory"]:
                return 200, self.inventory
            case "POST", ["inventory", "collect"]:
                return 202, self._begin("host.collect", "this host", ("delete",), self._collect)
            case "GET", ["operations"]:
                return 200, [running.operation for running in self.operations.values()]
            case "GET", ["operations", ref]:
                return 200, self._running(ref).operation
            case "DELETE", ["operations", ref]:
                return 200, await self._cancel(self._running(ref))
            case _, ["vms", *rest]:
                return self._route_vms(method, rest, body)
            case _, [("images" | "kernels" | "runtime"), *_]:
                return self._route_artefacts(method, parts, body)
        raise errors.NotFoundError(f"no route {method} {parts}")

    def _route_vms(self, method: str, rest: list[str], body: bytes) -> tuple[int, Any]:
        match method, rest:
            case "GET", []:
                return 200, list(self.vms.values())
            case "POST", []:
                return 202, self._create(msgspec.json.decode(body, type=resources.CreateVm))
            case "GET", [ref]:
                return 200, self._find(ref)
            case "PATCH", [ref]:
                return 200, self._set(ref, msgspec.json.decode(body, type=resources.SetVm))
            case "DELETE", [ref]:
                return 202, self._delete(self._find(ref))
            case "GET", [ref, "stats"]:
                return 200, self._stats(self._find(ref))
            case "POST", [ref, verb] if verb in VERBS:
                vm = self._find(ref)
                return 202, self._begin(
                    f"vm.{verb}", vm.name, (verb,), lambda: self._turn(vm.id, VERBS[verb])
                )
        raise errors.NotFoundError(f"no route {method} {rest}")

    def _route_artefacts(self, method: str, parts: list[str], body: bytes) -> tuple[int, Any]:
        held: dict[str, Any] = self.images if parts[0] == "images" else self.kernels
        match method, parts:
            case "GET", ["runtime"]:
                path = "/var/lib/banger-root/runtime/firecracker"
                return 200, [resources.RuntimeFile(name="firecracker", path=path, present=False)]
            case "POST", ["runtime", "pull"]:
                return 202, self._begin("runtime.pull", "runtime", ("pull_runtime",), dict)
            case "GET", [_]:
                return 200, list(held.values())
            case "GET", [_, name] if name in held:
                return 200, held[name]
            case "DELETE", [_, ref] if any(ref in (name, each.id) for name, each in held.items()):
                name = next(name for name, each in held.items() if ref in (name, each.id))
                if held[name].used_by:
                    raise errors.ConflictError(f"{name} is used by {held[name].used_by[0]}")
                del held[name]
                return 200, None
            case "GET", ["images", ref]:
                return 200, self._image(ref)
            case "POST", ["images", "pull"]:
                asked = msgspec.json.decode(body, type=requests.PullImage)
                return 202, self._make(asked.name or asked.reference, "image", "pull_image")
            case "POST", ["images", "import"]:
                found = msgspec.json.decode(body, type=requests.ImportImage)
                return 202, self._make(found.name, "image", "import_image")
            case "POST", ["images", "cache", "prune"]:
                pruning = msgspec.json.decode(body, type=requests.PruneCache)
                blobs = ("sha256:" + "ab" * 32,)
                packages = ("mine-0123.tar",)
                return 200, requests.PrunedCache(
                    blobs=blobs, packages=packages, size_bytes=1 << 20, dry_run=pruning.dry_run
                )
            case "POST", ["images", ref, "promote"]:
                self._image(ref)
                promoted = msgspec.json.decode(body, type=requests.PromoteImage)
                return 202, self._make(promoted.name, "image", "build_image")
            case "POST", ["images", "build"]:
                recipe = msgspec.json.decode(body, type=requests.BuildImage)
                own = tomllib.loads(recipe.definition or "").get("name", "")
                return 202, self._make(recipe.name or recipe.recipe or own, "image", "build_image")
            case "POST", ["images", "register"]:
                registered = msgspec.json.decode(body, type=requests.RegisterImage)
                return 202, self._make(registered.name or "registered", "image", "build_image")
            case "POST", ["kernels", "pull"]:
                pulled = msgspec.json.decode(body, type=requests.PullKernel)
                return 202, self._make(pulled.name, "kernel", "pull_kernel")
            case "POST", ["kernels", "import"]:
                imported = msgspec.json.decode(body, type=requests.ImportKernel)
                return 202, self._make(imported.name, "kernel", "pull_kernel")
        raise errors.NotFoundError(f"no such thing: {'/'.join(parts)}")

    def _filled_in(self, request: resources.ExecRequest) -> resources.ExecRequest:
        run = self.behaviour.image_run
        return msgspec.structs.replace(request, argv=request.argv or run.entrypoint + run.command)

    def _image(self, ref: str) -> resources.Image:
        """Also by the id that a VM says, as every VM is made of something."""
        for image in self.images.values():
            if ref in (image.id, image.name):
                return image
        for vm in self.vms.values():
            if ref == vm.image_id:
                run = self.behaviour.image_run
                return resources.Image(
                    id=ref,
                    name=vm.image,
                    arch="x86_64",
                    size_bytes=0,
                    source="tests",
                    run=run,
                    has_shell=self.behaviour.image_has_shell,
                )
        raise errors.NotFoundError(f"there is no image {ref!r}")

    # --- what the operations do ---

    def _find(self, ref: str) -> resources.Vm:
        for vm in self.vms.values():
            if ref in {vm.name, vm.id}:
                return vm
        raise errors.NotFoundError(f"there is no VM {ref!r}", hint="`banger vm list` shows those that are")

    def _create(self, asked: resources.CreateVm) -> resources.Operation:
        name = asked.name or "calm-otter"
        if self.vm_named(name):
            raise errors.AlreadyExistsError(f"a VM named {name!r} exists")
        vm = self.add_vm(name, "created", memory_mib=asked.memory_mib or 512, vcpus=asked.vcpus or 1)

        def ended(failed: bool) -> None:
            if failed and asked.remove_on_failure:
                self.vms.pop(vm.id, None)
            elif failed:
                self._turn(vm.id, "error")

        finish = (lambda: self._turn(vm.id, "running")) if asked.start else (lambda: {"vm": vm})
        return self._begin("vm.create", name, STAGES, finish, ended)

    def _collect(self) -> dict[str, Any]:
        kept = (each for each in self.inventory.things if each.owner or each.foreign)
        self.inventory = inventory.Inventory(tuple(kept))
        return {}

    def _set(self, ref: str, asked: resources.SetVm) -> resources.Vm:
        vm = self._find(ref)
        if vm.state is resources.VmState.RUNNING:
            raise errors.ConflictError(f"{vm.name} is running", hint="stop it first")
        changes = {
            field: value for field, value in msgspec.structs.asdict(asked).items() if value is not None
        }
        self.vms[vm.id] = msgspec.structs.replace(vm, **changes)
        return self.vms[vm.id]

    def _delete(self, vm: resources.Vm) -> resources.Operation:
        return self._begin("vm.delete", vm.name, ("delete",), lambda: self.vms.pop(vm.id, None) and {})

    def _turn(self, vm_id: str, state: str) -> dict[str, Any]:
        changed = msgspec.structs.replace(self.vms[vm_id], state=resources.VmState(state), started_at=_now())
        self.vms[vm_id] = changed
        return {"vm": changed}

    def _make(self, name: str, kind: str, stage: str) -> resources.Operation:
        common: dict[str, Any] = {
            "id": names.new_id(),
            "name": name,
            "arch": "x86_64",
            "size_bytes": 40 << 20,
        }
        common |= {"source": "fake", "created_at": _now()}

        def finish() -> dict[str, Any]:
            if kind == "image":
                self.images[name] = resources.Image(**common)
                return {"image": self.images[name]}
            self.kernels[name] = resources.Kernel(**common, kind="direct", version="6.12")
            return {"kernel": self.kernels[name]}

        return self._begin(f"{kind}.make", name, (stage,), finish)

    def _stats(self, vm: resources.Vm) -> resources.VmStats:
        counters = {
            field: 1 << 20
            for field in resources.VmStats.__struct_fields__
            if field not in {"id", "name", "pid", "uptime_ms", "host_free_bytes"}
        }
        return resources.VmStats(
            id=vm.id, name=vm.name, pid=1, uptime_ms=1000, host_free_bytes=1 << 40, **counters
        )

    # --- operations ---

    def _running(self, ref: str) -> Running:
        if ref not in self.operations:
            raise errors.NotFoundError(f"there is no operation {ref}")
        return self.operations[ref]

    def _begin(
        self,
        kind: str,
        target: str,
        stages: tuple[str, ...],
        finish: Callable[[], Any],
        ended: Callable[[bool], None] = lambda failed: None,
    ) -> resources.Operation:
        operation = resources.Operation(
            id=names.new_id(),
            kind=kind,
            target=target,
            status=resources.OperationStatus.RUNNING,
            created_at=_now(),
        )
        running = Running(operation, asyncio.Condition())
        self.operations[operation.id] = running
        running.task = asyncio.ensure_future(self._work(running, stages, finish, ended))
        return operation

    async def _work(
        self,
        running: Running,
        stages: tuple[str, ...],
        finish: Callable[[], Any],
        ended: Callable[[bool], None],
    ) -> None:
        changes: dict[str, Any] = {"status": resources.OperationStatus.FAILED}
        try:
            for stage in stages:
                await self._tell(running, kind="stage", stage=stage, detail=self.behaviour.detail)
                if stage == self.behaviour.stay_in_stage:
                    self.reached.set()
                    await asyncio.Event().wait()
            if self.behaviour.fail is not None:
                changes["error"] = self.behaviour.fail
            else:
                changes = {"status": resources.OperationStatus.SUCCEEDED, **(finish() or {})}
        except asyncio.CancelledError:
            changes["status"] = resources.OperationStatus.CANCELLED
        finally:
            ended(changes["status"] is not resources.OperationStatus.SUCCEEDED)
            running.operation = msgspec.structs.replace(running.operation, ended_at=_now(), **changes)
            await self._tell(running, kind="end", result=running.operation)

    async def _tell(self, running: Running, **fields: Any) -> None:
        seq = len(running.events)
        fields.setdefault("elapsed_ms", 10.0 * seq)
        event = resources.Event(operation=running.operation.id, seq=seq, time=_now(), **fields)
        async with running.changed:
            running.events.append(event)
            running.changed.notify_all()

    async def _cancel(self, running: Running) -> resources.Operation:
        if running.task is not None:
            running.task.cancel()
            await asyncio.wait([running.task])
        return running.operation

    async def _events(self, ref: str, query: dict[str, str], receive: Receive, send: Send) -> None:
        running = self._running(ref)
        start = {"type": "http.response.start", "status": 200}
        await send({**start, "headers": [(b"content-type", b"text/event-stream")]})
        gone = asyncio.ensure_future(receive())
        seen = 0
        while True:
            while seen < len(running.events):
                event = running.events[seen]
                seen += 1
                data = b"event: operation\nid: 1\ndata: " + msgspec.json.encode(event) + b"\n\n"
                await send({"type": "http.response.body", "body": data, "more_body": True})
                if event.kind == "end":
                    gone.cancel()
                    await send({"type": "http.response.body", "body": b""})
                    return
            changed = asyncio.ensure_future(self._wait(running, seen))
            await asyncio.wait([gone, changed], return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                changed.cancel()
                if query.get("cancel_on_disconnect") == "true":
                    await self._cancel(running)
                    self.hung_up.set()
                return

    async def _wait(self, running: Running, seen: int) -> None:
        async with running.changed:
            await running.changed.wait_for(lambda: len(running.events) > seen)

    # --- exec ---

    async def _exec(self, ref: str, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        message = await receive()
        request = msgspec.json.decode(message["text"], type=resources.ExecRequest)
        self.execs.append(request)
        try:
            vm = self._find(ref)
            if vm.state is not resources.VmState.RUNNING:
                raise errors.NotRunningError(
                    f"{vm.name} is not running", hint=f"`banger vm start {vm.name}`"
                )
            try:
                end = await command.run(self._filled_in(request), receive, send)
            finally:
                if request.remove:
                    self._delete(vm)
        except errors.BangerError as error:
            end = resources.ExecEnd(error=errors.to_body(error, op_id="0123456789ab"))
        with contextlib.suppress(Exception):
            await send({"type": "websocket.send", "text": msgspec.json.encode(end).decode()})
            await send({"type": "websocket.close", "code": 1000})


async def _read(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)


async def _answer(send: Send, status: int, body: bytes, kind: bytes = b"application/json") -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    await send({"type": "http.response.body", "body": body})


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
