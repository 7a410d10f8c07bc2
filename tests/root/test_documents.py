# SPDX-License-Identifier: MIT
"""README, tutorial, pages about agents, network and lifetimes: line by line in one shell, with a repository.

CLI, daemon and agent are the real ones. Only the machine is missing: the agent has a mount namespace for its
`/root`, and a name.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import guest_binary
from bench import fake_host, served
from tests.contract import conftest
from tests.lab import documents

DOCS = Path(__file__).parents[2] / "docs"
_INSIDE = 'mount --bind "$1" /root && hostname hello && exec -a @banger-guest "$2" agent --listen-fd "$3"'


@contextlib.contextmanager
def _agent(directory: Path, home: Path) -> Iterator[Path]:
    """The socket of an agent whose /root is `home`."""
    path = directory / "agent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        number = listener.fileno()
        program = str(guest_binary.path(platform.machine()))
        agent = subprocess.Popen(
            ["unshare", "--mount", "--uts", "bash", "-c", _INSIDE, "agent", str(home), program, str(number)],
            pass_fds=[number],
            stdin=subprocess.DEVNULL,
        )
    try:
        yield path
    finally:
        agent.terminate()
        agent.wait(timeout=10)


async def _follow(script: str, top: Path, agent: Path) -> None:
    settings, network = conftest.answering(fake_host.SETTINGS), conftest.own_network()
    async with served.running(agent=agent, settings=settings, network=network) as (_, address):
        served.program(top)
        (top / "home").mkdir()
        env = served.environment(address) | {
            "HOME": str(top / "home"),
            "PATH": f"{top}:{os.environ['PATH']}",
            "GIT_CONFIG_NOSYSTEM": "1",
        }
        shell = await asyncio.create_subprocess_exec(
            "bash", "-c", script, env=env, cwd=top, stdin=asyncio.subprocess.DEVNULL
        )
        await shell.wait()


@pytest.mark.timeout(180)
def test_the_tutorial_and_other_pages_are_true() -> None:
    lines = [
        (line, shown)
        for name in ("tutorial.md", "agents.md")
        for line, shown in documents.console(DOCS / name)
        if not line.startswith("banger doctor")  # this machine has no installation
    ]
    # The kernel that it shows is another than this machine's.
    lines += [(line, ["…"] * 2) for line, _ in documents.console(DOCS.parent / "README.md")]
    assert len(lines) > 25
    with tempfile.TemporaryDirectory(prefix="b-", dir="/tmp") as name:
        top = Path(name)
        guest = top / "guest"
        guest.mkdir()
        lines += [
            (f"rm -rf {guest}/repo && printf 'test:\\n\\t@echo fine\\n' >Makefile && git add Makefile", [])
        ]
        lines += [(line, ["fine"]) for line, _ in documents.console(DOCS / "network.md")]
        lines += [(f"rm -rf {guest}/repo && banger vm prune --force && banger vm create shop", [])]
        lines += documents.console(DOCS / "lifetime.md")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        # This machine may use the port that a page has.
        lines = [
            (line.replace("8080:", f"{port}:"), [text.replace("8080:", f"{port}:") for text in shown])
            for line, shown in lines
        ]
        # There is one guest behind all VMs here, so what a new VM would not have is taken away.
        renewed = [f"{line}\nrm -rf {guest}/repo" if "vm delete" in line else line for line, _ in lines]
        with _agent(top, guest) as agent:
            asyncio.run(_follow(documents.session(renewed, str(top / "out")), top, agent))
        for number, (line, shown) in enumerate(lines):
            status, said, complained = (
                (top / "out" / f"{number}.{what}").read_text() for what in ("status", "out", "err")
            )
            assert status == "0\n", (line, said, complained)
            assert documents.is_shown(shown, said), (line, shown, said)
        shutil.rmtree(guest)
