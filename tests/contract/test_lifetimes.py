# SPDX-License-Identifier: MIT
"""`--idle-stop` and `--ttl` against the real daemon over a fake world: shown, warned of, extended, kept."""

from __future__ import annotations

import asyncio
import datetime
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from banger.contract import names, reach, resources
from banger.owner import activity, composition, config
from tests.contract import api_served, cli_process, conftest
from tests.fakes import world as worlds


@pytest.fixture
async def served(daemon: conftest.Daemon) -> AsyncIterator[api_served.Served]:
    async with api_served.serving(daemon) as made:
        yield made


async def banger(served: api_served.Served, *words: str, status: int = 0) -> cli_process.Done:
    done = await asyncio.to_thread(cli_process.Cli(served.path).run, *words)
    assert done.status == status, (done.err, done.out)
    return done


async def shown(served: api_served.Served) -> resources.Vm:
    return await served.get("/v1/vms/web", resources.Vm)


def seconds_until(moment: datetime.datetime | None) -> float:
    assert moment is not None
    return (moment - datetime.datetime.now(datetime.UTC)).total_seconds()


async def test_both_limits_are_shown_with_their_next_moment(served: api_served.Served) -> None:
    await banger(served, "vm", "create", "web", "--ttl", "8h", "--idle-stop", "30m")
    await banger(served, "vm", "create", "free")
    vm = await shown(served)
    assert (vm.idle_stop_s, vm.ttl_s) == (1800, 28800)
    assert 1700 < seconds_until(vm.idle_stop_at) <= 1801
    assert 28700 < seconds_until(vm.ttl_ends_at) <= 28801
    table = (await banger(served, "vm", "list")).text.splitlines()
    assert table[0].endswith("STOPS")
    assert "(idle)" in next(line for line in table if line.startswith("web"))
    assert next(line for line in table if line.startswith("free")).endswith("-")
    text = (await banger(served, "vm", "show", "web")).text
    assert "idle stop:" in text
    assert "after 30 minutes without use, at 2" in text
    assert "8 hours, at 2" in text
    explained = (await banger(served, "vm", "explain", "web")).text
    assert "idle stop: after 30 minutes" in explained
    assert "time to live: 8 hours" in explained
    document = (await banger(served, "vm", "explain", "web", "--json")).json
    assert document["ttl_ends_at"] == json.loads(msgspec.json.encode(vm.ttl_ends_at))


async def test_neither_is_there_unless_asked_for(served: api_served.Served) -> None:
    await banger(served, "vm", "create", "web")
    vm = await shown(served)
    assert (vm.idle_stop_s, vm.ttl_s, vm.idle_stop_at, vm.ttl_ends_at) == (0, 0, None, None)
    assert "STOPS" not in (await banger(served, "vm", "list")).text
    refused = await banger(served, "vm", "extend", "web", "--by", "1h", status=1)
    assert "no time to live" in refused.err
    assert "hint: `banger vm set web --ttl 2h` gives it one" in refused.err
    said = await banger(served, "vm", "extend", "web")
    assert (said.text, said.err.partition(";")[0]) == (
        "web\n",
        "banger: web has no time limit, so nothing was changed: it runs until it is stopped",
    )
    assert (await banger(served, "vm", "extend", "web", "--json")).err == ""
    await banger(served, "vm", "set", "web", "--idle-stop", "90s")
    refused = await banger(served, "vm", "extend", "web", "--by", "1h", status=1)
    assert "hint: without --by its idleness begins anew" in refused.err
    with _used(served, await shown(served)).busy():
        said = await banger(served, "vm", "extend", "web")
    assert said.err == "banger: web is in use now: it stops 1 minute 30 seconds after its last use\n"


async def test_a_running_vm_is_given_limits_and_lives_longer_at_once(served: api_served.Served) -> None:
    await banger(served, "vm", "create", "web")
    await banger(served, "vm", "set", "web", "--ttl", "1h", "--idle-stop", "2h")
    before = await shown(served)
    assert 3500 < seconds_until(before.ttl_ends_at) <= 3601
    said = await banger(served, "vm", "extend", "web", "--by", "2h")
    assert said.text == "web\n"
    assert re.search(r"banger: web stops in .*hour.*\(idle\)", said.err)
    assert 10700 < seconds_until((await shown(served)).ttl_ends_at) <= 10801
    await banger(served, "vm", "extend", "web")
    assert 3500 < seconds_until((await shown(served)).ttl_ends_at) <= 3601
    await banger(served, "vm", "set", "web", "--ttl", "off", "--idle-stop", "off")
    after = await shown(served)
    assert (after.ttl_ends_at, after.idle_stop_at) == (None, None)
    await banger(served, "vm", "stop", "web")
    assert "not running" in (await banger(served, "vm", "extend", "web", status=1)).err


@pytest.mark.parametrize("limit", ["--ttl", "--idle-stop"])
async def test_a_vm_is_stopped_after_a_warning_and_says_why(
    served: api_served.Served, caplog: pytest.LogCaptureFixture, limit: str
) -> None:
    await banger(served, "vm", "create", "web")
    async with served.command("web") as link:
        await link.send(json.dumps({"argv": ["cat"], "tty": True, "notices": True}))
        await link.send(b"here")
        assert await link.recv() == b"\x01here"
        await banger(served, "vm", "set", "web", limit, "2s")
        said: list[dict[str, Any]] = []
        async with asyncio.timeout(30):
            async for message in link:
                if isinstance(message, str):
                    said.append(json.loads(message))
    warning, stopping, end = said
    assert warning["notice"].startswith("web stops in ")
    assert "`banger vm extend web` keeps it running" in warning["notice"]
    assert stopping["notice"].startswith("web is being stopped: it had ")
    assert end["error"]["code"] == "unavailable"
    async with asyncio.timeout(30):
        for operation in served.daemon.services.operations.list():
            await served.daemon.services.operations.wait(operation.id)
    vm = await shown(served)
    assert (vm.state, vm.last_error) == (resources.VmState.STOPPED, None)
    assert (
        f"was stopped by time: it {vm.stopped_because}"
        in (await banger(served, "vm", "explain", "web")).text
    )
    assert "vm stops soon" in [record.getMessage() for record in caplog.records]
    await served.done("POST", "/v1/vms/web/start")
    again = await shown(served)
    assert (again.state, again.stopped_because) == (resources.VmState.RUNNING, "")
    assert seconds_until(again.ttl_ends_at or again.idle_stop_at) > 0


async def test_a_warning_reaches_who_works_in_the_vm(served: api_served.Served) -> None:
    await banger(served, "vm", "create", "web")
    with cli_process.Cli(served.path).started("vm", "exec", "web", "--", "cat") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"here")
        assert await asyncio.to_thread(process.stdout.read, 4) == b"here"
        await banger(served, "vm", "set", "web", "--ttl", "2s")
        await asyncio.to_thread(process.wait, cli_process.DEADLINE_S)
        done = process.stderr.read().decode()
    assert "banger: web stops in " in done
    assert "banger: web is being stopped: it had lived for its 2 seconds" in done


@pytest.mark.parametrize(
    ("verb", "said"),
    [("stop", "stopped"), ("kill", "killed"), ("restart", "restarted"), ("delete", "deleted")],
)
async def test_who_works_in_a_vm_hears_that_somebody_else_ends_it(
    served: api_served.Served, verb: str, said: str
) -> None:
    await banger(served, "vm", "create", "web")
    async with served.command("web") as link, asyncio.timeout(30):
        await link.send(json.dumps({"argv": ["cat"], "notices": True}))
        await link.send(b"here")
        assert await link.recv() == b"\x01here"
        await banger(served, "vm", verb, "web")
        heard = [json.loads(message) async for message in link if isinstance(message, str)]
    assert heard[0]["notice"] == f"web is being {said}"
    assert "error" in heard[-1] or "exit_status" in heard[-1]


async def test_a_time_to_live_survives_its_daemon(paths: config.Paths, world: worlds.World) -> None:
    async def looked_at(*, make: bool) -> datetime.datetime | None:
        composed = composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64)
        async with composed as services:
            if make:
                body = resources.CreateVm(name="web", ttl_s=3600, idle_stop_s=1800)
                await conftest.Daemon(services, paths, world).done(await services.vms.create(body))
            vm = await services.vms.get("web")
            assert vm.idle_stop_at is not None
            return vm.ttl_ends_at

    first, second = await looked_at(make=True), await looked_at(make=False)
    assert first is not None
    assert second is not None
    assert abs((second - first).total_seconds()) <= 1


def _used(served: api_served.Served, vm: resources.Vm) -> activity.Activity:
    return served.daemon.services.vms.activities.of(names.VmId(vm.id))


def _is_busy(used: activity.Activity) -> bool:
    return used.is_busy


async def test_commands_are_activity_while_they_run_and_terminals_when_they_are_used(
    served: api_served.Served,
) -> None:
    await banger(served, "vm", "create", "web", "--idle-stop", "1h")
    used = _used(served, await shown(served))
    sessions = served.daemon.services.sessions
    async with sessions.exec("web", resources.ExecRequest(argv=("cat",))):
        assert _is_busy(used)
        assert (await shown(served)).idle_stop_at is None
        assert "in use now" in (await banger(served, "vm", "show", "web")).text
    assert not _is_busy(used)
    async with sessions.exec("web", resources.ExecRequest(argv=("cat",), tty=True)) as running:
        assert not _is_busy(used)
        before = used.last_used_s
        await running.write(b"typed")
        assert used.last_used_s > before
        before = used.last_used_s
        assert await anext(running.output()) == (1, b"typed")
        assert used.last_used_s > before


async def test_tunnels_are_activity_when_bytes_go_through(served: api_served.Served) -> None:
    await banger(served, "vm", "create", "web", "--idle-stop", "1h")
    used = _used(served, await shown(served))
    async with served.daemon.services.sessions.connect("web", reach.ConnectRequest(port=22)) as tunnel:
        before = used.last_used_s
        await tunnel.write(b"ping")
        assert used.last_used_s > before
        before = used.last_used_s
        assert await tunnel.read() == b"ping"
        assert used.last_used_s > before
    assert not _is_busy(used)


async def test_looking_at_a_vm_is_no_activity(served: api_served.Served) -> None:
    await banger(served, "vm", "create", "web", "--idle-stop", "1h")
    used = _used(served, await shown(served))
    before = used.last_used_s
    await served.get("/v1/vms/web/stats", resources.VmStats)
    await banger(served, "vm", "explain", "web")
    assert used.last_used_s == before
