# SPDX-License-Identifier: MIT
"""bangerd and a fake helper as programs of their own, to be killed and started again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec

from banger.contract import resources
from banger.owner import config

_TREE = Path(__file__).parents[2]
_CONFIG = 'image = "tiny"\ndns_listen = ""\nmemory_mib = 128\ndisk_size_mib = 16\npower_off_deadline_s = 1\n'


@dataclass(slots=True)
class Programs:
    """A fake helper that stays, with the VMMs, and a daemon that can be killed and started again."""

    paths: config.Paths
    helper: asyncio.subprocess.Process
    daemon: asyncio.subprocess.Process | None = None
    module: str = "banger.owner.main"

    async def start(self) -> None:
        """Returns when it says that it is ready. Connecting would prove nothing: a program that the last one
        had just forked may hold its socket open for a moment longer."""
        async with self.started():
            pass

    @contextlib.asynccontextmanager
    async def started(
        self, module: str = "", *, watchdog_s: float = 0.0
    ) -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
        """A daemon that is ready, and what it says after that to who started it, one by one."""
        with _notified(self.paths.run.with_name("notify")) as heard:
            command = (module or self.module, *self._arguments())
            self.daemon = await _program(
                *command, NOTIFY_SOCKET=heard.getsockname(), WATCHDOG_USEC=str(round(watchdog_s * 1e6))
            )

            async def next_said() -> bytes:
                async with asyncio.timeout(50):
                    return await asyncio.get_running_loop().sock_recv(heard, 64)

            assert await next_said() == b"READY=1"
            yield next_said

    def _arguments(self) -> tuple[str, ...]:
        where = self.paths
        return (
            *("--install", str(where.install), "--config", str(where.install.with_name("config.toml"))),
            *("--state-dir", str(where.state), "--cache-dir", str(where.cache)),
            *("--run-dir", str(where.run), "--helper-socket", str(where.helper_socket)),
            *("--log-level", "error"),
        )

    async def second(self) -> tuple[int | None, str]:
        """Another daemon beside the one that runs: how it ends, and what it says."""
        other = await _program(self.module, *self._arguments(), stderr=asyncio.subprocess.PIPE)
        _, said = await other.communicate()
        return other.returncode, said.decode()

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
        async with httpx.AsyncClient(transport=transport, base_url="http://banger", timeout=50) as client:
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


async def _program(
    module: str, *arguments: str, stderr: int | None = None, **extra: str
) -> asyncio.subprocess.Process:
    environment = {**os.environ, "PYTHONPATH": str(_TREE), **extra}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, cwd=_TREE, env=environment, stderr=stderr
    )


async def _answers(path: Path) -> None:
    async with asyncio.timeout(50):
        while True:
            try:
                _, writer = await asyncio.open_unix_connection(str(path))
            except OSError:
                await asyncio.sleep(0.01)  # a program's socket appears; nothing announces it
            else:
                writer.close()
                return


@contextlib.asynccontextmanager
async def running(
    paths: config.Paths, *, agent: Path | None = None, module: str = "banger.owner.main"
) -> AsyncIterator[Programs]:
    """Both run; the daemon has started for the first time. `agent` is what answers in all guests."""
    owner = {"owner_uid": os.getuid(), "helper_dir": str(paths.helper_dir)}
    paths.install.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in owner.items()))
    paths.install.with_name("config.toml").write_text(_CONFIG)
    helper = await _program(
        "tests.fakes.helper",
        *("--socket", str(paths.helper_socket), "--state", str(paths.state)),
        *("--helper-dir", str(paths.helper_dir)),
        *(() if agent is None else ("--agent", str(agent))),
    )
    made = Programs(paths, helper, module=module)
    try:
        await _answers(paths.helper_socket)
        await made.start()
        yield made
    finally:
        await made.end(signal.SIGKILL)
        if helper.returncode is None:
            helper.kill()
            await helper.wait()
