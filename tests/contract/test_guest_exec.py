# SPDX-License-Identifier: MIT
"""Commands at their edges: terminals that nobody reads, what is left behind, what they are started with."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import sys
import termios
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


STUBBORN = "trap '' HUP PIPE; echo $$; while :; do echo x; done"


@pytest.fixture(scope="module", params=agent.KINDS)
def agent_socket(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A running agent's socket."""
    with agent.running(request.param) as path:
        yield path


@pytest.fixture
def client(agent_socket: Path) -> guests.GuestClient:
    """A client of that agent."""
    return guests.GuestClient(lambda: asyncio.open_unix_connection(str(agent_socket), limit=1 << 16))


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


def frame_from(connection: socket.socket) -> tuple[int, bytes]:
    kind, size = guest.parse_header(connection.recv(guest.HEADER.size, socket.MSG_WAITALL))
    return kind, connection.recv(size, socket.MSG_WAITALL)


def test_who_talks_nonsense_and_takes_no_answer_keeps_no_command(agent_socket: Path) -> None:
    """The connection stays open, with no room in it for a word about the nonsense."""
    exec_request = guest.exec_payload(guest.ExecSpec(argv=("sh", "-c", STUBBORN)), stdin=False)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(agent_socket))
        connection.sendall(guest.hello() + guest.request(guest.FrameType.EXEC, exec_request))
        while (frame := frame_from(connection))[0] != guest.FrameType.STDOUT:
            pass
        command = Path(f"/proc/{int(frame[1].split()[0])}")
        queued, deadline = [-1, 0], time.monotonic() + 30
        while queued[-1] != queued[-2]:  # nothing tells of a connection that is full
            assert time.monotonic() < deadline, "the connection takes without end"
            time.sleep(0.2)
            queued.append(readable(connection))
        connection.sendall(guest.frame(guest.FrameType.PORTS))
        while command.exists():
            assert time.monotonic() < deadline, "the command goes on"
            time.sleep(0.05)


def readable(connection: socket.socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, bytes(4)))[0])
