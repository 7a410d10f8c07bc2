# SPDX-License-Identifier: MIT
"""What shells and others hand to a command: words that are no text, closed descriptors, odd pipes."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract import cli_process, repositories
from tests.fakes import daemon


@pytest.fixture
def fake() -> Iterator[daemon.FakeDaemon]:
    """A daemon with a running VM, `web`."""
    with cli_process.fake_daemon() as made:
        made.add_vm("web")
        yield made


@pytest.fixture
def cli(fake: daemon.FakeDaemon) -> cli_process.Cli:
    """The CLI against it."""
    return cli_process.Cli(fake.path)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("vm", "exec", "web", "--", "cat", "caf\udce9"), 125),
        (("vm", "exec", "web", "-e", "A=\udce9", "--", "env"), 125),
        (("vm", "cp", "web:/srv/caf\udce9", "/tmp/x"), 2),
        (("vm", "cp", "/etc/hostname", "web:/srv/caf\udce9/"), 2),
        (("image", "show", "caf\udce9/x:1"), 2),
    ],
)
def test_a_word_that_is_no_text_is_refused_by_name(
    cli: cli_process.Cli, words: tuple[str, ...], status: int
) -> None:
    """What travels as JSON is Unicode, and what a user types may be any bytes."""
    done = cli.run(*words)
    assert (done.status, done.out) == (status, b"")
    assert r"\xe9" in done.err
    assert "is not UTF-8" in done.err


@pytest.mark.parametrize(
    "words",
    [
        ("--", "cat", "caf\udce9"),
        ("-e", "A=\udce9", "--", "env"),
        ("--cwd", "/\udce9", "--", "pwd"),
        ("--user", "\udce9"),
        ("--guest-path", "/root/\udce9", "{repository}"),
        ("--branch", "\udce9", "{repository}"),
    ],
)
@pytest.mark.parametrize("rm", [("--rm",), ()])
def test_a_word_that_is_no_text_makes_no_vm(
    cli: cli_process.Cli,
    fake: daemon.FakeDaemon,
    tmp_path: Path,
    words: tuple[str, ...],
    rm: tuple[str, ...],
) -> None:
    repositories.plain(tmp_path / "here")
    done = cli.run("vm", "run", *rm, *(word.format(repository=tmp_path / "here") for word in words))
    assert (done.status, done.out) == (125, b"")
    assert r"\xe9" in done.err
    assert "is not UTF-8" in done.err
    assert [asked for asked in fake.asked if asked[0] != "GET"] == []


def test_a_long_document_waits_for_a_pipe_that_does_not_block(
    cli: cli_process.Cli, fake: daemon.FakeDaemon
) -> None:
    """Another program that has it too may have made it so."""
    for number in range(300):
        fake.add_vm(f"v{number}")
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with os.fdopen(reader, "rb") as pipe, cli.started("vm", "list", "--json", stdout=writer) as process:
        assert process.stderr is not None
        deadline = time.monotonic() + cli_process.DEADLINE_S
        while waiting_bytes(reader) < fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ):
            assert time.monotonic() < deadline, "the pipe does not get full"
            time.sleep(0.01)  # nothing tells of that
        os.close(writer)
        assert len(json.load(pipe)) == 301
        assert process.wait(cli_process.DEADLINE_S) == 0, process.stderr.read()


def waiting_bytes(fd: int) -> int:
    (count,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
    return int(count)


@pytest.mark.parametrize(
    "words",
    [
        ("vm", "list"),
        ("vm", "show", "nobody"),
        ("vm", "list", "--json"),
        ("vm", "exec", "web", "--", "echo"),
        ("vm", "stop", "web"),
    ],
)
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_descriptor_that_the_caller_closed_is_as_one_to_nowhere(
    cli: cli_process.Cli, words: tuple[str, ...], closed: str
) -> None:
    argv = ["sh", "-c", f'exec "$@" {closed}', "sh", *cli.argv(*words)]
    done = subprocess.run(
        argv, env=cli.environment(), capture_output=True, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == (1 if "nobody" in words else 0), done.stderr
    assert b"fault" not in done.stderr


@pytest.mark.parametrize("option", ["--firecracker", "--jailer"])
def test_a_directory_is_no_program_to_install(cli: cli_process.Cli, option: str) -> None:
    done = cli.run("system", "install", option, "/tmp")
    assert (done.status, "is a directory" in done.err) == (2, True), done.err
