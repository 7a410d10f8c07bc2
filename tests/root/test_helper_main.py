# SPDX-License-Identifier: MIT
"""bangerd-root as a process: what it needs to start, what it is left with, and how it ends."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from banger.helper.linux import caps
from tests.root import test_helper_server as servers
from tests.root.helper_world import HelperWorld

# systemd's part: the listener is descriptor 3, and LISTEN_PID names the process itself.
START = """
import os, sys
from banger.helper import main
os.dup2(int(sys.argv[3]), 3)
os.set_inheritable(3, False)
if sys.argv[1] == "passed":
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
if sys.argv[2] == "user":
    os.setresuid(65534, 65534, 65534)
sys.exit(main.main(sys.argv[4:]))
"""


@pytest.fixture
def config(helper_world_here: HelperWorld) -> Path:
    """install.toml of a host whose cgroups are a plain directory."""
    policy = helper_world_here.policy
    Path(policy.cgroup_mount).mkdir()
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in msgspec.to_builtins(policy).items())
    path = helper_world_here.root / "install.toml"
    path.write_text(text)
    return path


@pytest.fixture
def listener(helper_world_here: HelperWorld) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(helper_world_here.root / "helper.sock"))
        made.listen(8)
        yield made


def start(
    listener: socket.socket, how: str, as_: str, *arguments: str | Path, **environment: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START, how, as_, str(listener.fileno()), *arguments],
        pass_fds=[listener.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(os.environ, **environment),
    )


def test_it_says_what_it_is_left_with_serves_and_ends(
    listener: socket.socket, config: Path, helper_world_here: HelperWorld
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0banger-{os.getpid()}")
        systemd.settimeout(30)
        address = f"@banger-{os.getpid()}"
        process = start(listener, "passed", "root", "--config", config, NOTIFY_SOCKET=address)
        try:
            assert systemd.recv(64) == b"READY=1"
            status = dict(
                line.split(":\t") for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
            )
            kept = sum(1 << number for number in caps.CAPABILITIES.values())
            for each in ("CapEff", "CapPrm", "CapBnd"):
                assert int(status[each], 16) == kept, each
            assert (status["NoNewPrivs"], status["Groups"].strip(), status["Umask"]) == ("1", "", "0077")
            path = Path(listener.getsockname())
            assert "version" in servers.raw(path, servers.framed(servers.GET_HOST)).decode()
        finally:
            process.terminate()
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 0, said
    first = json.loads(said.splitlines()[0].partition(">")[2])
    assert (first["message"], int(first["effective_caps"], 16)) == ("serving", kept)
    parent = Path(helper_world_here.policy.cgroup_mount, "banger.slice/banger-vms.service")
    assert {each.name for each in parent.iterdir()} >= {"holder", "consoles"}


@pytest.mark.parametrize(
    ("how", "as_", "arguments", "why"),
    [
        ("unpassed", "root", [], "no socket was passed"),
        ("passed", "user", [], "must be started as root"),
        ("passed", "root", ["--verbose"], "usage: bangerd-root"),
        ("passed", "root", ["--config", "/nowhere/install.toml"], "/nowhere"),
    ],
)
def test_it_does_not_start(
    listener: socket.socket, how: str, as_: str, arguments: list[str], why: str
) -> None:
    process = start(listener, how, as_, *arguments)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 1, said
    assert why in said


def test_without_a_free_descriptor_it_waits_and_goes_on(listener: socket.socket, config: Path) -> None:
    """A real limit of the real process; the journal is told once."""
    process = start(listener, "passed", "root", "--config", config)
    assert process.stdout is not None
    path = Path(listener.getsockname())
    answers: list[bytes] = []
    asking = threading.Thread(
        target=lambda: answers.append(servers.raw(path, servers.framed(servers.GET_HOST)))
    )
    try:
        said = process.stdout.readline()
        assert "serving" in said
        before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        with contextlib.ExitStack() as stack:
            used = {int(number) for number in os.listdir(f"/proc/{process.pid}/fd")}
            full = next(number for number in range(len(used) + 1) if number not in used)
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (full, before[1]))
            for _ in range(3):  # silent, for what it may have had open as we looked and closes now
                wire = stack.enter_context(socket.socket(socket.AF_UNIX))
                wire.connect(str(path))
            while "cannot take connections" not in said:
                line = process.stdout.readline()
                assert line, said
                said += line
            assert "LimitNOFILE" in said
            asking.start()
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)
            asking.join(timeout=20)
        assert "version" in answers[0].decode()
    finally:
        process.terminate()
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0, said + rest
    assert "cannot take connections" not in rest


def test_a_signal_ends_it_whichever_thread_the_kernel_gives_it_to(
    listener: socket.socket, config: Path
) -> None:
    """The main thread waits in the kernel and runs nothing, as when a signal comes just before that."""
    process = start(listener, "passed", "root", "--config", config)
    assert process.stdout is not None
    try:
        assert "serving" in process.stdout.readline()
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(listener.getsockname())
            threads = [process.pid]
            while len(threads) < 2:
                time.sleep(0.01)
                threads = sorted(int(each) for each in os.listdir(f"/proc/{process.pid}/task"))
            assert ctypes.CDLL(None).tgkill(process.pid, threads[-1], signal.SIGTERM) == 0
            silent.shutdown(socket.SHUT_WR)
            said, _ = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
