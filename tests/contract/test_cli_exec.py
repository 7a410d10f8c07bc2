# SPDX-License-Identifier: MIT
"""`vm exec` and `vm run` as a user meets them: bytes, signals, terminals and exit statuses, end to end."""

from __future__ import annotations

import asyncio
import fcntl
import filecmp
import os
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from banger.contract import errors, resources
from tests.contract import cli_process, repositories, workspaces
from tests.fakes import daemon

STUBBORN = """
import signal
signal.signal(signal.SIGINT, lambda *_: print("no", flush=True))
print("ready", flush=True)
while True:
    signal.pause()
"""


@pytest.mark.parametrize("status", [0, 1, 2, 125, 255])
def test_exit_status_is_the_commands_and_silent(cli: cli_process.Cli, status: int) -> None:
    done = cli.run("vm", "exec", "web", "--", "sh", "-c", f"exit {status}")
    assert (done.status, done.out, done.err) == (status, b"", "")


def test_signal_gives_128_plus_its_number(cli: cli_process.Cli) -> None:
    done = cli.run("vm", "exec", "web", "--", "sh", "-c", "kill -TERM $$")
    assert (done.status, done.err) == (143, "")


def test_argv_arrives_exactly(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    argv = ["printf", "%s|", "a b", "", "$HOME", "--json", "--", "-x", "ä\n", "*"]
    done = cli.run("vm", "exec", "web", "--", *argv)
    assert list(fake.execs[0].argv) == argv
    assert done.text == "a b||$HOME|--json|--|-x|ä\n|*|"


async def test_a_line_for_a_shell_is_told_how_to_get_one(guest: workspaces.Guest) -> None:
    told = "no shell reads that; to have one: `-- sh -c 'ls | wc -l'`"
    assert told in (await guest.banger("vm", "exec", "web", "--", "ls | wc -l", status=127)).err
    for words in (("sh", "-c", "exit 127"), ("nothing-here",)):
        assert "no shell" not in (await guest.banger("vm", "exec", "web", "--", *words, status=127)).err


async def test_a_directory_where_no_command_can_begin_is_named_with_what_to_do(
    guest: workspaces.Guest, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    none, file = f"{tmp_path}/no ne", f"{tmp_path}/file"
    said = await guest.banger("vm", "exec", "--cwd", none, "web", "ls", status=125)
    assert f"cannot begin in {none} of web: No such file or directory" in said.err
    assert f"make it: `banger vm exec --cwd / web -- mkdir -p '{none}'`" in said.err
    said = await guest.banger("vm", "exec", "--cwd", file, "web", "ls", status=125)
    assert f"cannot begin in {file} of web: Not a directory" in said.err
    assert "mkdir" not in said.err
    repositories.plain(guest.source)
    await guest.prepare()
    shutil.rmtree(guest.repo)
    said = await guest.banger("vm", "exec", "web", "ls", status=125)
    assert f"cannot begin in {guest.repo} of web: No such file" in said.err
    assert "--cwd / begins elsewhere" in said.err
    assert (await guest.banger("vm", "exec", "--cwd", "/", "web", "pwd")).text == "/\n"


def test_command_without_dashes_may_have_options(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    cli.run("vm", "exec", "-u", "www", "--cwd", "/tmp", "web", "echo", "-n", "x")
    assert fake.execs[0].argv == ("echo", "-n", "x")
    assert (fake.execs[0].user, fake.execs[0].cwd) == ("www", "/tmp")


def test_options_between_name_and_dashes(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    done = cli.run("vm", "exec", "web", "-e", "A=1", "-e", "HERE", "--", "env", env={"HERE": "yes"})
    assert fake.execs[0].env == ("A=1", "HERE=yes")
    assert "A=1\n" in done.text


def test_stdout_and_stderr_stay_apart(cli: cli_process.Cli) -> None:
    done = cli.run("vm", "exec", "web", "--", "sh", "-c", "echo out; echo err >&2")
    assert (done.out, done.err) == (b"out\n", "err\n")


async def test_an_empty_word_is_no_command_and_may_be_an_argument(guest: workspaces.Guest) -> None:
    """As of a variable that is not set."""
    refused = await guest.banger("vm", "exec", "web", "--", "", "x", status=125)
    assert "the command's first word is empty" in refused.err
    assert (await guest.banger("vm", "exec", "web", "--", "printf", "<%s>", "")).text == "<>"


async def test_256_mib_each_way_arrive_intact(guest: workspaces.Guest, tmp_path: Path) -> None:
    """From file to file: the command line, the daemon, the real agent, and all the way back."""
    block = os.urandom(1 << 20)
    with (tmp_path / "in").open("wb") as file:
        for number in range(256):
            file.write(number.to_bytes(4, "big") + block[4:])
    cli = cli_process.Cli(guest.served.path)
    argv = cli.argv("vm", "exec", "web", "--", "cat")
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as target:
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=source, stdout=target, stderr=asyncio.subprocess.PIPE, env=cli.environment()
        )
        _, said = await process.communicate()
    assert (process.returncode, said) == (0, b"")
    assert filecmp.cmp(tmp_path / "in", tmp_path / "out", shallow=False)


def test_input_that_is_a_file_or_closed(cli: cli_process.Cli, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(b"x" * 70_000)
    with source.open("rb") as file:
        assert cli.run("vm", "exec", "web", "--", "wc", "-c", stdin=file).text.strip() == "70000"
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *cli.argv("vm", "exec", "web", "--", "wc", "-c")],
        env=cli.environment(),
        capture_output=True,
        timeout=cli_process.DEADLINE_S,
        check=False,
    )
    assert closed.stdout.strip() == b"0"


def test_no_stdin_leaves_the_callers_input_alone(cli: cli_process.Cli) -> None:
    done = cli.run("vm", "exec", "-n", "web", "--", "wc", "-c", stdin=b"untouched")
    assert done.text.strip() == "0"


def test_a_slow_reader_holds_the_command_back(cli: cli_process.Cli) -> None:
    """Back-pressure: neither we nor the daemon take in what nobody reads."""
    with cli.started("vm", "exec", "web", "--", "sh", "-c", "yes | head -c 300M") as process:
        assert process.stdout is not None
        assert process.stdout.read(2) == b"y\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        rss_kib = int(Path(f"/proc/{process.pid}/status").read_text().split("VmHWM:")[1].split()[0])
        assert rss_kib < 60_000


def test_one_pipe_for_both_outputs_that_nobody_reads_holds_up_no_signal(
    cli: cli_process.Cli, tmp_path: Path
) -> None:
    """When it has room for one of them both see that. Where its reader stops is different each time."""
    heard = tmp_path / "heard"
    script = f"trap '' USR1; yes & yes >&2 & trap 'echo >>{heard}' USR1; : >{heard}; while :; do wait; done"
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    argv = cli.argv("vm", "exec", "web", "--", "bash", "-c", script)
    with subprocess.Popen(argv, stdout=writer, stderr=writer, env=cli.environment()) as process:
        os.close(writer)
        try:
            for count in range(1, 16):
                for _ in range(200):
                    os.read(reader, 4096)
                wait_for_size(heard, count - 1)  # the first time, until signals are listened to
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.05)
                process.send_signal(signal.SIGUSR1)
                wait_for_size(heard, count)
        finally:
            os.close(reader)


def test_input_that_nobody_reads_holds_up_no_signal(cli: cli_process.Cli, tmp_path: Path) -> None:
    """All that is on its way is full of it: the client's own pipe is."""
    heard = tmp_path / "heard"
    script = f"trap 'echo >>{heard}; exit 7' INT; : >{heard}; while :; do sleep 0.05; done"
    argv = cli.argv("vm", "exec", "web", "--", "bash", "-c", script)
    with subprocess.Popen(argv, stdin=subprocess.PIPE, env=cli.environment()) as process:
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        wait_for_size(heard, 0)
        waiting = select.poll()
        waiting.register(process.stdin, select.POLLOUT)
        while waiting.poll(1000):
            os.write(process.stdin.fileno(), bytes(4096))
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(cli_process.DEADLINE_S) == 7
        finally:
            process.kill()


def wait_for_size(path: Path, size: int) -> None:
    """Nothing tells us what a command has done, so we look."""
    deadline = time.monotonic() + cli_process.DEADLINE_S
    while not path.exists() or path.stat().st_size < size:
        assert time.monotonic() < deadline, "the signal was not passed on"
        time.sleep(0.01)


def test_reader_that_leaves_ends_it_like_sigpipe(cli: cli_process.Cli) -> None:
    with cli.started("vm", "exec", "web", "--", "yes") as process:
        assert process.stdout is not None
        process.stdout.read(2)
        process.stdout.close()
        assert process.wait(cli_process.DEADLINE_S) == 141


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1]
)
def test_signals_are_passed_on(cli: cli_process.Cli, number: signal.Signals) -> None:
    script = f"trap 'echo got; exit 7' {number.name[3:]}; echo ready; while :; do sleep 0.05; done"
    with cli.started("vm", "exec", "web", "--", "bash", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(cli_process.DEADLINE_S) == 7
        assert process.stdout.read() == b"got\n"


def test_third_interrupt_leaves_a_command_that_ignores_it(cli: cli_process.Cli) -> None:
    with cli.started("vm", "exec", "web", "--", sys.executable, "-c", STUBBORN) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == b"no\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(cli_process.DEADLINE_S) == 130


# --- terminals ---


def test_tty_when_both_ends_are_terminals(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    with cli.on_terminal("vm", "exec", "web", "--", "sh", "-c", "tty; echo $TERM; exit 3") as terminal:
        assert terminal.wait() == 3
    assert b"/dev/pts/" in terminal.seen
    assert b"xterm" in terminal.seen
    assert fake.execs[0].tty
    assert fake.execs[0].rows > 0


def test_no_tty_when_output_is_a_pipe(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    cli.run("vm", "exec", "web", "--", "true")
    assert not fake.execs[0].tty


def test_terminal_is_raw_meanwhile_and_restored_after(cli: cli_process.Cli) -> None:
    with cli.on_terminal(
        "vm", "exec", "web", "--", "sh", "-c", "echo ready; read x; echo got $x"
    ) as terminal:
        terminal.read_until(b"ready")
        assert not termios.tcgetattr(terminal.child_fd)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
        terminal.type(b"hello\r")
        assert terminal.wait() == 0
        assert b"got hello" in terminal.seen
        assert termios.tcgetattr(terminal.child_fd) == terminal.settings_before


@pytest.mark.parametrize("how", ["crash", "term", "command killed"])
def test_terminal_is_restored_whatever_happens(
    cli: cli_process.Cli, fake: daemon.FakeDaemon, how: str
) -> None:
    with cli.on_terminal("vm", "exec", "web", "--", "sh", "-c", "echo ready $$; exec sleep 60") as terminal:
        pid = int(terminal.read_until(b"\n").split()[1])
        if how == "crash":
            fake.stop()
        elif how == "term":
            terminal.process.terminate()
        else:
            os.kill(pid, signal.SIGKILL)
        status = terminal.wait()
        assert status == {"crash": 125, "term": 143, "command killed": 137}[how]
        assert termios.tcgetattr(terminal.child_fd) == terminal.settings_before


def test_control_c_is_a_byte_for_the_guest(cli: cli_process.Cli) -> None:
    script = "trap 'echo got; exit 9' INT; echo ready; while :; do sleep 0.05; done"
    with cli.on_terminal("vm", "exec", "web", "--", "bash", "-c", script) as terminal:
        terminal.read_until(b"ready")
        terminal.type(b"\x03")
        assert terminal.wait() == 9


def test_window_size_follows(cli: cli_process.Cli) -> None:
    script = "trap 'stty size; exit 0' WINCH; stty size; while :; do sleep 0.05; done"
    with cli.on_terminal("vm", "exec", "web", "--", "bash", "-c", script) as terminal:
        terminal.read_until(b"24 80")
        termios.tcsetwinsize(terminal.fd, (31, 99))
        terminal.process.send_signal(signal.SIGWINCH)
        assert terminal.wait() == 0
        assert b"31 99" in terminal.seen


def test_stop_gives_the_terminal_back_until_continued(cli: cli_process.Cli) -> None:
    with cli.on_terminal("vm", "exec", "web", "--", "sh", "-c", "echo ready; read x") as terminal:
        terminal.read_until(b"ready")
        terminal.process.send_signal(signal.SIGTSTP)
        os.waitid(os.P_PID, terminal.process.pid, os.WSTOPPED)
        assert termios.tcgetattr(terminal.child_fd) == terminal.settings_before
        terminal.process.send_signal(signal.SIGCONT)
        terminal.type(b"x\r")
        assert terminal.wait() == 0


# --- banger's own failures ---


def test_own_failures_are_125_and_speak(cli: cli_process.Cli) -> None:
    for name, program in (("nobody", "true"), ("web", "no-such-program")):
        done = cli.run("vm", "exec", name, "--", program)
        assert done.status == 125
        assert "banger: error: " in done.err
        assert "operation: 0123456789ab" in done.err


def test_no_daemon_is_125_and_says_what_to_do(tmp_path: Path) -> None:
    done = cli_process.Cli(tmp_path / "none.sock").run("vm", "exec", "web", "--", "true")
    assert done.status == 125
    assert str(tmp_path / "none.sock") in done.err
    assert "systemctl status bangerd" in done.err
    assert "banger system install" in done.err


def test_lost_daemon_is_125(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    with cli.started("vm", "exec", "web", "--", "sh", "-c", "echo ready; sleep 60") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        fake.stop()
        assert process.wait(cli_process.DEADLINE_S) == 125
        assert b"banger: error: " in process.stderr.read()


@pytest.mark.parametrize(
    "arguments",
    [("vm", "exec"), ("vm", "exec", "Web", "--", "true"), ("vm", "exec", "web", "x", "--", "true")],
)
def test_wrong_usage_is_2(cli: cli_process.Cli, fake: daemon.FakeDaemon, arguments: tuple[str, ...]) -> None:
    done = cli.run(*arguments)
    assert done.status == 2
    assert "--help" in done.err
    assert not fake.execs


# --- vm run ---


def test_run_rm_leaves_no_vm(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    done = cli.run("vm", "run", "--rm", "--memory", "1G", "--", "sh", "-c", "cat; exit 5", stdin=b"hi")
    assert (done.status, done.out) == (5, b"hi")
    assert list(map(lambda vm: vm.name, fake.vms.values())) == ["web"]
    assert fake.execs[0].remove
    assert fake.asked[0][2]["memory_mib"] == 1024
    assert fake.asked[0][2]["remove_on_failure"]
    assert "calm-otter is" not in done.err
    for stage in daemon.STAGES:
        assert stage in done.err


def test_run_keeps_the_vm_and_says_so(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    done = cli.run("vm", "run", "--name", "mine", "--", "true")
    assert done.status == 0
    assert fake.vm_named("mine") is not None
    assert "banger vm exec mine" in done.err
    assert "banger vm delete mine" in done.err


def test_run_without_command_is_a_shell(cli: cli_process.Cli) -> None:
    done = cli.run("vm", "run", "--rm", stdin=b"echo $((6*7)); exit 4\n")
    assert (done.status, done.text.splitlines()[-1]) == (4, "42")


def test_run_detached_prints_the_name(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    assert cli.run("vm", "run", "-d", "--name", "mine").text == "mine\n"
    assert cli.run("vm", "run", "-d", "--name", "other", "--json").json["name"] == "other"
    assert not fake.execs


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-d", "--rm"), "exclude each other"),
        (("-d", "--", "true"), "runs no command"),
        (("./repo",), "vm run -- ./repo"),
        (("ls", "-l"), "vm run -- ls -l"),
        (("--memory", "lots"), "is not a size"),
        (("--memory", "1M"), "1M is too little; at least 64M"),
        (("--name", "-x-"), "not a VM name"),
    ],
)
def test_run_refuses_before_it_makes_anything(
    cli: cli_process.Cli, fake: daemon.FakeDaemon, arguments: tuple[str, ...], said: str
) -> None:
    done = cli.run("vm", "run", *arguments)
    assert done.status in {2, 125}
    assert said in done.err
    assert not fake.asked


def test_run_that_does_not_start_is_125_and_says_what_is_left(
    cli: cli_process.Cli, fake: daemon.FakeDaemon
) -> None:
    fake.behaviour.fail = errors.ErrorBody(
        code="timed_out", message="no answer\x1b[2J", hint="look", op_id="00", step="wait_vsock_agent"
    )
    done = cli.run("vm", "run", "--name", "mine", "--", "true")
    assert done.status == 125
    assert "no answer\\x1b[2J" in done.err
    assert "step: wait_vsock_agent" in done.err
    assert "mine is kept, error" in done.err
    done = cli.run("vm", "run", "--rm", "--name", "gone", "--", "true")
    assert done.status == 125
    assert "nothing is left of gone" in done.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_run_interrupted_while_it_starts_is_rolled_back(
    cli: cli_process.Cli, fake: daemon.FakeDaemon, number: signal.Signals
) -> None:
    fake.behaviour.stay_in_stage = "boot_firecracker"
    with cli.started("vm", "run", "--rm", "--", "true") as process:
        assert process.stderr is not None
        assert any(b"boot_firecracker" in line for line in process.stderr)
        process.send_signal(number)
        status = process.wait(cli_process.DEADLINE_S)
        said = process.stderr.read().decode()
    if number is signal.SIGINT:
        assert status == 130
        assert "nothing is left of calm-otter" in said
    else:
        assert status == (-9 if number is signal.SIGKILL else 143)
    if number is signal.SIGKILL:
        assert fake.hung_up.wait(cli_process.DEADLINE_S)
    assert fake.vm_named("calm-otter") is None


def test_run_interrupted_at_once_is_rolled_back(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    """The signal comes while the request that starts it all is under way."""
    fake.behaviour.stay_in_stage = "preflight"
    with cli.started("vm", "run", "--rm", "--", "true") as process:
        assert fake.reached.wait(cli_process.DEADLINE_S)
        process.send_signal(signal.SIGINT)
        assert process.wait(cli_process.DEADLINE_S) == 130
    assert fake.vm_named("calm-otter") is None


def test_run_rm_ended_by_a_signal_deletes_the_vm(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    with cli.started("vm", "run", "--rm", "--", "sh", "-c", "echo ready; exec sleep 60") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(cli_process.DEADLINE_S) == 143
    assert fake.vm_named("calm-otter") is None


def test_run_without_a_command_is_what_the_image_runs(cli: cli_process.Cli, fake: daemon.FakeDaemon) -> None:
    fake.behaviour.image_run = resources.ImageRun(entrypoint=("echo", "from"), command=("the image",))
    done = cli.run("vm", "run", "--rm", "--image", "registry.example:5000/team/app:1")
    assert (done.status, done.text) == (0, "from the image\n")
    assert fake.execs[0].argv == ()
    assert cli.run("vm", "run", "--rm", "--", "echo", "mine").text == "mine\n"


@pytest.mark.parametrize("remove", [False, True])
def test_run_of_an_image_without_a_shell_says_so(
    cli: cli_process.Cli, fake: daemon.FakeDaemon, remove: bool
) -> None:
    fake.behaviour.image_has_shell = False
    done = cli.run("vm", "run", *(["--rm"] if remove else []), "--name", "bare")
    assert done.status == 125
    assert "has no shell, and does not say what it runs" in done.err
    assert "-- /the/program" in done.err
    assert ("bare" in {vm.name for vm in fake.vms.values()}) is not remove
    assert fake.execs == []
