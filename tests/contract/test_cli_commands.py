# SPDX-License-Identifier: MIT
"""The commands other than exec and run, end to end against a daemon of rows."""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from banger.contract import errors, guest, resources
from tests.contract import cli_process
from tests.fakes import daemon

STRANGER = """
import importlib, locale, os, pkgutil, sys
from banger import archive, cli, workspace
for package in (cli, workspace):
    for each in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(each.name)
from banger.cli import main
os.setgroups([])
os.setuid(65534)
sys.exit(main.run(sys.argv[1:]))
"""


@pytest.fixture
def fake() -> Iterator[daemon.FakeDaemon]:
    """A daemon with a running VM, `web`, and a stopped one, `db`."""
    with cli_process.fake_daemon() as made:
        made.add_vm("web")
        made.add_vm("db", "stopped")
        yield made


def test_create_prints_the_name_and_the_stages(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    done = cli.run(
        "vm", "create", "mine", "--vcpu", "2", "--memory", "2G", "--disk-size", "10G", "--no-network"
    )
    assert (done.status, done.text) == (0, "mine\n")
    asked = next(body for method, path, body in fake.asked if (method, path) == ("POST", "/v1/vms"))
    assert asked == {
        "name": "mine",
        "vcpus": 2,
        "memory_mib": 2048,
        "disk_size_mib": 10240,
        "network": False,
        "ipv6": None,
        "nat": None,
        "egress": None,
        "allow": [],
        "peer_network": "",
        "publish": [],
        "idle_stop_s": 0,
        "ttl_s": 0,
        "autostart": False,
        "start": True,
        "image": None,
        "kernel": None,
        "remove_on_failure": False,
        "for_command": False,
        "needs_git": False,
        "needs_mise": False,
    }
    assert re.search(r"banger: mine: 0\.0\ds \(preflight 0\.01s, .*finalize 0\.01s\)", done.err)
    lines = [line.split()[0] for line in done.err.splitlines()]
    assert [lines.count(stage) for stage in daemon.STAGES] == [1] * len(daemon.STAGES)


def test_create_json_has_events_on_stderr_and_one_document_on_stdout(cli: cli_process.Cli) -> None:
    for arguments in (("--json", "vm", "create", "one"), ("vm", "create", "two", "--json")):
        done = cli.run(*arguments)
        assert done.json["state"] == "running"
        events = [json.loads(line) for line in done.err.splitlines()]
        assert [event["stage"] for event in events if event["kind"] == "stage"] == list(daemon.STAGES)


def test_create_without_start(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    cli.run("vm", "create", "mine", "--no-start")
    assert fake.vm_named("mine").state == "created"  # type: ignore[union-attr]


def test_many_names_go_on_after_an_error(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    done = cli.run("vm", "stop", "nobody", "web", "db", "web")
    assert (done.status, done.text) == (1, "web\ndb\n")
    assert "there is no VM 'nobody'" in done.err
    assert "hint: `banger vm list`" in done.err
    assert sum(path.endswith("/stop") for _, path, _ in fake.asked) == 3


def test_many_names_in_json_tell_of_each(cli: cli_process.Cli) -> None:
    done = cli.run("vm", "delete", "nobody", "web", "--json")
    assert done.status == 1
    nobody, web = done.json
    assert (nobody["ok"], nobody["error"]["code"]) == (False, "not_found")
    assert nobody["error"]["op_id"] == "0123456789ab"
    assert web == {"name": "web", "ok": True}


@pytest.mark.parametrize(
    ("verb", "state"), [("start", "running"), ("restart", "running"), ("kill", "stopped")]
)
def test_lifecycle(cli: cli_process.Cli, fake: daemon.FakeDaemon, verb: str, state: str) -> None:
    assert cli.run("vm", verb, "web", "db").status == 0
    assert {vm.state for vm in fake.vms.values()} == {resources.VmState(state)}


def test_failed_operation_says_what_step_and_what_to_do(
    cli: cli_process.Cli, fake: daemon.FakeDaemon
) -> None:
    fake.behaviour.fail = errors.ErrorBody(
        code="no_space",
        message="no space",
        hint="free some",
        step="system_overlay",
        also=("rollback_tap: busy",),
    )
    done = cli.run("vm", "start", "db")
    assert done.status == 1
    for line in (
        "banger: error: no space",
        "step: system_overlay",
        "also: rollback_tap: busy",
        "hint: free some",
    ):
        assert line in done.err
    assert re.search(r"operation: [0-9a-f]{12}", done.err)


def test_interrupted_start_is_cancelled(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    fake.behaviour.stay_in_stage = "start"
    with cli.started("vm", "start", "db", "web") as process:
        assert fake.reached.wait(cli_process.DEADLINE_S)
        process.send_signal(signal.SIGINT)
        assert process.wait(cli_process.DEADLINE_S) == 1
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert said.count("was cancelled") == 2
    assert "`banger vm explain db` says how it is now" in said, "a restart leaves it stopped"
    assert {running.operation.status for running in fake.operations.values()} == {"cancelled"}


def test_more_vms_than_a_process_may_have_files_are_waited_for(
    cli: cli_process.Cli, fake: daemon.FakeDaemon
) -> None:
    """Each has a connection of its own; the limit that shells set is low, and may be raised."""
    fake.behaviour.stay_in_stage = "start"
    names = [f"v{number}" for number in range(60)]
    for name in names:
        fake.add_vm(name, "stopped")
    few = (32, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    with cli.started("vm", "start", *names) as process:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, few)
        assert process.stderr is not None
        heard = [process.stderr.readline() for _ in names]
        process.send_signal(signal.SIGINT)
        said = b"".join([*heard, *process.stderr]).decode()
    assert said.count("was cancelled") == len(names), said


def test_interrupted_stop_goes_on_in_the_daemon(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    fake.behaviour.stay_in_stage = "stop"
    with cli.started("vm", "stop", "web") as process:
        assert fake.reached.wait(cli_process.DEADLINE_S)
        process.send_signal(signal.SIGINT)
        assert process.wait(cli_process.DEADLINE_S) == 130
        assert process.stderr is not None
        assert b"bangerd finishes it" in process.stderr.read()
    assert [running.operation.status for running in fake.operations.values()] == ["running"]


def test_list_is_a_table_names_or_json(cli: cli_process.Cli) -> None:
    lines = cli.run("vm", "list").text.splitlines()
    assert lines[0].split() == ["NAME", "STATE", "IMAGE", "CPU", "MEMORY", "ADDRESS", "CREATED", "UPTIME"]
    assert re.match(r"web +running +debian-bookworm +1 +512 MiB +172\.31\.240\.2 ", lines[1])
    assert cli.run("vm", "list", "-q").text == "web\ndb\n"
    assert cli.run("vm", "list", "-q", "--state", "stopped").text == "db\n"
    for arguments in (
        ("vm", "list", "--format", "json"),
        ("vm", "list", "--json"),
        ("--json", "vm", "list"),
    ):
        assert [vm["name"] for vm in cli.run(*arguments).json] == ["web", "db"]


def test_ps_lists_what_runs(cli: cli_process.Cli) -> None:
    assert cli.run("ps", "-q").text == "web\n"
    assert cli.run("ps", "-aq").text == "web\ndb\n"


def test_what_a_guest_says_cannot_drive_the_terminal(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    fake.add_vm("evil", image="\x1b[2J\x9b\u202eimage", address="1\n2")
    done = cli.run("vm", "list")
    assert "\\x1b[2J\\x9b\\u202eimage" in done.text
    assert "1\\x0a2" in done.text
    fake.behaviour.detail = "\x1b]0;title\x07"
    assert "\x1b" not in cli.run("vm", "create", "other").err


def test_show_says_where_sizes_come_from_and_what_failed(
    cli: cli_process.Cli, fake: daemon.FakeDaemon
) -> None:
    failed = errors.ErrorBody(code="timed_out", message="no answer", hint="look at the console", step="tap")
    sources = {"vcpus": resources.SizeSource.HOST, "memory_mib": resources.SizeSource.REQUEST}
    timing = resources.StepTiming(name="tap", stage="prepare_host_features", started_ms=1, elapsed_ms=2.5)
    part = msgspec.structs.replace(timing, name="prepare_work_disk", stage="", elapsed_ms=2)
    fake.add_vm("bad", "error", last_error=failed, sources=sources, last_start=(timing, part))
    shown = cli.run("vm", "show", "bad").text
    for line in (
        r"cpus: +1 \(from this host's size\)",
        r"memory: +512 MiB \(as asked\)",
        r"last error: +no answer",
        r"step: +tap",
        r"hint: +look at the console",
        r"last start: +3\.5 ms; `banger vm explain bad` shows its steps\n +prepare_host_features: +2\.5 ms$",
    ):
        assert re.search(line, shown), line
    assert cli.run("vm", "show", "bad", "--json").json["last_error"]["step"] == "tap"


def test_show_shows_whom_it_finds_and_says_whom_it_does_not(
    cli: cli_process.Cli, fake: daemon.FakeDaemon
) -> None:
    fake.add_vm("web")
    alone = cli.run("vm", "show", "nobody")
    shown = cli.run("vm", "show", "nobody", "web", "nothing")
    assert (shown.status, alone.status) == (1, 1)
    assert re.match(r"name: +web\n", shown.text)
    assert [line for line in shown.err.splitlines() if "nobody" in line and "nothing" in line]
    listed = cli.run("vm", "show", "web", "nobody", "--json")
    assert [vm["name"] for vm in listed.json] == ["web"]
    assert (listed.status, listed.err) == (1, cli.run("vm", "show", "nobody", "--json").err)


def test_show_says_the_addresses_and_what_they_reach(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    fake.add_vm("four")
    fake.add_vm("six", address6="fd12::2", nat=True, allow=("2001:db8::/32",))
    assert "IPv6" not in cli.run("vm", "show", "four").text
    shown = cli.run("vm", "show", "six").text
    assert re.search(r"address: +172\.31\.240\.2\n *IPv6 address: +fd12::2\n", shown)
    assert re.search(r"reaches: +the internet, 2001:db8::/32\n", shown)


def test_create_asks_for_ipv6_or_for_none(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    for word, asked in (("--ipv6", True), ("--no-ipv6", False)):
        assert cli.run("vm", "create", word.strip("-"), word).status == 0
        body = [body for method, path, body in fake.asked if (method, path) == ("POST", "/v1/vms")][-1]
        assert body["ipv6"] is asked


def test_set_changes_a_stopped_vm(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    assert cli.run("vm", "set", "db", "--memory", "4G", "--name", "shop").text == "shop\n"
    assert fake.vm_named("shop").memory_mib == 4096  # type: ignore[union-attr]
    assert "is running" in cli.run("vm", "set", "web", "--vcpu", "2").err
    assert cli.run("vm", "set", "shop").status == 2


def test_logs_are_raw_in_a_pipe_and_safe_on_a_terminal(
    cli: cli_process.Cli, fake: daemon.FakeDaemon
) -> None:
    fake.behaviour.logs = b"boot\r\n\x1b[32mok\x1b[0m\xff\x1b[2J\n"
    assert cli.run("vm", "logs", "web").out == fake.behaviour.logs
    with cli.on_terminal("vm", "logs", "web") as terminal:
        assert terminal.wait() == 0
    assert "\x1b[32mok\x1b[0m\ufffd\\x1b[2J" in terminal.seen.decode()


def test_a_silent_console_says_where_to_look(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    promised = f"{guest.NO_CONSOLE}\n".encode()
    for words, said in ((("logs",), b""), (("logs",), promised), (("console",), b"")):
        fake.behaviour.logs = said
        done = cli.run("vm", *words, "web")
        assert done.out == said
        assert "`banger vm logs --source vmm web`" in done.err
        assert "--kernel debian-6.12" in done.err
    assert cli.run("vm", "logs", "--source", "vmm", "web").err == ""
    fake.behaviour.logs = b"boot\n"
    assert cli.run("vm", "logs", "web").err == ""


def test_what_goes_on_until_interrupted_ends_without_an_error(cli: cli_process.Cli) -> None:
    with cli.started("vm", "stats", "--watch", "web") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(cli_process.DEADLINE_S) == 130
        assert process.stderr.read() == b""


def test_stats(cli: cli_process.Cli) -> None:
    assert re.search(r"web +1\.0s +1 MiB +0 B / 1 MiB", cli.run("vm", "stats").text)
    assert cli.run("vm", "stats", "web", "--json").json["cpu_usec"] == 1 << 20


def test_a_recipe_of_ones_own(cli: cli_process.Cli, fake: daemon.FakeDaemon, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('extends = "busybox"\nname = "mine"\n')
    assert cli.run("image", "build", str(tmp_path / "mine.toml")).text == "mine\n"
    (tmp_path / "large.toml").write_text("#" * 300_000)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for name in ("missing", "large", "binary"):
        failed = cli.run("image", "build", str(tmp_path / f"{name}.toml"))
        assert failed.status != 0
        assert f"{name}.toml" in failed.err


def test_images_of_registries_go_by_their_references(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    name = "ghcr.io/team/app:1.0"
    assert cli.run("image", "pull", name, "--size", "2G").text == f"{name}\n"
    assert cli.run("image", "list", "-q").text == f"{name}\n"
    assert name in cli.run("image", "show", name).text
    assert cli.run("image", "promote", name, "--name", "base").text == "base\n"
    assert cli.run("image", "delete", name).text == f"{name}\n"
    assert list(fake.images) == ["base"]
    gone = cli.run("image", "show", name)
    assert (gone.status, f"banger image pull {name}" in gone.err) == (1, True)


def test_deleting_the_default_image_says_what_comes_of_it(
    cli: cli_process.Cli, fake: daemon.FakeDaemon
) -> None:
    for name in ("base", "other"):
        assert cli.run("image", "build", name).status == 0
    fake.images["base"] = msgspec.structs.replace(fake.images["base"], is_default=True)
    assert "default:" in cli.run("image", "show", "base").text
    assert cli.run("image", "delete", "other").err == ""
    done = cli.run("image", "delete", "nothing", "base")
    assert (done.status, done.text) == (1, "base\n")
    assert "no image is named are made from base: the next one gets it again" in done.err


def test_images_are_imported(cli: cli_process.Cli, fake: daemon.FakeDaemon, tmp_path: Path) -> None:
    assert cli.run("image", "import", str(tmp_path), "--name", "mine", "--image", "v1").text == "mine\n"
    assert cli.run("image", "import", str(tmp_path / "absent"), "--name", "mine").status == 2
    assert cli.run("image", "import", str(tmp_path)).status == 2


def test_the_cache_says_what_it_frees(cli: cli_process.Cli) -> None:
    assert (
        cli.run("image", "cache", "prune", "--dry-run").text
        == "1 blob, packages of 1 recipe, would free 1 MiB\n"
    )
    assert cli.run("image", "cache", "prune").text == "1 blob, packages of 1 recipe, freed 1 MiB\n"
    assert '"size_bytes"' in cli.run("image", "cache", "prune", "--json").text


def test_images_and_kernels(cli: cli_process.Cli, fake: daemon.FakeDaemon, tmp_path: Path) -> None:
    assert cli.run("image", "build", "debian-bookworm").text == "debian-bookworm\n"
    assert cli.run("image", "register", str(tmp_path), "--name", "mine").text == "mine\n"
    assert cli.run("kernel", "pull", "generic-6.12").text == "generic-6.12\n"
    assert cli.run("kernel", "import", str(tmp_path), "--name", "own").text == "own\n"
    assert cli.run("image", "list", "-q").text == "debian-bookworm\nmine\n"
    assert cli.run("kernel", "list", "--available", "-q").text == "generic-6.12\nown\n"
    assert "40 MiB" in cli.run("image", "show", "mine").text
    assert "boots directly" in cli.run("kernel", "show", "own").text
    done = cli.run("image", "delete", "nothing", "mine")
    assert (done.status, done.text) == (1, "mine\n")
    assert cli.run("kernel", "delete", "own").err == ""
    fake.images["debian-bookworm"] = msgspec.structs.replace(
        fake.images["debian-bookworm"], default_kernel="own"
    )
    assert cli.run("kernel", "import", str(tmp_path), "--name", "own").status == 0
    assert "VMs of debian-bookworm boot own where no other" in cli.run("kernel", "delete", "own").err
    assert (list(fake.images), list(fake.kernels)) == (["debian-bookworm"], ["generic-6.12"])


def test_runtime_status_fails_when_files_are_missing(cli: cli_process.Cli) -> None:
    done = cli.run("runtime", "status")
    assert done.status == 1
    assert re.search(r"firecracker +- +no +no", done.text)
    assert "banger runtime pull" in done.err


def test_version_is_no_error_without_a_daemon(cli: cli_process.Cli, tmp_path: Path) -> None:
    assert "bangerd:" in cli.run("version").text
    alone = cli_process.Cli(tmp_path / "none.sock").run("version", "--json")
    assert (alone.status, alone.json["daemon"]) == (0, None)


def test_no_daemon_is_one_clear_error(tmp_path: Path) -> None:
    done = cli_process.Cli(tmp_path / "none.sock").run("vm", "stop", "a", "b")
    assert done.status == 1
    assert done.err.count("banger: error: ") == 1
    asked = cli_process.Cli(tmp_path / "none.sock").run("vm", "list", "--json")
    assert json.loads(asked.err)["error"]["code"] == "unavailable"


def test_a_socket_whose_path_is_too_long_is_said(tmp_path: Path) -> None:
    """The kernel takes 107 bytes, and would say no more than that the path is too long."""
    path = tmp_path / ("deep" * 27)
    done = cli_process.Cli(path).run("vm", "list")
    assert (done.status, f"socket path {path} is longer than 107 bytes" in done.err) == (2, True)


def test_a_stranger_is_told_whose_socket_it_is(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    """As nobody, after the imports: an interpreter in somebody's home is closed to others too."""
    fake.path.parent.chmod(0o700)
    done = as_nobody(cli, "vm", "list")
    assert done.returncode == 1
    assert b"you may not use" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--help",), b"vm"),
        (("version",), b"bangerd: "),
        (("completion", "bash"), b"complete"),
        (("vm", "list"), b"web"),
        (("vm", "stop", "web"), b"web"),
    ],
)
def test_no_command_of_the_owners_needs_root(
    cli: cli_process.Cli, fake: daemon.FakeDaemon, words: Sequence[str], said: bytes
) -> None:
    """Whoever may use the socket: here nobody, who has no home either."""
    fake.path.parent.chmod(0o755)
    fake.path.chmod(0o666)
    done = as_nobody(cli, *words)
    assert (done.returncode, done.stderr if done.returncode else b"") == (0, b"")
    assert said in done.stdout


def as_nobody(cli: cli_process.Cli, *words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", STRANGER, *words],
        env=cli.environment(HOME="/nonexistent"),
        capture_output=True,
        timeout=cli_process.DEADLINE_S,
        check=False,
    )


def test_reader_that_leaves_is_no_error(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    fake.behaviour.logs = b"x" * (8 << 20)
    with cli.started("vm", "logs", "web") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(cli_process.DEADLINE_S) == 141
        assert process.stderr.read() == b""


def complete(cli: cli_process.Cli, line: str, **env: str) -> list[str]:
    words = line.split(" ")
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_BANGER_COMPLETE": "bash_complete"}
    done = cli.run(env=asked | env)
    assert (done.status, done.err) == (0, "")
    return [item.partition(",")[2] if item.startswith("plain,") else item for item in done.text.split()]


def test_completion(cli: cli_process.Cli, tmp_path: Path) -> None:
    assert complete(cli, "banger ru") == ["runtime"]
    assert complete(cli, "banger vm st") == ["start", "stop", "stats"]
    assert complete(cli, "banger vm stop ") == ["web", "db"]
    assert complete(cli, "banger vm stop web ") == ["db"]
    assert complete(cli, "banger vm exec w") == ["web"]
    assert "--memory" in complete(cli, "banger vm create --m")
    assert complete(cli, "banger vm cp no") == ["file,no"]
    assert complete(cli, "banger vm cp we") == ["web:", "file,we"]
    assert complete(cli, "banger vm cp notes web:/r", BANGER_SOCKET=str(tmp_path / "none")) == []
    assert complete(cli, "banger vm run ./s") == ["dir,./s"]
    assert complete(cli, "banger vm stop ", BANGER_SOCKET=str(tmp_path / "none")) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(cli: cli_process.Cli, shell: str) -> None:
    assert "_BANGER_COMPLETE" in cli.run("completion", shell).text


def test_live_display_shows_stages_and_leaves_nothing(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    fake.behaviour.stay_in_stage = "boot_firecracker"
    with cli.on_terminal("vm", "create", "mine") as terminal:
        terminal.read_until(b"boot_firecracker")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.wait() == 130
    assert b"\x1b[?25l" in terminal.seen
    assert terminal.seen.rindex(b"\x1b[?25h") > terminal.seen.rindex(b"\x1b[?25l")
    assert b"mine is kept, error" in terminal.seen


def test_no_colour_obeyed(cli: cli_process.Cli) -> None:
    with cli.on_terminal("vm", "show", "nobody") as terminal:
        terminal.wait()
    assert b"\x1b[1;31m" in terminal.seen
    with cli.on_terminal("vm", "show", "nobody", NO_COLOR="1") as terminal:
        terminal.wait()
    assert b"\x1b[" not in terminal.seen
