# SPDX-License-Identifier: MIT
"""The daemon under a watchdog: systemd's part is played by the test."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from banger import systemd
from banger.contract import resources
from banger.owner import config
from tests.contract import programs as programs_

PERIOD_S = 0.6


async def _silence(next_said: Callable[[], Awaitable[bytes]]) -> None:
    """Returns when nothing is said for the whole of a period, which is when systemd acts."""
    with contextlib.suppress(TimeoutError):
        while True:
            async with asyncio.timeout(PERIOD_S):
                assert await next_said() == b"WATCHDOG=1"


async def test_a_daemon_that_hangs_falls_silent_and_says_where_and_its_vms_outlive_it(
    paths: config.Paths, capfd: pytest.CaptureFixture[str]
) -> None:
    async with programs_.running(paths) as programs:
        assert (await programs.done("POST", "/v1/vms", {"name": "web"})).error is None
        (before,) = await programs.vms()
        await programs.end(signal.SIGTERM)
        async with programs.started("tests.contract.hung_daemon", watchdog_s=PERIOD_S) as next_said:
            for _ in range(4):
                assert await next_said() == b"WATCHDOG=1"
            assert programs.daemon is not None
            programs.daemon.send_signal(signal.SIGUSR1)
            while await next_said() != b"STATUS=it hangs":
                pass
            await _silence(next_said)
        programs.daemon.send_signal(signal.SIGABRT)
        assert await programs.daemon.wait() == -signal.SIGABRT
        assert "in hang_here" in capfd.readouterr().err
        await programs.start()
        (after,) = await programs.vms()
    assert after.state is resources.VmState.RUNNING
    assert (after.pid, after.boot_id) == (before.pid, before.boot_id)


@pytest.fixture
def heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where a service says how it is."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as made:
        made.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "30000")
        yield made


def _fill(address: str) -> int:
    """Sends until not even a socket that is new may send; returns how many messages wait."""
    sent, before = 0, -1
    while sent > before:
        before = sent
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as other:
            other.connect(address)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sent += bool(other.send(b"other"))
    return sent


async def test_a_beat_that_nobody_takes_holds_up_nothing(heard: socket.socket) -> None:
    full = _fill(heard.getsockname())
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(systemd.beat_until(stop))
        await asyncio.sleep(0)  # it has beaten once, or hangs
        for _ in range(full):
            assert heard.recv(64) == b"other"
        assert await asyncio.get_running_loop().sock_recv(heard, 64) == b"WATCHDOG=1"
        stop.set()


@pytest.mark.parametrize(("name", "value"), [("WATCHDOG_PID", "1"), ("WATCHDOG_USEC", "0")])
async def test_only_who_is_watched_beats(
    heard: socket.socket, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """The variables may be those of a parent (sd_watchdog_enabled(3))."""
    monkeypatch.setenv(name, value)
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(systemd.beat_until(stop))
        await asyncio.sleep(0)
        stop.set()
    with pytest.raises(BlockingIOError):
        heard.recv(64)
