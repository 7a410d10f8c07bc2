# SPDX-License-Identifier: MIT
"""The CLI as a process against the real daemon, over a fake world: both sides mean the same by the API."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from banger.contract import guest, privileged, resources
from banger.owner import operations
from tests.contract import api_served, cli_process, conftest, publishing
from tests.fakes import daemon as fakes
from tests.fakes import vmm


@pytest.fixture
async def served(daemon: conftest.Daemon) -> AsyncIterator[api_served.Served]:
    """The real daemon at its socket, with no VM."""
    async with api_served.serving(daemon) as made:
        yield made


async def banger(served: api_served.Served, *arguments: str, **options: Any) -> cli_process.Done:
    return await asyncio.to_thread(cli_process.Cli(served.path).run, *arguments, **options)


async def names(served: api_served.Served) -> list[str]:
    return [vm.name for vm in await served.get("/v1/vms", list[resources.Vm])]


async def test_life_of_a_vm(served: api_served.Served) -> None:
    created = await banger(served, "vm", "create", "web", "--memory", "128M", "--vcpu", "2")
    assert (created.status, created.text) == (0, "web\n"), created.err
    assert "wait_vsock_agent" in created.err
    shown = (await banger(served, "vm", "show", "web", "--json")).json
    assert (shown["state"], shown["vcpus"], shown["sources"]["vcpus"]) == ("running", 2, "request")
    assert "prepare_rootfs" in (await banger(served, "vm", "show", "web")).text
    assert "web" in (await banger(served, "ps")).text
    assert "web" in (await banger(served, "vm", "stats")).text
    assert (await banger(served, "vm", "restart", "web")).status == 0
    assert (await banger(served, "vm", "logs", "web")).status == 0
    stopped = await banger(served, "vm", "stop", "web", "nobody")
    assert (stopped.status, stopped.text) == (1, "web\n")
    assert "nobody" in stopped.err
    assert (await banger(served, "vm", "set", "web", "--memory", "256M", "--name", "shop")).text == "shop\n"
    assert (await banger(served, "vm", "start", "shop")).status == 0
    assert (await banger(served, "vm", "kill", "shop")).status == 0
    assert (await banger(served, "vm", "delete", "shop")).status == 0
    assert await names(served) == []


async def test_stats_of_all_leave_out_one_that_does_not_answer(served: api_served.Served) -> None:
    for name in ("dumb", "web"):
        served.daemon.world.behaviour = vmm.Behaviour()
        await served.daemon.create(name)
        served.daemon.world.behaviour.silent = name == "dumb"
    shown = await banger(served, "vm", "stats")
    assert (shown.status, [line.split()[0] for line in shown.text.splitlines()]) == (0, ["NAME", "web"])
    assert "dumb" in shown.err
    assert [each["name"] for each in (await banger(served, "vm", "stats", "--json")).json] == ["web"]
    assert (await banger(served, "vm", "stats", "web", "dumb")).status == 1, "somebody asked for it"


async def test_a_list_of_names_has_these_alone(served: api_served.Served) -> None:
    for name in ("web", "db", "shop"):
        await banger(served, "vm", "create", name, "--no-start")
    listed = (await banger(served, "vm", "list", "--json", "shop", "web")).json
    assert [vm["name"] for vm in listed] == ["web", "shop"]
    assert (await banger(served, "vm", "list", "-q", listed[0]["id"][:8], "web")).text == "web\n"
    assert (await banger(served, "vm", "list", "-q", "web", "--state", "running")).text == ""
    kernel = (await banger(served, "kernel", "list", "--json")).json[0]
    for noun, known in (("image", "tiny"), ("kernel", kernel["name"])):
        assert (await banger(served, noun, "list", "-q", known)).text == f"{known}\n"
    assert (
        await banger(served, "kernel", "list", "-q", "--available", "generic-6.12")
    ).text == "generic-6.12\n"
    for noun in ("vm", "image", "kernel"):
        shown = await banger(served, noun, "show", "nobody")
        listed = await banger(served, noun, "list", "nobody")
        assert (listed.status, listed.out) == (shown.status, b"") == (1, b"")
        assert "nobody" in listed.err
        assert without_operation(listed.err) == without_operation(shown.err)


def without_operation(text: str) -> str:
    return text.partition("  operation:")[0]


@pytest.mark.parametrize("words", [("logs", "-f"), ("console",)])
async def test_logs_are_followed_until_the_user_has_seen_enough(
    served: api_served.Served, words: tuple[str, ...]
) -> None:
    await served.daemon.create()
    vm = await served.get("/v1/vms/web", resources.Vm)
    log = served.daemon.paths.layout.logs / vm.id / "console.log"
    log.write_bytes(b"one\n")

    def follow() -> tuple[int, bytes]:
        with cli_process.Cli(served.path).on_terminal("vm", *words, "web") as terminal:
            terminal.read_until(b"one\r\n")
            with log.open("ab") as file:
                file.write(b"two\n")
            terminal.read_until(b"two\r\n")
            terminal.process.send_signal(signal.SIGINT)
            return terminal.wait(), terminal.seen

    status, seen = await asyncio.to_thread(follow)
    assert (status, seen.count(b"one"), seen.count(b"two")) == (130, 1, 1), seen


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("exec", "web", "--", "cat"), 125, "bangerd was stopped or started again"),
        (("run", "--rm", "--name", "x", "--", "cat"), 125, "bangerd deletes x as soon as it can"),
        (("logs", "-f", "web"), 1, "bangerd does not answer"),
    ],
)
async def test_who_works_in_a_vm_hears_that_the_daemon_stops(
    daemon: conftest.Daemon, words: tuple[str, ...], status: int, said: str
) -> None:
    created = (await daemon.create()).vm
    assert created is not None
    (daemon.paths.layout.logs / created.id / "console.log").write_bytes(b"one\n")

    def read(process: subprocess.Popen[bytes], size: int = -1) -> bytes:
        stream = process.stderr if size < 0 else process.stdout
        assert stream is not None
        return stream.read(size)

    async with api_served.serving(daemon) as served:
        with cli_process.Cli(served.path).started("vm", *words) as process:
            assert process.stdin is not None
            process.stdin.write(b"one\n")
            assert await asyncio.to_thread(read, process, 4) == b"one\n"
            served.stop.set()
            heard = (await asyncio.to_thread(read, process)).decode()
            assert await asyncio.to_thread(process.wait) == status
    assert said in heard
    assert "hint:" in heard


async def test_a_log_whose_daemon_was_started_again_is_not_over(
    cli: cli_process.Cli, fake: fakes.FakeDaemon
) -> None:
    fake.behaviour.logs = b"one\n"
    for words in (("logs", "-f"), ("console",)):
        done = await asyncio.to_thread(cli.run, "vm", *words, "web")
        assert (done.status, done.out) == (1, b"one\n")
        assert "bangerd was started again" in done.err
    assert (await asyncio.to_thread(cli.run, "vm", "logs", "web")).status == 0


async def test_images_kernels_and_versions(served: api_served.Served) -> None:
    assert (await banger(served, "image", "list", "-q")).text == "tiny\n"
    assert "tiny" in (await banger(served, "image", "show", "tiny")).text
    assert "generic-6.12" in (await banger(served, "kernel", "list", "--available")).text
    assert (await banger(served, "kernel", "delete", "tiny")).text == "tiny\n"
    assert (await banger(served, "version", "--json")).json["daemon"]["api_version"] == 1
    missing = await banger(served, "image", "delete", "nothing")
    assert (missing.status, "nothing" in missing.err) == (1, True)


@pytest.mark.parametrize("status", [0, 7, 255])
async def test_exec_gives_bytes_and_status(served: api_served.Served, status: int) -> None:
    await served.daemon.create()
    data = os.urandom(3 << 20)
    echoed = await banger(served, "vm", "exec", "web", "--", "cat", stdin=data)
    assert hashlib.sha256(echoed.out).digest() == hashlib.sha256(data).digest()
    ended = await banger(served, "vm", "exec", "web", "--", "exit", str(status))
    assert (ended.status, ended.err) == (status, "")


async def test_exec_in_what_does_not_run(served: api_served.Served) -> None:
    await served.daemon.create(start=False)
    for name in ("web", "nobody"):
        done = await banger(served, "vm", "exec", name, "--", "true")
        assert (done.status, name in done.err) == (125, True)


async def test_run_rm_leaves_nothing(served: api_served.Served) -> None:
    done = await banger(served, "vm", "run", "--rm", "--", "exit", "9")
    assert (done.status, done.out) == (9, b""), done.err
    assert await names(served) == []
    assert served.daemon.world.leftovers() == {}


async def test_run_rm_waits_for_its_own_deletion(served: api_served.Served) -> None:
    """Not for that of an earlier VM of its name, which has ended."""

    async def takes_a_moment(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.KillVmm):
            await asyncio.sleep(0.5)

    words = ("vm", "run", "--rm", "--name", "web", "--", "exit", "0")
    assert (await banger(served, *words)).status == 0
    served.daemon.world.before = takes_a_moment
    assert (await banger(served, *words)).status == 0
    assert await names(served) == []


async def test_run_keeps_the_vm_without_rm(served: api_served.Served) -> None:
    done = await banger(served, "vm", "run", "--name", "web", "--", "exit", "0")
    assert (done.status, "web goes on" in done.err) == (0, True), done.err
    assert await names(served) == ["web"]


@pytest.mark.parametrize(
    ("method", "path", "said"),
    [
        ("POST", "/v1/vms/web/stop", "web is being stopped"),
        ("POST", "/v1/vms/web/kill", "web is being killed"),
        ("DELETE", "/v1/vms/web", "web is being deleted"),
        ("", "", "`banger vm explain NAME` says which"),
    ],
)
async def test_run_does_not_say_that_a_vm_goes_on_which_ended_meanwhile(
    served: api_served.Served, method: str, path: str, said: str
) -> None:
    command = ("vm", "run", "--name", "web", "--", "cat")
    with cli_process.Cli(served.path).started(*command) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"here")
        assert await asyncio.to_thread(process.stdout.read, 4) == b"here"
        if method:
            await served.done(method, path)
        else:
            (vm,) = served.daemon.world.vms.values()
            assert vm.vmm is not None
            await vm.vmm.kill()
        assert await asyncio.to_thread(process.wait, cli_process.DEADLINE_S) == 125
        err = process.stderr.read().decode()
    assert said in err
    assert "goes on" not in err


async def test_run_does_not_say_that_a_vm_goes_on_which_is_being_stopped(
    served: api_served.Served,
) -> None:
    """Its command ends as the guest goes down, before the VM has ended."""
    with cli_process.Cli(served.path).started("vm", "run", "--name", "web", "--", "cat") as process:
        stdin = process.stdin
        assert stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None

        async def ends_the_command(kind: guest.FrameType, part: str) -> None:
            if (kind, part) == (guest.FrameType.FLUSH, "before"):
                stdin.close()
                await asyncio.to_thread(process.wait, cli_process.DEADLINE_S)

        served.daemon.world.behaviour.on_agent = ends_the_command
        stdin.write(b"here")
        assert await asyncio.to_thread(process.stdout.read, 4) == b"here"
        await served.done("POST", "/v1/vms/web/stop")
        assert process.returncode == 0
        err = process.stderr.read().decode()
    assert "web is being stopped" in err
    assert "goes on" not in err


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set once the daemon was told to cancel something, which no client that was killed can see."""
    happened = asyncio.Event()
    request_cancel = operations.Operations.request_cancel

    def told(self: operations.Operations, operation_id: str) -> None:
        happened.set()
        request_cancel(self, operation_id)

    monkeypatch.setattr(operations.Operations, "request_cancel", told)
    return happened


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_run_ended_while_it_starts_leaves_nothing(
    served: api_served.Served, cancelled: asyncio.Event, number: signal.Signals
) -> None:
    async def until_cancelled(_: privileged.Request[Any]) -> None:
        await cancelled.wait()

    served.daemon.world.before = until_cancelled
    with cli_process.Cli(served.path).started("vm", "run", "--rm", "--", "true") as process:
        assert process.stderr is not None
        assert await asyncio.to_thread(process.stderr.readline)
        process.send_signal(number)
        status = await asyncio.to_thread(process.wait, cli_process.DEADLINE_S)
        said = process.stderr.read().decode()
    async with asyncio.timeout(cli_process.DEADLINE_S):
        await cancelled.wait()
    (operation,) = [
        operation
        for operation in await served.get("/v1/operations", list[resources.Operation])
        if operation.kind == "vm.create"
    ]
    assert (await served.daemon.done(operation)).status is resources.OperationStatus.CANCELLED
    assert status == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number], said
    assert number is not signal.SIGINT or "nothing is left of" in said
    assert await names(served) == []
    assert served.daemon.world.leftovers() == {}


async def test_run_rm_whose_client_is_killed_is_deleted(served: api_served.Served) -> None:
    with cli_process.Cli(served.path).started("vm", "run", "--rm", "--", "cat") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x")
        assert await asyncio.to_thread(process.stdout.read, 1) == b"x"
        process.kill()
        await asyncio.to_thread(process.wait)
    kinds: list[str] = []
    async with asyncio.timeout(cli_process.DEADLINE_S):
        while "vm.delete" not in kinds:
            found = await served.get("/v1/operations", list[resources.Operation])
            kinds = [operation.kind for operation in found]
    for operation in found:
        await served.daemon.done(operation)
    assert await names(served) == []
    assert served.daemon.world.leftovers() == {}


async def test_a_proxy_passes_bytes_to_the_guests_ssh_port(served: api_served.Served) -> None:
    await served.daemon.create()
    data = os.urandom(3 << 20)
    echoed = await banger(served, "vm", "proxy", "web.vm", stdin=data)
    assert (echoed.status, echoed.err) == (0, "")
    assert hashlib.sha256(echoed.out).digest() == hashlib.sha256(data).digest()


async def test_a_port_where_nobody_listens_says_where_to_look(served: api_served.Served) -> None:
    served.daemon.world.behaviour.late_service = 1 << 20
    await served.daemon.create()
    refused = await banger(served, "vm", "proxy", "web", "8080")
    said, hint, *_ = refused.err.splitlines()
    assert (refused.status, said) == (1, "banger: error: nothing listens on port 8080 of web")
    assert "`banger vm ports web`" in hint
    waited = await banger(served, "vm", "proxy", "--wait", "1", "web")
    said, hint, *_ = waited.err.splitlines()
    assert (waited.status, said) == (1, "banger: error: no ssh server listens in web after 1 s")
    assert "`banger vm logs web`" in hint
    assert "`banger vm exec web`" in hint


async def test_vm_ssh_becomes_ssh_with_bangers_own_settings(
    served: api_served.Served, tmp_path: Path
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nfor each; do echo "$each"; done\nexit 7\n')
    ssh.chmod(0o755)
    await served.daemon.create()
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    asked = await banger(served, "vm", "ssh", "web", "-v", "--", "echo", "a b", "$HOME", env=env)
    lines = asked.text.splitlines()
    assert asked.status == 7
    assert lines[:3] == ["-F", "none", "-v"]
    assert lines[-2:] == ["web.vm", "echo 'a b' '$HOME'"]
    assert f"IdentityFile={served.daemon.paths.state}/ssh/id_ed25519" in lines
    bare = await banger(served, "vm", "ssh", "web", "-vp", "22", "-o", "A=b", "ls", "-l", "a b", env=env)
    lines = bare.text.splitlines()
    assert lines[2:6] == ["-vp", "22", "-o", "A=b"]
    assert lines[-2:] == ["web.vm", "ls -l 'a b'"]
    assert (await banger(served, "vm", "ssh", "web", "ls", "--", "x", env=env)).status == 2
    await served.done("POST", "/v1/vms/web/stop")
    stopped = await banger(served, "vm", "ssh", "web", env=env)
    assert (stopped.status, "vm start web" in stopped.err) == (125, True)


async def test_unpublishing_says_what_was_not_published(served: api_served.Served) -> None:
    port = publishing.free_port()
    await banger(served, "vm", "create", "web", "--no-start", "-p", f"{port}:80")
    wrong = await banger(served, "vm", "unpublish", "web", f"{port}:81")
    assert wrong.text == f"127.0.0.1:{port}:80/tcp\n"
    assert wrong.err == f"banger: web does not publish {port}:81\n"
    right = await banger(served, "vm", "unpublish", "web", f"{port}:80")
    assert (right.status, right.text, right.err) == (0, "", "")


async def test_a_port_of_this_host_is_enough_to_unpublish(served: api_served.Served) -> None:
    one, two = publishing.free_port(), publishing.free_port()
    published = (f"{one}:80", f"{one}:53/udp", f"0.0.0.0:{two}:80")
    await banger(
        served, "vm", "create", "web", "--no-start", *(w for each in published for w in ("-p", each))
    )
    half = await banger(served, "vm", "unpublish", "web", f"{one}/udp")
    assert half.text.splitlines() == [f"127.0.0.1:{one}:80/tcp", f"0.0.0.0:{two}:80/tcp"]
    rest = await banger(served, "vm", "unpublish", "web", str(one), f"{two}/tcp")
    assert (rest.status, rest.text, rest.err) == (0, "", "")
    none = await banger(served, "vm", "unpublish", "web", str(one))
    assert (none.status, none.err) == (0, f"banger: web does not publish {one}\n")
    wrong = await banger(served, "vm", "unpublish", "web", "80x")
    assert (wrong.status, "is not HOSTPORT:GUESTPORT" in wrong.err) == (2, True)


_PINNING_SSH = """#!/bin/sh
for each; do
    case $each in UserKnownHostsFile=*) pinned=${each#*=} ;; esac
done
touch "${pinned%/%n}/$each"
"""
"""Pins as OpenSSH does: %n is the host as it was given, here the last word."""


async def test_a_host_key_is_pinned_under_what_is_forgotten_with_the_vm(
    served: api_served.Served, tmp_path: Path
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(_PINNING_SSH)
    ssh.chmod(0o755)
    made = await served.daemon.create()
    assert made.vm is not None
    pinned = served.daemon.paths.state / "ssh" / "hosts"
    for ref in (made.vm.id, made.vm.id[:6]):
        asked = await banger(served, "vm", "ssh", ref, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
        assert (asked.status, os.listdir(pinned)) == (0, ["web.vm"])
        refused = await banger(served, "vm", "proxy", f"{ref}.vm")
        assert (refused.status, "ssh web.vm" in refused.err) == (1, True)
    assert (await banger(served, "vm", "proxy", made.vm.id, stdin=b"SSH-2")).out == b"SSH-2"
    await served.done("DELETE", "/v1/vms/web")
    assert os.listdir(pinned) == []


async def test_ssh_config_is_installed_and_taken_away(served: api_served.Served, tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path)}
    printed = await banger(served, "ssh-config", env=env)
    assert printed.text.count("Host ") == 1
    assert os.listdir(tmp_path) == []
    assert (await banger(served, "ssh-config", "--install", env=env)).status == 0
    assert (tmp_path / ".ssh" / "banger.conf").read_text() == printed.text
    assert (await banger(served, "ssh-config", "--uninstall", env=env)).text == "removed\n"
    assert os.listdir(tmp_path) == []
    assert (await banger(served, "ssh-config", "--json", env=env)).json == {"config": printed.text}
    for option, changed in (("--install", True), ("--install", False), ("--uninstall", True)):
        told = await banger(served, "ssh-config", option, "--json", env=env)
        assert told.json == {"changed": changed}
