# SPDX-License-Identifier: MIT
"""bangerd as a program, killed at any instant: VMs run on, nothing leaks, and nobody's VM is forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import pytest
from websockets.asyncio import client as websockets

from banger.contract import resources
from banger.owner import config

_TREE = Path(__file__).parents[2]
_CONFIG = 'image = "tiny"\ndns_listen = ""\nmemory_mib = 128\ndisk_size_mib = 16\npower_off_deadline_s = 1\n'
_KILLS = 6


@dataclass(slots=True)
class Programs:
    """A fake helper that stays, with the VMMs, and a daemon that can be killed and started again."""

    paths: config.Paths
    helper: asyncio.subprocess.Process
    daemon: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Returns when it says that it is ready. Connecting would prove nothing: a program that the last one
        had just forked may hold its socket open for a moment longer."""
        where = self.paths
        with _notified(where.run.with_name("notify")) as ready:
            self.daemon = await _program(
                "banger.owner.main",
                *("--install", str(where.install), "--config", str(where.install.with_name("config.toml"))),
                *("--state-dir", str(where.state), "--cache-dir", str(where.cache)),
                *("--run-dir", str(where.run), "--helper-socket", str(where.helper_socket)),
                *("--log-level", "error"),
                NOTIFY_SOCKET=ready.getsockname(),
            )
            async with asyncio.timeout(20):
                assert await asyncio.get_running_loop().sock_recv(ready, 64) == b"READY=1"

    async def end(self, number: signal.Signals) -> None:
        if self.daemon is not None:
            self.daemon.send_signal(number)
            await self.daemon.wait()
            self.daemon = None

    async def leftovers(self) -> int:
        """Ends the helper, which says of how many VMs something is left."""
        self.helper.send_signal(signal.SIGTERM)
        return await self.helper.wait()

    @contextlib.asynccontextmanager
    async def http(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.AsyncHTTPTransport(uds=str(self.paths.socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://banger", timeout=20) as client:
            yield client

    async def begin(self, method: str, path: str, body: object = None) -> resources.Operation:
        async with self.http() as client:
            answer = await client.request(method, path, json=body)
        assert answer.status_code == 202, answer.text
        return msgspec.json.decode(answer.content, type=resources.Operation)

    async def done(self, method: str, path: str, body: object = None) -> resources.Operation:
        operation = await self.begin(method, path, body)
        async with self.http() as client:
            events = (await client.get(f"/v1/operations/{operation.id}/events")).text.strip().splitlines()
        end = msgspec.json.decode(events[-1].removeprefix("data: "), type=resources.Event)
        assert end.result is not None
        return end.result

    async def vms(self) -> list[resources.Vm]:
        async with self.http() as client:
            return msgspec.json.decode((await client.get("/v1/vms")).content, type=list[resources.Vm])


@contextlib.contextmanager
def _notified(path: Path) -> Iterator[socket.socket]:
    """Where a service says that it is ready, as systemd would listen."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as made:
        made.bind(str(path))
        try:
            yield made
        finally:
            path.unlink()


async def _program(module: str, *arguments: str, **extra: str) -> asyncio.subprocess.Process:
    environment = {**os.environ, "PYTHONPATH": str(_TREE), **extra}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, cwd=_TREE, env=environment
    )


async def _answers(path: Path) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                _, writer = await asyncio.open_unix_connection(str(path))
            except OSError:
                await asyncio.sleep(0.01)  # a program's socket appears; nothing announces it
            else:
                writer.close()
                return


@pytest.fixture
async def programs(paths: config.Paths) -> AsyncIterator[Programs]:
    """Both run; the daemon has started for the first time."""
    owner = {"owner_uid": os.getuid(), "helper_dir": str(paths.helper_dir)}
    paths.install.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in owner.items()))
    paths.install.with_name("config.toml").write_text(_CONFIG)
    helper = await _program(
        "tests.fakes.helper",
        *("--socket", str(paths.helper_socket), "--state", str(paths.state)),
        *("--helper-dir", str(paths.helper_dir)),
    )
    await _answers(paths.helper_socket)
    made = Programs(paths, helper)
    await made.start()
    yield made
    await made.end(signal.SIGKILL)
    if helper.returncode is None:
        helper.kill()
        await helper.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_vm_outlives_its_daemon(programs: Programs, number: signal.Signals) -> None:
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
    programs: Programs, number: signal.Signals, remove: bool
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


async def test_killed_again_and_again_in_the_middle_of_starts(programs: Programs) -> None:
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
