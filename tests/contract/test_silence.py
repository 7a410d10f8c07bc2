# SPDX-License-Identifier: MIT
"""`running` means that the agent answered within the last seconds: what is shown when it does not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from banger.contract import names, resources
from banger.owner import composition, config, silence
from tests.contract import api_served, cli_process, conftest
from tests.fakes import world as worlds

SILENCE_S = 0.2
LONG_S = 60.0
"""So long may a busy machine keep an agent from answering that is well."""


@pytest.fixture(params=[False, True], ids=["an agent", "an old agent"])
async def served(
    request: pytest.FixtureRequest,
    paths: config.Paths,
    world: worlds.World,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[api_served.Served]:
    """A daemon with one VM, which it asks often, and calls silent very soon once it falls silent."""
    world.behaviour.is_old = request.param
    monkeypatch.setattr(silence, "_ASKED_WITHIN", 3 * LONG_S / SILENCE_S)
    settings = msgspec.structs.replace(conftest.SETTINGS, agent_silence_s=LONG_S, power_off_deadline_s=0.2)
    async with composition.compose(settings, conftest.NETWORK, paths, world, "0" * 64) as services:
        daemon = conftest.Daemon(services, paths, world)
        await daemon.create()
        async with api_served.serving(daemon) as made:
            yield made


async def _until(served: api_served.Served, is_so: Callable[[resources.Vm], bool]) -> resources.Vm:
    """Nothing announces it: that the daemon notices by itself is what is tested."""
    async with asyncio.timeout(20):
        while True:
            vm = await served.get("/v1/vms/web", resources.Vm)
            if is_so(vm):
                return vm
            await asyncio.sleep(0.02)


def _count_as_silent_after(daemon: conftest.Daemon, seconds: float) -> None:
    """Those that are asked already are asked as often as before."""
    daemon.services.vms.endings.live.agents._silent_after_s = seconds


async def _falls_silent(served: api_served.Served) -> resources.Vm:
    served.daemon.world.behaviour.silent = True
    _count_as_silent_after(served.daemon, SILENCE_S)
    return await _until(served, lambda vm: vm.silent_since is not None)


async def _banger(served: api_served.Served, *words: str) -> cli_process.Done:
    return await asyncio.to_thread(cli_process.Cli(served.path).run, *words)


def _said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == silence.__name__]


async def test_a_silent_agent_shows_and_so_does_its_coming_back(
    served: api_served.Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "banger.owner.silence")
    vm = await _falls_silent(served)
    assert (vm.state, vm.has_vmm) == (resources.VmState.ERROR, True)
    assert vm.pid
    assert vm.last_error is not None
    assert vm.last_error.message.startswith("the agent of web has been silent since 2")
    listed = await served.get("/v1/vms", list[resources.Vm])
    assert [each.state for each in listed] == [resources.VmState.ERROR]
    await _until(served, lambda _: bool(_said(caplog)))
    await asyncio.sleep(4 * SILENCE_S)  # silence that goes on must not go on being said
    served.daemon.world.behaviour.silent = False
    _count_as_silent_after(served.daemon, LONG_S)
    vm = await _until(served, lambda vm: vm.silent_since is None and len(_said(caplog)) > 1)
    assert (vm.state, vm.last_error) == (resources.VmState.RUNNING, None)
    assert _said(caplog) == ["the agent is silent", "the agent answers again"]


async def test_list_show_explain_and_ps_say_it(served: api_served.Served) -> None:
    await _falls_silent(served)
    for words in (("vm", "list"), ("vm", "show", "web"), ("ps",)):
        assert "error: silent for " in (await _banger(served, *words)).text, words
    assert (await _banger(served, "vm", "list", "-q", "--state", "running")).text == ""
    explained = (await _banger(served, "vm", "explain", "web")).text
    assert "web runs, but its agent does not answer: silent for " in explained
    assert "banger vm restart web" in explained


async def test_a_silent_vm_is_not_pruned_and_can_be_stopped(served: api_served.Served) -> None:
    await _falls_silent(served)
    assert (await _banger(served, "vm", "prune", "--dry-run")).text == ""
    ended = await served.done("POST", "/v1/vms/web/stop")
    assert ended.vm is not None
    assert (ended.vm.state, ended.vm.silent_since) == (resources.VmState.STOPPED, None)


async def test_a_hundred_guests_are_asked_one_connection_each() -> None:
    """And those that never answer keep nobody from being asked."""
    asking, most, answered, opened = set[str](), 0, set[str](), set[str]()

    class Probe:
        def __init__(self, vm_id: names.VmId) -> None:
            self._vm_id = vm_id
            assert vm_id not in opened
            opened.add(vm_id)

        async def ask(self) -> None:
            nonlocal most
            assert self._vm_id not in asking
            asking.add(self._vm_id)
            most = max(most, len(asking))
            try:
                if self._vm_id.endswith("0"):
                    await asyncio.Event().wait()
                answered.add(self._vm_id)
            finally:
                asking.discard(self._vm_id)

        def close(self) -> None:
            opened.remove(self._vm_id)

    told = set[names.VmId]()
    watch = silence.SilenceWatch(
        Probe,
        silent_after_s=0.3,
        tell=lambda vm_id, is_silent: (told.add if is_silent else told.remove)(vm_id),
    )
    everyone = [names.VmId(f"{n:012d}") for n in range(100)]
    for vm_id in everyone:
        watch.add(vm_id)
    for _ in range(1000):
        if len(told) == sum(watch.silent_since(vm_id) is not None for vm_id in everyone) == 10:
            break
        await asyncio.sleep(0.02)
    assert {vm_id for vm_id in everyone if watch.silent_since(vm_id)} == set(everyone) - answered == told
    assert len(answered) == 90
    assert most <= 11, "ten that hang, and the one being asked"
    await watch.close()
    assert asking == opened == set()
    assert watch.silent_since(everyone[0]) is None


async def test_a_question_that_fails_is_not_the_last() -> None:
    """A daemon that had no memory for a moment would call a guest silent from then on that answers."""
    asked = asyncio.Event()

    class Probe:
        failures = 3

        async def ask(self) -> None:
            if self.failures:
                self.failures -= 1
                raise MemoryError
            asked.set()

        def close(self) -> None:
            return

    watch = silence.SilenceWatch(lambda _: Probe(), silent_after_s=0.03)
    vm_id = names.VmId("0123456789ab")
    watch.add(vm_id)
    await asyncio.wait_for(asked.wait(), 30)
    await asyncio.sleep(0)
    assert watch.silent_since(vm_id) is None
    await watch.close()
