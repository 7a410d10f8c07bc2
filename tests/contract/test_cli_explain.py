# SPDX-License-Identifier: MIT
"""`vm explain`, `vm prune` and the filters of `vm list` against the real daemon over a fake world."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import sqlite3
import types
from collections.abc import AsyncIterator
from typing import Any

import pytest

from banger.contract import errors, guest, privileged, resources
from tests.contract import api_served, cli_process, conftest
from tests.fakes import daemon as fakes


@pytest.fixture
async def served(daemon: conftest.Daemon) -> AsyncIterator[api_served.Served]:
    async with api_served.serving(daemon) as made:
        yield made


async def banger(served: api_served.Served, *words: str, status: int = 0, **more: Any) -> cli_process.Done:
    done = await asyncio.to_thread(cli_process.Cli(served.path).run, *words, **more)
    assert done.status == status, (done.err, done.out)
    return done


async def test_where_the_time_of_a_start_went(served: api_served.Served) -> None:
    await served.daemon.create()
    shown = (await banger(served, "vm", "explain", "web")).text
    assert shown.startswith("web has run for ")
    assert "its agent answers" in shown
    assert "its last start took" in shown
    for step in ("preflight", "dm_snapshot", "firecracker_launch", "wait_vsock_agent", "persist"):
        assert f"    {step} " in shown
    headings = [line.split(":")[0].strip() for line in shown.splitlines() if re.match(r"  \w+: ", line)]
    assert re.search(r"\n    prepare_host_features .*\n      prepare_work_disk ", shown), (
        "a part is below its step"
    )
    assert headings == [stage.value for stage in list(resources.Stage)[:7]]
    document = (await banger(served, "vm", "explain", "web", "--json")).json
    last = document["steps"][-1]
    assert document["total_ms"] == pytest.approx(last["started_ms"] + last["elapsed_ms"])
    assert document["next"] == ""


async def test_an_agent_that_fell_silent_is_named(served: api_served.Served) -> None:
    await served.daemon.create()
    served.daemon.world.behaviour.silent = True
    shown = (await banger(served, "vm", "explain", "web")).text
    assert "runs, but its agent does not answer" in shown
    assert "banger vm restart web" in shown


async def test_a_host_whose_disk_is_almost_full_is_named(
    served: api_served.Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest's disks are sparse files there, and only some of its programs hear that a write was lost."""
    await served.daemon.create()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=100 << 20))
    shown = (await banger(served, "vm", "explain", "web")).text
    assert "but the host's disk has 100 MiB left: without any, what it writes is lost" in shown
    assert "banger image cache prune" in shown


async def test_of_a_vm_whose_row_is_corrupt_nothing_made_up_is_shown(served: api_served.Served) -> None:
    created = (await served.daemon.create()).vm
    assert created is not None
    with contextlib.closing(sqlite3.connect(served.daemon.paths.database, isolation_level=None)) as outside:
        outside.execute("UPDATE vms SET record = '{'")
    shown = (await banger(served, "vm", "explain", "web")).text
    assert "web runs, but the row of web is corrupt" in shown
    assert "  next: it runs on: `banger vm cp`" in shown
    facts = (await banger(served, "vm", "show", "web")).text
    assert [line.split(":")[0] for line in facts.splitlines() if not line.startswith(" ")] == [
        *("name", "id", "state", "image", "kernel", "created", "VMM", "last error"),
    ]
    (row,) = (await banger(served, "vm", "list")).text.splitlines()[1:]
    assert re.fullmatch(r"web +running +tiny +\? +\? +\? .*", row)
    await served.daemon.done(await served.daemon.services.vms.stop("web"))
    assert (await banger(served, "vm", "prune", "--dry-run")).text == "", "nobody knows when it ran last"
    (document,) = (await banger(served, "vm", "list", "--json")).json
    assert (document["vcpus"], document["memory_mib"], document["disk_size_mib"]) == (0, 0, 0)


async def test_why_a_start_failed(served: api_served.Served) -> None:
    async def refuse(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.CreateTap):
            raise errors.ConflictError("the tap is busy", hint="free it")

    served.daemon.world.before = refuse
    await served.daemon.create()
    shown = (await banger(served, "vm", "explain", "web")).text
    assert "web does not run: the tap is busy (in step tap)" in shown
    assert "next: free it" in shown


async def test_a_panic_is_quoted_from_the_console(served: api_served.Served) -> None:
    served.daemon.world.behaviour.panic = "out of luck"
    await served.daemon.create()
    shown = (await banger(served, "vm", "explain", "web")).text
    assert "out of luck" in shown.partition("the last it printed:")[0]
    assert "Kernel panic - not syncing: out of luck" in shown.partition("the last it printed:")[2]


async def test_what_was_logged_by_the_start_before_is_shown(served: api_served.Served) -> None:
    """Who starts a VM again that failed would otherwise take away why."""
    created = (await served.daemon.create()).vm
    assert created is not None
    logs = served.daemon.paths.layout.logs / created.id
    (logs / "console.log").write_bytes(b"fine\n")
    (logs / "console.log.1").write_bytes(b"Kernel panic\n")
    (logs / "vmm.log.1").write_bytes(b"exit_code=1\n")
    assert (await banger(served, "vm", "logs", "web")).text == "fine\n"
    before = await banger(served, "vm", "logs", "--previous", "web")
    assert (before.text, before.err) == ("Kernel panic\n", "")
    assert (
        await banger(served, "vm", "logs", "--previous", "--source", "vmm", "web")
    ).text == "exit_code=1\n"
    last = await banger(served, "vm", "logs", "--previous", "--tail", "0", "web")
    assert (last.text, last.err) == ("", "")
    (logs / "console.log").write_bytes(b"one\ntwo\nthree\n")
    assert (await banger(served, "vm", "logs", "-n", "2", "web")).text == "two\nthree\n"
    assert "range" in (await banger(served, "vm", "logs", "-n", "-2", "web", status=2)).err
    refused = await banger(served, "vm", "logs", "--previous", "-f", "web", status=2)
    assert "nothing is added" in refused.err


async def test_the_signal_that_ended_a_vmm_is_named(served: api_served.Served) -> None:
    created = (await served.daemon.create()).vm
    assert created is not None
    logs = served.daemon.paths.layout.logs / created.id
    (logs / "ending.log").write_text("by signal 9;low 0 oom 0 oom_kill 0 \n")
    (logs / "console.log").write_text(f"{guest.NO_CONSOLE}\n")
    (logs / "vmm.log").write_text("Running Firecracker\n")
    fake = served.daemon.world.vm(created.id).vmm
    assert fake is not None
    await fake.kill()
    async with asyncio.timeout(30):
        # Nothing announces that the daemon noticed.
        while (await served.get("/v1/vms/web", resources.Vm)).state is resources.VmState.RUNNING:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    shown = (await banger(served, "vm", "explain", "web")).text
    assert shown.startswith("web does not run: its VMM was ended by SIGKILL\n")
    assert "the last it printed" not in shown, "the agent's own lines are not the guest's"
    assert "the default one has no serial console" in shown
    assert "the last its VMM said:\n  Running Firecracker\n" in shown


async def test_those_that_never_ran_or_were_stopped(served: api_served.Served) -> None:
    await served.daemon.create("new", start=False)
    assert "has never been started" in (await banger(served, "vm", "explain", "new")).text
    await served.daemon.create()
    await served.done("POST", "/v1/vms/web/stop")
    assert "was stopped" in (await banger(served, "vm", "explain", "web")).text


async def test_prune_deletes_what_does_not_run_and_asks_first(served: api_served.Served) -> None:
    await served.daemon.create()
    for name in ("old-one", "old-two"):
        await served.daemon.create(name, start=False)
    assert (await banger(served, "vm", "prune", "--dry-run")).text == "old-one\nold-two\n"
    refused = await banger(served, "vm", "prune", status=2)
    assert "nobody to ask" in refused.err
    nothing = await banger(served, "vm", "prune", "--older-than", "7d", "--force")
    assert (nothing.text, nothing.err) == ("", "banger: nothing to prune\n")
    assert (await banger(served, "vm", "prune", "--force")).text == "old-one\nold-two\n"
    assert [vm.name for vm in await served.get("/v1/vms", list[resources.Vm])] == ["web"]


@pytest.mark.parametrize("verb", ["start", "restart"])
async def test_prune_leaves_what_is_being_started(served: api_served.Served, verb: str) -> None:
    """Whose disks may hold a year of work, and who does not run for these seconds."""
    reached, release = asyncio.Event(), asyncio.Event()

    async def hold(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.CreateTap):
            reached.set()
            await release.wait()

    await served.daemon.create(start=False)
    served.daemon.world.before = hold
    starting = await served.begin("POST", f"/v1/vms/web/{verb}")
    await reached.wait()
    assert (await banger(served, "vm", "prune", "--dry-run")).text == ""
    pruned = await banger(served, "vm", "prune", "--force")
    assert (pruned.text, pruned.err) == ("", "banger: nothing to prune\n")
    release.set()
    ended = (await served.watch(starting.id))[-1].result
    assert ended is not None
    assert ended.error is None
    assert [vm.name for vm in await served.get("/v1/vms", list[resources.Vm])] == ["web"]


async def test_prune_leaves_what_was_started_while_it_asked(served: api_served.Served) -> None:
    await served.daemon.create("idle", start=False)
    await served.daemon.create("web", start=False)

    def asked() -> cli_process.Terminal:
        terminal = stack.enter_context(cli_process.Cli(served.path).on_terminal("vm", "prune"))
        terminal.read_until(b"Delete them?")
        return terminal

    def agree(terminal: cli_process.Terminal) -> int:
        terminal.type(b"y\n")
        terminal.read_until(b"web runs, or is being started")
        return terminal.wait()

    with contextlib.ExitStack() as stack:
        terminal = await asyncio.to_thread(asked)
        await served.done("POST", "/v1/vms/web/start")
        assert await asyncio.to_thread(agree, terminal) == 1
    (left,) = await served.get("/v1/vms", list[resources.Vm])
    assert (left.name, left.state) == ("web", resources.VmState.RUNNING)


async def test_prune_leaves_another_one_of_the_same_name(served: api_served.Served) -> None:
    await served.daemon.create(start=False)

    def asked() -> cli_process.Terminal:
        terminal = stack.enter_context(cli_process.Cli(served.path).on_terminal("vm", "prune"))
        terminal.read_until(b"Delete them?")
        return terminal

    def agree(terminal: cli_process.Terminal) -> int:
        terminal.type(b"y\n")
        return terminal.wait()

    with contextlib.ExitStack() as stack:
        terminal = await asyncio.to_thread(asked)
        await served.done("DELETE", "/v1/vms/web")
        await served.daemon.create(start=False)
        assert await asyncio.to_thread(agree, terminal) == 1
    assert [vm.name for vm in await served.get("/v1/vms", list[resources.Vm])] == ["web"]


def test_prune_leaves_what_will_be_started_with_its_host(
    cli: cli_process.Cli, fake: fakes.FakeDaemon
) -> None:
    fake.add_vm("again", "stopped", autostart=True, stopped_with_host=True)
    fake.add_vm("once", "stopped", stopped_with_host=True)
    assert cli.run("vm", "prune", "--dry-run").text == "once\n"


async def test_prune_takes_no_for_an_answer(served: api_served.Served) -> None:
    await served.daemon.create("old", start=False)

    def decline() -> int:
        with cli_process.Cli(served.path).on_terminal("vm", "prune") as terminal:
            terminal.read_until(b"Delete them?")
            terminal.type(b"n\n")
            return terminal.wait()

    assert await asyncio.to_thread(decline) == 130
    assert len(await served.get("/v1/vms", list[resources.Vm])) == 1


async def test_lists_are_filtered(served: api_served.Served) -> None:
    await served.daemon.create()
    await served.daemon.create("shop", start=False)
    assert (await banger(served, "vm", "list", "-q", "--name", "w*")).text == "web\n"
    assert (await banger(served, "vm", "list", "-q", "--state", "created")).text == "shop\n"
    assert (await banger(served, "vm", "list", "-q", "--image", "other")).text == ""
    assert (await banger(served, "ps", "-q")).text == "web\n"
    assert "WORKSPACE" in (await banger(served, "vm", "list", "--format", "wide")).text
