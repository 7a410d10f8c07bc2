# SPDX-License-Identifier: MIT
"""The real agent, run natively on an inherited socket, through the daemon's own client."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from banger import guest_binary
from banger.contract import errors, guest
from banger.owner import guest as guests
from tests.contract import agent

F, T = guest.FrameType, guest.Tag
MIB = 1 << 20
BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.fixture(scope="module", params=agent.KINDS)
def agent_socket(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A running agent's socket; the agent has the tests' own uid."""
    with agent.running(request.param) as path:
        yield path


@pytest.fixture(scope="module")
def half_a_request(native_agent: Path) -> Iterator[socket.socket]:
    """A connection of a client that says hello, and then nothing; open while the other tests run."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(native_agent))
        client.sendall(guest.hello() + guest.frame(guest.FrameType.HEALTH)[:-1])
        yield client


@pytest.fixture
def client(agent_socket: Path, half_a_request: socket.socket) -> guests.GuestClient:
    """A client of that agent."""
    return guests.GuestClient(lambda: asyncio.open_unix_connection(str(agent_socket)))


async def run(
    client: guests.GuestClient, *argv: str, stdin: bytes = b"", **spec: str | bool | tuple[str, ...]
) -> tuple[guest.ExitStatus, bytes, bytes]:
    """A command with all its input; its status and both outputs."""
    outputs = {1: bytearray(), 2: bytearray()}
    async with client.exec(guest.ExecSpec(argv=argv, **spec)) as running:  # type: ignore[arg-type]

        async def feed() -> None:
            await running.write(stdin)
            await running.close_stdin()

        feeding = asyncio.create_task(feed())
        status = guest.ExitStatus(code=-1)
        async for event in running.output():
            if isinstance(event, guest.ExitStatus):
                status = event
            else:
                outputs[event[0]] += event[1]
        await feeding
    return status, bytes(outputs[1]), bytes(outputs[2])


def test_it_says_what_the_host_looks_for_when_a_guest_ended() -> None:
    program = guest_binary.path("x86_64").read_bytes()
    assert guest.NO_CONSOLE.encode() in program
    assert guest.GOODBYE.encode() in program


async def test_health_tells_the_boot_id_of_the_kernel(client: guests.GuestClient) -> None:
    health = await client.health()
    assert health.boot_id == BOOT_ID


async def test_argv_is_exact(client: guests.GuestClient) -> None:
    words = ("a b", "", "'\"$HOME`\\", "ü\n")
    status, out, _ = await run(client, "printf", "%s|", *words)
    assert status == guest.ExitStatus(0)
    assert out.decode() == "".join(f"{word}|" for word in words)


@pytest.mark.parametrize("code", [0, 1, 7, 125, 255])
async def test_the_exit_status_is_exact(client: guests.GuestClient, code: int) -> None:
    status, _, _ = await run(client, "sh", "-c", f"exit {code}")
    assert status.as_shell == code


async def test_death_by_a_signal_is_128_and_its_number(client: guests.GuestClient) -> None:
    status, _, _ = await run(client, "sh", "-c", "kill -TERM $$")
    assert (status.signal, status.as_shell) == (signal.SIGTERM, 128 + signal.SIGTERM)


async def test_a_missing_command_is_127_as_in_a_shell(client: guests.GuestClient) -> None:
    status, _, err = await run(client, "no-such-command")
    assert status.code == 127
    assert b"no-such-command" in err


async def test_both_outputs_environment_and_directory(client: guests.GuestClient) -> None:
    script = "pwd; echo $GREETING >&2"
    status, out, err = await run(client, "sh", "-c", script, env=("GREETING=hello",), cwd="/usr")
    assert (status.code, out, err) == (0, b"/usr\n", b"hello\n")


async def test_a_long_argument_travels_in_several_frames(client: guests.GuestClient) -> None:
    word = "x" * 100_000
    status, out, _ = await run(client, "printf", "%s", word)
    assert status.code == 0
    assert out.decode() == word


@pytest.mark.timeout(120)
async def test_256_mib_each_way_arrive_intact(client: guests.GuestClient) -> None:
    block = hashlib.sha256(b"seed").digest() * (MIB // 32)
    sent, got, count = hashlib.sha256(), hashlib.sha256(), 0
    async with client.exec(guest.ExecSpec(argv=("cat",))) as running:

        async def feed() -> None:
            for number in range(256):
                piece = number.to_bytes(4, "big") + block[4:]
                sent.update(piece)
                await running.write(piece)
            await running.close_stdin()

        feeding = asyncio.create_task(feed())
        async for event in running.output():
            if isinstance(event, guest.ExitStatus):
                assert event.as_shell == 0
            else:
                got.update(event[1])
                count += len(event[1])
        await feeding
    assert count == 256 * MIB
    assert got.digest() == sent.digest()


async def test_twenty_commands_at_once(client: guests.GuestClient) -> None:
    results = await asyncio.gather(
        *(run(client, "sh", "-c", f"cat; exit {n}", stdin=str(n).encode()) for n in range(20))
    )
    assert [(status.code, out) for status, out, _ in results] == [(n, str(n).encode()) for n in range(20)]


async def test_a_signal_reaches_the_command(client: guests.GuestClient) -> None:
    async with client.exec(guest.ExecSpec(argv=("sh", "-c", "echo ready; sleep 60"))) as running:
        async for event in running.output():
            if isinstance(event, guest.ExitStatus):
                assert event.signal == signal.SIGTERM
                return
            await running.signal(signal.SIGTERM)
    pytest.fail("no exit status came")


async def test_a_terminal_has_the_size_it_was_given_and_follows_it(client: guests.GuestClient) -> None:
    script = "stty size; read -r _; stty size"
    spec = guest.ExecSpec(argv=("sh", "-c", script), tty=True, rows=11, cols=42)
    out = bytearray()
    async with client.exec(spec) as running:
        async for event in running.output():
            if isinstance(event, guest.ExitStatus):
                assert event.as_shell == 0
                break
            out += event[1]
            if out.endswith(b"11 42\r\n"):
                await running.resize(50, 100)
                await running.write(b"\r")
    assert b"50 100\r\n" in out


async def test_input_to_a_terminal_ends_also_when_its_queue_is_just_full(client: guests.GuestClient) -> None:
    """With this kernel that is at 65 and 70 KiB."""

    async def ended(kib: int) -> bool:
        script, line = "stty -echo; sleep 0.5; cat >/dev/null", b"x" * 63 + b"\n"
        status, _, _ = await run(client, "sh", "-c", script, stdin=line * 16 * kib, tty=True)
        return status.as_shell == 0

    async with asyncio.timeout(30):
        assert all(await asyncio.gather(*map(ended, range(64, 73))))


def wait_until_gone(marker: str) -> None:
    """Nothing tells us of a foreign process's end, so we look."""
    deadline = time.monotonic() + 10
    while subprocess.run(["pgrep", "-f", marker], check=False, stdout=subprocess.DEVNULL).returncode == 0:
        assert time.monotonic() < deadline, "the command goes on without its client"
        time.sleep(0.05)


async def test_a_client_that_leaves_ends_its_command(client: guests.GuestClient) -> None:
    marker = f"sleep-{id(client)}"
    async with client.exec(
        guest.ExecSpec(argv=("sh", "-c", f": {marker}; echo ready; sleep 60"))
    ) as running:
        async for event in running.output():
            assert event == (1, b"ready\n")
            break
    await asyncio.to_thread(wait_until_gone, marker)


async def test_an_unknown_user_is_named(client: guests.GuestClient) -> None:
    with pytest.raises(errors.NotFoundError, match="nobody-here"):
        await run(client, "true", user="nobody-here")


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        guest.HEADER.pack(2**32 - 1, 1),
        guest.frame(guest.FrameType.HEALTH),
        guest.hello() + guest.frame(guest.FrameType.EXEC),
        guest.hello() + guest.frame(guest.FrameType.EXEC, b"\x14\xff\xff\xff\xff"),
        guest.hello() + guest.HEADER.pack(3, 0xEE) + b"abc",
    ],
    ids=["http", "huge", "no hello", "empty exec", "lying length", "unknown request"],
)
async def test_nonsense_is_refused_and_harms_nobody(agent_socket: Path, sent: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(str(agent_socket))
    writer.write(sent)
    writer.write_eof()
    async with asyncio.timeout(15):
        await reader.read()
    writer.close()
    client = guests.GuestClient(lambda: asyncio.open_unix_connection(str(agent_socket)))
    assert (await client.health()).boot_id


def sent_size(pid: int) -> int:
    """How many bytes a process has written."""
    return int(Path(f"/proc/{pid}/io").read_text().split("wchar:")[1].split()[0])


async def test_output_that_nobody_takes_stops_the_command(client: guests.GuestClient) -> None:
    """And goes on when it is taken: nothing in between holds more than its buffers."""
    async with client.exec(guest.ExecSpec(argv=("sh", "-c", "echo $$; exec yes"))) as running:
        output = running.output()
        first = await anext(output)
        assert isinstance(first, tuple)
        pid = int(first[1].split()[0])
        async with asyncio.timeout(20):
            sizes = [-1, 0]
            while sizes[-1] == 0 or sizes[-1] != sizes[-2]:
                await asyncio.sleep(0.05)  # nothing tells of a command that stands still
                sizes.append(sent_size(pid))
        assert sizes[-1] < 2 * MIB
        taken = 0
        while taken < 2 * MIB:
            event = await anext(output)
            assert isinstance(event, tuple)
            taken += len(event[1])
        assert sent_size(pid) > sizes[-1]


async def answers(reader: asyncio.StreamReader) -> AsyncIterator[tuple[int, bytes]]:
    """Frames, to the end of the connection."""
    while header := await reader.read(1):
        kind, size = guest.parse_header(header + await reader.readexactly(guest.HEADER.size - 1))
        yield kind, await reader.readexactly(size)


async def test_input_that_nobody_reads_is_held_back_and_no_signal_behind_it(agent_socket: Path) -> None:
    """What fits into the window and the command's pipe waits there; what goes beyond is refused."""
    script = "trap 'echo here' USR1; echo ready; while :; do sleep 60 & wait; done"
    spec = guest.ExecSpec(argv=("sh", "-c", script))
    reader, writer = await asyncio.open_unix_connection(str(agent_socket))
    frames, given_back = answers(reader), 0

    async def until(kind: guest.FrameType) -> bytes:
        nonlocal given_back
        async for seen, payload in frames:
            if seen == F.WINDOW:
                given_back += guest.Fields(payload).number(T.COUNT)
            if seen == kind:
                return payload
        raise AssertionError("the agent hung up")

    async with asyncio.timeout(20):
        writer.write(guest.hello() + guest.request(F.EXEC, guest.exec_payload(spec, stdin=True)))
        assert await until(F.STDOUT) == b"ready\n"
        writer.write(guest.frame(F.STDIN, bytes(MIB // 16)) * 4)
        writer.write(guest.frame(F.SIGNAL, guest.encode([(T.SIGNAL, signal.SIGUSR1)])))
        assert await until(F.STDOUT) == b"here\n"
        assert given_back <= MIB // 16, "as much as a pipe holds"
        writer.write(guest.frame(F.STDIN, bytes(MIB // 16)) * 2)
        assert "beyond the window" in str(guest.parse_error(await until(F.ERROR)))
    writer.transport.abort()


async def test_a_hundred_and_twenty_eight_connections_are_served_and_others_told() -> None:
    """The next thirty-two are told that the agent is busy, and then nobody is listened to at all."""
    with agent.running("shipped") as path:
        client = guests.GuestClient(lambda: asyncio.open_unix_connection(str(path)))
        held: list[asyncio.StreamWriter] = []

        async def hold() -> None:
            reader, writer = await asyncio.open_unix_connection(str(path))
            held.append(writer)
            writer.write(guest.hello())
            assert (await anext(answers(reader)))[0] == F.HELLO

        for _ in range(128):
            await hold()
        with pytest.raises(errors.BangerError, match="too many connections"):
            await client.health()
        for _ in range(32):
            await hold()
        with pytest.raises(errors.UnavailableError, match="closed the connection"):
            await client.health()
        for writer in held:
            writer.close()
        async with asyncio.timeout(20):
            while True:  # nothing tells when the agent has seen them go
                with contextlib.suppress(errors.BangerError):
                    await client.health()
                    break


def test_the_binaries_are_small_and_static() -> None:
    for arch in ("x86_64", "aarch64"):
        path = guest_binary.path(arch)
        assert path.stat().st_size < 150_000
        assert b"ld-musl" not in path.read_bytes()


async def test_the_agent_takes_less_than_2_mib() -> None:
    with agent.running("shipped") as path:
        client = guests.GuestClient(lambda: asyncio.open_unix_connection(str(path)))
        rss_bytes = (await client.health()).rss_bytes
    assert 0 < rss_bytes < 2 * MIB


def test_a_request_that_does_not_come_whole_is_not_waited_for(half_a_request: socket.socket) -> None:
    """The last test here: most of its ten seconds have passed by now."""
    said = b""
    while piece := half_a_request.recv(65536):
        said += piece
    assert said[guest.HEADER.size - 1] == F.HELLO
