# SPDX-License-Identifier: MIT
"""Every route over the real socket: answers, refusals, event streams, cancellation."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from banger.contract import errors, privileged, resources
from banger.owner import app, server
from tests.contract import api_served, conftest

Served = api_served.Served
Status = resources.OperationStatus


@pytest.fixture
async def served(daemon: conftest.Daemon) -> AsyncIterator[Served]:
    async with api_served.serving(daemon) as made:
        yield made


async def _begun(served: Served, name: str = "web", query: str = "") -> tuple[resources.Operation, str]:
    """An operation that waits for its guest's agent, and the path of its events."""
    served.daemon.world.behaviour.silent = True
    operation = await served.begin("POST", "/v1/vms", {"name": name})
    return operation, f"/v1/operations/{operation.id}/events{query}"


async def test_a_vm_from_create_to_delete(served: Served) -> None:
    created = await served.done("POST", "/v1/vms", {"name": "web", "memory_mib": 256})
    assert created.status is Status.SUCCEEDED, created.error
    assert (await served.get("/v1/vms/web", resources.Vm)).memory_mib == 256
    [listed] = await served.get("/v1/vms", list[resources.Vm])
    assert listed.state is resources.VmState.RUNNING
    for ref in (listed.id, listed.id[:4]):
        assert (await served.get(f"/v1/vms/{ref}", resources.Vm)).name == "web"
    stats = await served.get("/v1/vms/web/stats", resources.VmStats)
    assert (stats.name, stats.pid) == ("web", listed.pid)
    for verb, state in (
        ("restart", "running"),
        ("stop", "stopped"),
        ("start", "running"),
        ("kill", "stopped"),
    ):
        ended = await served.done("POST", f"/v1/vms/web/{verb}")
        assert ended.vm is not None, ended.error
        assert (ended.kind, ended.vm.state) == (f"vm.{verb}", state)
    answer = await served.http.patch("/v1/vms/web", json={"vcpus": 3, "name": "api"})
    assert msgspec.json.decode(answer.content, type=resources.Vm).vcpus == 3
    deleted = await served.done("DELETE", "/v1/vms/api")
    assert (deleted.status, deleted.vm) == (Status.SUCCEEDED, None)
    assert await served.get("/v1/vms", list[resources.Vm]) == []


async def test_images_kernels_and_the_daemon_itself(served: Served) -> None:
    await served.daemon.create(start=False)
    [image] = await served.get("/v1/images", list[resources.Image])
    assert (image.name, image.used_by) == ("tiny", ("web",))
    assert await served.get("/v1/images/tiny", resources.Image) == image
    [kernel] = await served.get("/v1/kernels", list[resources.Kernel])
    assert await served.get(f"/v1/kernels/{kernel.id}", resources.Kernel) == kernel
    offered = await served.get("/v1/kernels?available=true", list[resources.Kernel])
    assert any(entry.available for entry in offered)
    for path in ("/v1/images/tiny", "/v1/kernels/tiny"):
        assert "web" in (await served.error("DELETE", path, 409)).message
    await served.done("DELETE", "/v1/vms/web")
    for path in ("/v1/images/tiny", "/v1/kernels/tiny"):
        assert (await served.http.delete(path)).status_code == 204
        await served.error("GET", path, 404)
    info = await served.get("/v1/info", resources.DaemonInfo)
    assert (info.pid, info.api_version, info.helper_version) == (os.getpid(), 1, "fake")
    assert {file.name for file in await served.get("/v1/runtime", list[resources.RuntimeFile])} >= {"jailer"}


async def test_the_daemon_answers_without_its_helper(served: Served) -> None:
    async def gone(request: object) -> None:
        raise errors.UnavailableError("the root helper does not answer")

    served.daemon.world.before = gone
    assert (await served.get("/v1/info", resources.DaemonInfo)).helper_version == ""
    failed = await served.done("POST", "/v1/vms", {"name": "web"})
    assert failed.error is not None
    assert (failed.status, failed.error.code) == (Status.FAILED, "unavailable")


REFUSED = [
    ("POST", "/v1/vms", {"name": "web", "privileged": True}, 400),
    ("POST", "/v1/vms", {"name": "Web"}, 400),
    ("POST", "/v1/vms", {"name": "web\n"}, 400),
    ("POST", "/v1/vms", {"name": "../web"}, 400),
    ("POST", "/v1/vms", {"name": "web.vm"}, 400),
    ("POST", "/v1/vms", {"name": "w" * 64}, 400),
    ("PATCH", "/v1/vms/old", {"name": "web.vm"}, 400),
    ("PATCH", "/v1/vms/old", {"name": "-web"}, 400),
    ("POST", "/v1/vms", {"vcpus": 0}, 400),
    ("POST", "/v1/vms", {"vcpus": "two"}, 400),
    ("POST", "/v1/vms", [], 400),
    ("POST", "/v1/vms", None, 400),
    ("POST", "/v1/vms", {"image": "nothing"}, 404),
    ("POST", "/v1/vms", {"kernel": "nothing"}, 404),
    ("PATCH", "/v1/vms/old", {"id": "0123456789ab"}, 400),
    ("PATCH", "/v1/vms/old", {"kernel": "nothing"}, 404),
    ("GET", "/v1/vms/nothing", None, 404),
    ("DELETE", "/v1/vms/nothing", None, 404),
    ("POST", "/v1/vms/nothing/start", None, 404),
    ("POST", "/v1/vms/old/explode", None, 400),
    ("GET", "/v1/vms/old/stats", None, 409),
    ("GET", "/v1/vms/old/logs?source=../../etc/passwd", None, 400),
    ("GET", "/v1/vms/old/logs?tail=all", None, 400),
    ("GET", "/v1/images/..%2f..%2fetc", None, 404),
    ("GET", "/v1/operations/0123456789ab", None, 404),
    ("GET", "/v1/operations/0123456789ab/events", None, 404),
    ("DELETE", "/v1/operations/0123456789ab", None, 404),
    ("POST", "/v1/images/build", {"recipe": "nothing"}, 404),
    ("POST", "/v1/images/build", {}, 400),
    ("POST", "/v1/images/build", {"recipe": "busybox", "definition": "x"}, 400),
    ("POST", "/v1/images/build", {"definition": "name = 7"}, 400),
    ("POST", "/v1/images/build", {"definition": "x" * 300_000}, 400),
    ("POST", "/v1/kernels/pull", {"name": "nothing"}, 404),
    ("GET", "/v2/vms", None, 404),
    ("PUT", "/v1/vms", None, 400),
]


@pytest.mark.parametrize(("method", "path", "body", "status"), REFUSED)
async def test_a_wrong_request_is_refused_and_does_nothing(
    served: Served, method: str, path: str, body: object, status: int
) -> None:
    await served.daemon.create("old", start=False)
    before = await served.get("/v1/vms", list[resources.Vm])
    asked = len(served.daemon.world.requests)
    error = await served.error(method, path, status, body)
    assert error.message
    assert len(error.op_id) == 12
    assert app.STATUS[error.code] == status
    assert await served.get("/v1/vms", list[resources.Vm]) == before
    assert len(served.daemon.world.requests) == asked


async def test_a_taken_name_is_refused(served: Served) -> None:
    await served.daemon.create("web", start=False)
    assert (await served.error("POST", "/v1/vms", 409, {"name": "web"})).code == "already_exists"


async def test_a_refusal_is_logged_with_the_id_that_the_client_sees(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await served.error("GET", "/v1/vms/nothing", 404)
    [record] = [record for record in caplog.records if record.message == "request refused"]
    assert vars(record)["path"] == "/v1/vms/nothing"


async def test_a_body_over_the_limit_is_refused(served: Served) -> None:
    answer = await served.http.post("/v1/vms", json={"name": "x" * (2 << 20)})
    assert answer.status_code == 400, answer.text


async def test_malformed_json_is_refused(served: Served) -> None:
    for content in (b"{", b"\xff", b'{"name": "a"} more'):
        answer = await served.http.post(
            "/v1/vms", content=content, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400, answer.text


async def test_events_come_from_the_first_on_also_to_the_late(served: Served) -> None:
    operation = await served.begin("POST", "/v1/vms", {"name": "web"})
    live = await served.watch(operation.id)
    late = await served.watch(operation.id)
    assert live == late
    assert [event.seq for event in live] == list(range(len(live)))
    assert [event.kind for event in live if event.kind != "stage"] == ["end"]
    assert live[-1].result == await served.get(f"/v1/operations/{operation.id}", resources.Operation)
    assert operation.id in {
        each.id for each in await served.get("/v1/operations", list[resources.Operation])
    }


async def test_cancel_answers_when_everything_is_taken_back(served: Served) -> None:
    operation, _ = await _begun(served)
    answer = await served.http.delete(f"/v1/operations/{operation.id}")
    ended = msgspec.json.decode(answer.content, type=resources.Operation)
    assert (answer.status_code, ended.status) == (200, Status.CANCELLED)
    assert served.daemon.world.leftovers() == {}


async def test_a_watcher_that_leaves_cancels_only_when_it_said_so(served: Served) -> None:
    kept, path = await _begun(served, "kept")
    async with served.http.stream("GET", path) as answer:
        await anext(api_served.events(answer))
    bound, path = await _begun(served, "bound", "?cancel_on_disconnect=true")
    async with served.http.stream("GET", path) as answer:
        await anext(api_served.events(answer))
    async with asyncio.timeout(30):
        ended = await served.daemon.services.operations.wait(bound.id)
    assert ended.status is Status.CANCELLED
    served.daemon.world.behaviour.silent = False
    assert (await served.daemon.services.operations.wait(kept.id)).status is Status.SUCCEEDED


async def test_logs_are_shown_and_followed(served: Served) -> None:
    await served.daemon.create()
    vm = await served.get("/v1/vms/web", resources.Vm)
    log = served.daemon.paths.layout.logs / vm.id / "console.log"
    log.write_bytes(b"one\xff\n")
    answer = await served.http.get("/v1/vms/web/logs")
    assert (answer.status_code, answer.content) == (200, b"one\xff\n")
    assert answer.headers["content-type"].startswith("text/plain")
    assert (await served.http.get("/v1/vms/web/logs?source=vmm")).content == b""
    async with served.http.stream("GET", "/v1/vms/web/logs?follow=true") as stream:
        parts = stream.aiter_raw()
        assert await anext(parts) == b"one\xff\n"
        with log.open("ab") as file:
            file.write(b"two\n")
        assert await anext(parts) == b"two\n"
        # A console that grew past its bound starts anew.
        log.write_bytes(b"new")
        assert await anext(parts) == b"new"


@pytest.mark.parametrize(
    ("log", "lines", "shown"),
    [
        (b"one\ntwo\nthree\n", 2, b"two\nthree\n"),
        (b"one\ntwo\nthr", 2, b"two\nthr"),
        (b"one\n\n", 1, b"\n"),
        (b"one\ntwo\n", 2, b"one\ntwo\n"),
        (b"one\n", 9, b"one\n"),
        (b"one\n", 0, b""),
        (b"", 3, b""),
        (None, 3, b""),
        (b"1\n" + b"x" * (1 << 17) + b"\n2\n", 2, b"x" * (1 << 17) + b"\n2\n"),
    ],
)
async def test_a_log_is_shown_from_its_last_lines_on(
    served: Served, log: bytes | None, lines: int, shown: bytes
) -> None:
    await served.daemon.create()
    vm = await served.get("/v1/vms/web", resources.Vm)
    path = served.daemon.paths.layout.logs / vm.id / "console.log"
    path.unlink(missing_ok=True)
    if log is not None:
        path.write_bytes(log)
    assert (await served.http.get(f"/v1/vms/web/logs?tail={lines}")).content == shown
    path.write_bytes(log or b"")
    async with served.http.stream("GET", f"/v1/vms/web/logs?follow=true&tail={lines}") as stream:
        parts = stream.aiter_raw()
        seen = b""
        while len(seen) < len(shown):
            seen += await anext(parts)
        assert seen == shown
        with path.open("ab") as file:
            file.write(b"more\n")
        assert await anext(parts) == b"more\n"


@pytest.mark.parametrize("has_run", [True, False])
async def test_a_log_that_is_followed_ends_with_its_vm(served: Served, has_run: bool) -> None:
    """Whoever waits for more of it would wait for ever."""
    await served.daemon.create(start=has_run)
    vm = await served.get("/v1/vms/web", resources.Vm)
    log = served.daemon.paths.layout.logs / vm.id / "console.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"one\n")
    async with served.http.stream("GET", "/v1/vms/web/logs?follow=true") as stream:
        parts = stream.aiter_raw()
        assert await anext(parts) == b"one\n"
        await served.done("DELETE", "/v1/vms/web")
        async with asyncio.timeout(30):
            assert [part async for part in parts] == []


async def test_a_log_that_is_followed_holds_up_no_daemon_that_stops(
    daemon: conftest.Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    """It was cut off after the time that others have to end, and the journal had a traceback of it."""
    created = (await daemon.create()).vm
    assert created is not None
    (daemon.paths.layout.logs / created.id / "console.log").write_bytes(b"one\n")
    async with (
        api_served.serving(daemon) as served,
        served.http.stream("GET", "/v1/vms/web/logs?follow=true") as stream,
    ):
        parts = stream.aiter_raw()
        assert await anext(parts) == b"one\n"
        served.stop.set()
        assert [part async for part in parts] == []
    assert [each.getMessage() for each in caplog.records if each.name == "uvicorn.error"] == []


async def test_stopping_ends_watchers_with_what_became_of_their_operation(daemon: conftest.Daemon) -> None:
    async with api_served.serving(daemon) as served:
        _, path = await _begun(served)
        async with served.http.stream("GET", path) as answer:
            seen = api_served.events(answer)
            first = await anext(seen)
            served.stop.set()
            rest = [event async for event in seen]
    assert first.kind == "stage"
    assert rest[-1].result is not None
    assert rest[-1].result.status is Status.CANCELLED
    assert daemon.world.leftovers() == {}


async def test_the_socket_is_the_owners_alone(served: Served) -> None:
    mode = served.path.stat().st_mode
    assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode)) == (True, 0o600)


def test_the_socket_is_the_owners_alone_from_its_first_instant_on(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is done to it afterwards comes too late for who was waiting."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("it was open to others until then")

    for change in ("chmod", "fchmod"):
        monkeypatch.setattr(os, change, refuse)
    before = os.umask(0)
    try:
        with server.listening(short_path / "run" / "bangerd.sock"):
            modes = [stat.S_IMODE(path.stat().st_mode) for path in (short_path / "run").rglob("*")]
            assert (modes, stat.S_IMODE((short_path / "run").stat().st_mode)) == ([0o600], 0o700)
    finally:
        os.umask(before)


_STRANGER = """
import socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
s.sendall(sys.argv[2].encode().decode("unicode_escape").encode())
s.settimeout(30); print(b"".join(iter(lambda: s.recv(4096), b"")).decode())
"""


def _ask_as_stranger(path: str, request: str) -> str:
    command = ["/usr/bin/python3", "-I", "-c", _STRANGER, path, request]
    done = subprocess.run(command, user=65534, group=65534, extra_groups=[], capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
async def test_another_uid_is_refused(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    await served.daemon.create(start=False)
    request = r"DELETE /v1/vms/web HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert "PermissionError" in await asyncio.to_thread(_ask_as_stranger, str(served.path), request)
    # Should the mode of the socket or its directory ever be wrong, the daemon still knows who asks.
    for path in (served.path, *served.path.parents[:2]):
        path.chmod(0o777)
    answer = await asyncio.to_thread(_ask_as_stranger, str(served.path), request)
    assert answer.startswith("HTTP/1.1 403"), answer
    assert '"code":"unauthorized"' in answer
    upgrade = (
        r"GET /v1/vms/web/exec HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        r"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    answer = await asyncio.to_thread(_ask_as_stranger, str(served.path), upgrade)
    assert answer.startswith("HTTP/1.1 403"), answer
    assert [vm.name for vm in await served.get("/v1/vms", list[resources.Vm])] == ["web"]
    assert sum(record.message == "peer refused" for record in caplog.records) == 2


async def test_a_hundred_clients_at_once(served: Served) -> None:
    await served.daemon.create(start=False)

    async def ask(_: int) -> int:
        transport = httpx.AsyncHTTPTransport(uds=str(served.path))
        async with httpx.AsyncClient(transport=transport, base_url="http://banger", timeout=20) as client:
            return (await client.get("/v1/vms/web")).status_code

    assert set(await asyncio.gather(*map(ask, range(100)))) == {200}


async def test_the_document_is_served(served: Served) -> None:
    answer = await served.http.get("/v1/openapi.json")
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.json()["openapi"].startswith("3.1")


async def test_what_the_helper_is_asked_carries_the_operations_id(served: Served) -> None:
    from banger.owner import operations

    seen = set()

    async def note(request: privileged.Request[Any]) -> None:
        seen.add(operations.current_op_id.get())

    served.daemon.world.before = note
    operation = await served.done("POST", "/v1/vms", {"name": "web"})
    assert seen == {operation.id}
