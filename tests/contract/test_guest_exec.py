# SPDX-License-Identifier: MIT
"""Commands at their edges: terminals that nobody reads, what is left behind, what they are started with."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.contract import guest
from banger.owner import guest as guests
from tests.contract import agent

FILL = """
import errno, os, select, sys
os.set_blocking(1, False)
waiting, count = select.poll(), 0
waiting.register(1, select.POLLOUT)
while waiting.poll(1000):
    with open(sys.argv[1], "w") as file:
        try:
            count += os.write(1, b"x" * 1000)
        except BlockingIOError:
            pass
        file.write(str(count))
"""


@pytest.fixture(scope="module", params=agent.KINDS)
def client(request: pytest.FixtureRequest) -> Iterator[guests.GuestClient]:
    """A client of a running agent."""
    with agent.running(request.param) as path:
        yield guests.GuestClient(lambda: asyncio.open_unix_connection(str(path), limit=1 << 16))


def wait_until_it_waits_alone(parent: int) -> None:
    """The agent's process that serves a command has its client left to wait for: nothing tells of it."""
    deadline = time.monotonic() + 30
    while not any(
        name == b"@banger-guest" and without_limit and not agent.children(pid)
        for pid, (name, without_limit) in agent.waiting(parent).items()
    ):
        assert time.monotonic() < deadline, "the command has not ended, or something else is waited for"
        time.sleep(0.01)


@pytest.mark.parametrize("tty", [False, True])
async def test_what_a_command_wrote_is_there_however_late_it_is_taken(
    client: guests.GuestClient, tmp_path: Path, *, tty: bool
) -> None:
    """It has ended by then, and waited for nobody."""
    written = tmp_path / "written"
    agent_pid = (await client.health()).agent_pid
    spec = guest.ExecSpec(argv=(sys.executable, "-c", FILL, str(written)), tty=tty)
    count = 0
    async with client.exec(spec) as running:
        output = running.output()
        event = await anext(output)
        assert isinstance(event, tuple)
        await asyncio.to_thread(wait_until_it_waits_alone, agent_pid)
        count += len(event[1])
        async for event in output:
            if isinstance(event, tuple):
                count += len(event[1])
    assert count == int(written.read_text())


async def test_a_terminal_erases_whole_characters(client: guests.GuestClient) -> None:
    """What a command is told of its locale is UTF-8."""
    async with client.exec(guest.ExecSpec(argv=("cat",), tty=True)) as running:
        await running.write("aü\x7fb\r".encode())
        await running.close_stdin()
        out = b"".join([event[1] async for event in running.output() if isinstance(event, tuple)])
    assert out.endswith(b"ab\r\n")
