# SPDX-License-Identifier: MIT
"""What goes over ssh elsewhere, natively: a command's round trip, and a repository of 10,000 files.

Ours is the CLI, the real daemon and the real agent; the rival ssh, an sshd of its own on the loopback, git
and rsync. No machine is between either pair, so both are measured at their best.

A file system goes on with what it was told long after that, above all with deleting. So nothing is deleted
between measurements, each waits until everything is on the disk, and the two take turns at being first.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import host, report, served
from lab import errors
from tests.contract import agent

FILES: Final = 10_000
ROUNDS: Final = 6
TRIPS: Final = 30
CHANGED: Final = 10
READY_S: Final = 20.0
_NEEDED: Final = ("ssh", "sshd", "ssh-keygen", "rsync", "git")
_SSHD: Final = """
ListenAddress 127.0.0.1:{port}
HostKey {top}/host
AuthorizedKeysFile {top}/key.pub
PidFile none
StrictModes no
UsePAM no
"""


def run(_: host.Host) -> report.Report:
    missing = [name for name in _NEEDED if shutil.which(name, path=_path()) is None]
    if missing:
        raise errors.LabError(
            f"not installed: {', '.join(missing)}", hint="apt-get install openssh-server rsync git"
        )
    return asyncio.run(measure(files=FILES, rounds=ROUNDS, trips=TRIPS))


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


async def measure(*, files: int, rounds: int, trips: int) -> report.Report:
    with tempfile.TemporaryDirectory(prefix="b-", dir="/tmp") as name, agent.running("shipped") as native:
        top = Path(name)
        async with served.running(agent=native) as (daemon, address), _sshd(top) as options:
            await daemon.start("bench")
            pair = _Pair(top, served.program(top), served.environment(address), options)
            await _make(pair.repository, files)
            true = [await _by_turns(n, pair.ours_true, pair.rival_true) for n in range(trips)]
            first, again = [], []
            for number in range(rounds):
                pair.number = number
                first.append(await _by_turns(number, pair.ours_in, pair.rival_first))
                _change(pair.repository, number)
                again.append(await _by_turns(number, pair.ours_in, pair.rival_again))
                await pair.compare()
    rows = (
        _row("`vm exec -- true`, whole process", "ms", true, 1000, "≤ 1"),
        _row(f"{files} files the first time", "s", first, 1, "≤ 1"),
        _row(f"again, {CHANGED} files changed", "s", again, 1, ""),
    )
    return report.Report(
        name="ssh",
        rival="ssh to an sshd on the loopback: `true`; git clone, then rsync; rsync again",
        rows=rows,
        notes=(f"n = {trips} round trips, {rounds} repositories; natively, no VM on either side",),
    )


def _row(what: str, unit: str, pairs: list[tuple[float, float]], scale: int, aim: str) -> report.Row:
    ours, theirs = (report.median([pair[who] * scale for pair in pairs]) for who in (0, 1))
    return report.Row(what, ours, unit, theirs, aim)


@dataclass(slots=True)
class _Pair:
    """Both ways from one repository to a directory each, other ones in each round."""

    top: Path
    banger: str
    env: dict[str, str]
    ssh: tuple[str, ...]
    number: int = 0

    @property
    def repository(self) -> Path:
        return self.top / "repository"

    @property
    def target(self) -> Path:
        return self.top / "ours" / str(self.number)

    @property
    def rival(self) -> Path:
        return self.top / "rivals" / str(self.number)

    async def ours_true(self) -> None:
        await served.run(self.banger, "vm", "exec", "--cwd", "/", "bench", "--", "true", env=self.env)

    async def rival_true(self) -> None:
        await served.run(*self.ssh, "127.0.0.1", "true")

    async def ours_in(self) -> None:
        words = ("vm", "workspace", "prepare", "bench", str(self.repository))
        await served.run(self.banger, *words, "--guest-path", str(self.target), env=self.env)

    async def rival_first(self) -> None:
        """As a user would: the history by git, then the working tree over it."""
        env = {**os.environ, "GIT_SSH_COMMAND": " ".join(self.ssh)}
        source = f"ssh://127.0.0.1{self.repository}"
        await served.run("git", "clone", "-q", "--no-local", source, str(self.rival), env=env)
        await self.rival_again()

    async def rival_again(self) -> None:
        shell = " ".join(self.ssh)
        source = f"{self.repository}/"
        await served.run("rsync", "-a", "--exclude=.git", "-e", shell, source, f"127.0.0.1:{self.rival}/")

    async def compare(self) -> None:
        """A rival that does less would be no rival."""
        await served.run("diff", "-r", "--exclude=.git", str(self.target), str(self.rival))


async def _by_turns(
    number: int, ours: Callable[[], Awaitable[None]], theirs: Callable[[], Awaitable[None]]
) -> tuple[float, float]:
    """How long each took. Who is first changes with the number."""
    took = {}
    for work in (ours, theirs) if number % 2 == 0 else (theirs, ours):
        await asyncio.to_thread(os.sync)
        began = time.perf_counter()
        await work()
        took[work] = time.perf_counter() - began
    return took[ours], took[theirs]


@contextlib.asynccontextmanager
async def _sshd(top: Path) -> AsyncIterator[tuple[str, ...]]:
    """The words that begin an ssh to a server of our own, which ends with the block."""
    for key in ("host", "key"):
        await served.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(top / key))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (top / "sshd_config").write_text(_SSHD.format(port=port, top=top))
    await served.run("mkdir", "-p", "-m", "755", "/run/sshd")
    program = shutil.which("sshd", path=_path())
    assert program is not None
    server = await asyncio.create_subprocess_exec(
        program, "-D", "-e", "-f", str(top / "sshd_config"), stderr=asyncio.subprocess.DEVNULL
    )
    words: tuple[str, ...] = (
        "ssh",
        "-F",
        "none",
        "-i",
        str(top / "key"),
        "-p",
        str(port),
        "-o",
        "BatchMode=yes",
    )
    words += ("-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={top}/known")
    words += ("-o", "LogLevel=ERROR")
    try:
        await _until_it_answers(words)
        yield words
    finally:
        server.terminate()
        await server.wait()


async def _until_it_answers(words: tuple[str, ...]) -> None:
    async with asyncio.timeout(READY_S):
        while True:
            with contextlib.suppress(RuntimeError):
                await served.run(*words, "127.0.0.1", "true")
                return
            await asyncio.sleep(0.1)


async def _make(repository: Path, files: int) -> None:
    """Files of up to 8 KB that hardly compress, in a hundred directories, in one commit."""
    for number in range(files):
        path = repository / f"d{number % 100}" / f"f{number // 100}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(number * 7919 % 8192))
    for words in (
        ("init", "-q", "-b", "main"),
        ("add", "-A"),
        ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "gc.auto=0", "commit", "-q", "-m", "all"),
        ("gc", "-q"),
    ):
        await served.run("git", *words, cwd=repository)
    (repository / "d0" / "f0").write_text("changed\n")


def _change(repository: Path, round_number: int) -> None:
    for number in range(CHANGED):
        (repository / "d1" / f"f{number}").write_text(f"round {round_number}\n")
