# SPDX-License-Identifier: MIT
"""The lab's random walk, over a fake world: that it gets through, and what it does not let pass."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from banger.contract import errors, privileged
from tests.contract import api_served, conftest
from tests.lab import crash_walk

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@dataclass(slots=True)
class Walked:
    """The daemon that is walked on: nobody dies but VMMs, and guests have what was written into them."""

    daemon: conftest.Daemon
    disks: dict[str, str] = field(default_factory=dict)
    proofs: int = 0

    async def walk(self, kills: int) -> int:
        return await asyncio.to_thread(crash_walk.main, [7, 0, kills, -1], ["tiny"])

    def vmm_pids(self) -> dict[str, list[int]]:
        return {vm_id: [1] for vm_id, vm in list(self.daemon.world.vms.items()) if vm.runs}

    def kill(self, loop: asyncio.AbstractEventLoop, victims: tuple[str, ...]) -> int:
        for vm in list(self.daemon.world.vms.values()) if victims == ("vmm",) else []:
            if vm.vmm is not None:
                asyncio.run_coroutine_threadsafe(vm.vmm.kill(), loop).result(10)
        return 1

    def inside(self, _where: str, name: str, script: str) -> str:
        if script.startswith("echo"):
            self.disks[name] = script.split()[1]
            return ""
        self.proofs += 1
        return f"{self.disks[name]}\n" * 2


@pytest.fixture
async def walked(daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Walked]:
    made, loop, paths = Walked(daemon), asyncio.get_running_loop(), daemon.paths
    replaced: dict[str, Any] = {
        "DISKS": str(paths.state / "vms"),
        "JAILS": "/nonexistent",
        "REPOSITORY": str(paths.state / "walked"),
        "LONGEST_WAIT_S": 0.02,
        "TRUE_WITHIN_S": 30,
        "SIZES": {},
        "vmm_pids": made.vmm_pids,
        "kill": lambda victims: made.kill(loop, victims),
        "inside": made.inside,
    }
    async with api_served.serving(daemon) as served:
        for name, value in (*replaced.items(), ("API", str(served.path))):
            monkeypatch.setattr(crash_walk, name, value)
        monkeypatch.setattr(crash_walk.Client, "begin", lambda *_: None)
        yield made


async def test_it_gets_through(walked: Walked, capsys: pytest.CaptureFixture[str]) -> None:
    assert await walked.walk(20) == 0
    assert walked.proofs == 4
    assert "20 of 20 kills met somebody" in capsys.readouterr().out


async def test_it_stops_for_the_host_to_die(walked: Walked, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was flushed before is asked for by who goes on."""
    monkeypatch.setattr(crash_walk, "EVERY_POWER", 5)
    assert await walked.walk(20) == crash_walk.POWER
    assert await asyncio.to_thread(crash_walk.main, [7, 5, 8, 4], ["tiny"]) == 0
    assert walked.proofs == 1


async def no_launch(request: privileged.Request[Any]) -> None:
    if isinstance(request, privileged.LaunchVmm):
        raise errors.OperationFailedError("it cannot be launched")


async def _no_launch(walked: Walked) -> None:
    walked.daemon.world.before = no_launch


async def _lost_data(walked: Walked) -> None:
    walked.disks = Forgetful()


async def _stray(walked: Walked) -> None:
    """For which it waits in vain that it goes."""
    crash_walk.TRUE_WITHIN_S = 1
    (walked.daemon.paths.state / "vms" / "stray").mkdir(parents=True)


async def _no_image(walked: Walked) -> None:
    for path in (walked.daemon.paths.state / "images").iterdir():
        (path / "image.json").unlink()


class Forgetful(dict[str, str]):
    def __getitem__(self, _key: str) -> str:
        return ""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (_no_launch, "does not start any more"),
        (_lost_data, "on both its disks"),
        (_stray, "stray"),
        (_no_image, "the images are"),
    ],
)
async def test_what_it_does_not_let_pass(walked: Walked, fault: Callable[[Walked], Any], said: str) -> None:
    await fault(walked)
    with pytest.raises(SystemExit, match=said):
        await walked.walk(20)
