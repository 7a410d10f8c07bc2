# SPDX-License-Identifier: MIT
"""An agent that was taken over by its guest, against the daemon and the CLI: it lies, floods and never ends.

Whatever it sends becomes a value or an error of ours, within a bound of time and memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import socket
import struct
import tarfile
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from banger.contract import errors, guest
from banger.owner import guest as guests
from tests.contract import api_served, cli_process, conftest

F, T = guest.FrameType, guest.Tag
HELLO = guest.frame(F.HELLO, guest.encode([(T.MAGIC, guest.MAGIC), (T.BOOT_ID, "0" * 8)]))
ANSI = "\x1b[2J\x1b]0;owned\x07\u202e"
Ask = Callable[[guests.GuestClient], Awaitable[object]]


async def _get(client: guests.GuestClient) -> object:
    async with client.get(guest.GetSpec("/x")) as pieces:
        return [piece async for piece in pieces]


async def _exec(client: guests.GuestClient) -> object:
    async with client.exec(guest.ExecSpec(argv=("true",))) as running:
        return [event async for event in running.output()]


async def _connect(client: guests.GuestClient) -> object:
    async with client.connect(guest.ConnectSpec(22)):
        return None


async def _put(client: guests.GuestClient, pieces: int = 2) -> object:
    async def archive() -> AsyncIterator[bytes]:
        for _ in range(pieces):
            yield bytes(1 << 16)

    return await client.put(guest.PutSpec("/x"), archive())


ASKS: dict[str, Ask] = {
    "health": lambda client: client.health(),
    "ports": lambda client: client.ports(),
    "time_ns": lambda client: client.time_ns(),
    "flush": lambda client: client.flush(deadline_s=1),
    "power_off": lambda client: client.power_off(grace_ms=1),
    "get": _get,
    "put": _put,
    "exec": _exec,
    "connect": _connect,
    "set_time": lambda client: client.set_time(1),
}


_REPLY = guest.frame(F.REPLY, guest.encode([(T.UPTIME_MS, 5), (T.REALTIME_NS, 7)]))
_LISTENER = guest.encode([(T.PROTOCOL, "tcp"), (T.ADDRESS, "127.0.0.1"), (T.PORT, 22)])
_WHOLE: dict[str, tuple[bytes, ...]] = {
    "ports": (guest.frame(F.ENTRY, _LISTENER), _REPLY),
    "get": (guest.frame(F.DATA, b"x"), guest.frame(F.DATA), _REPLY),
    "exec": (
        guest.frame(F.STARTED, guest.encode([(T.PID, 2)])),
        guest.frame(F.STDOUT, b"x"),
        guest.frame(F.STDERR, b"x"),
        guest.frame(F.STDOUT),
        guest.frame(F.EXIT, guest.encode([(T.EXIT_KIND, 0), (T.EXIT_CODE, 3)])),
    ),
}


def whole(name: str) -> bytes:
    """All that an honest agent says when it is asked this."""
    return HELLO + b"".join(_WHOLE.get(name, (_REPLY,)))


@contextlib.contextmanager
def _quick(patch: pytest.MonkeyPatch) -> Any:
    for name in ("_STALL_S", "_REPLY_S", "_CONNECT_PORT_S"):
        patch.setattr(guests, name, 0.5)
    yield


async def _against(said: bytes, ask: Ask) -> object:
    """What a request comes to when the guest says this and then nothing more."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    async def connect() -> guests.Stream:
        return await asyncio.open_connection(sock=ours, limit=guest.MAX_PAYLOAD_BYTES * 2)

    async def speak() -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            await loop.sock_sendall(theirs, said)
            theirs.shutdown(socket.SHUT_WR)
            while await loop.sock_recv(theirs, 65536):
                pass

    speaking = asyncio.create_task(speak())
    try:
        async with asyncio.timeout(20):
            return await ask(guests.GuestClient(connect))
    finally:
        speaking.cancel()
        await asyncio.gather(speaking, return_exceptions=True)
        theirs.close()


FIELDS = st.lists(
    st.tuples(
        st.sampled_from([int(tag) for tag in T]),
        st.one_of(st.binary(max_size=12), st.binary(min_size=8, max_size=8)),
    ),
    max_size=6,
).map(lambda fields: b"".join(struct.pack("<BI", tag, len(data)) + data for tag, data in fields))
FRAMES = st.tuples(
    st.one_of(st.sampled_from([int(kind) for kind in F]), st.integers(0, 255)),
    st.one_of(st.binary(max_size=40), FIELDS),
).map(lambda frame: guest.HEADER.pack(len(frame[1]), frame[0]) + frame[1])
LYING = st.integers(0, 2**32 - 1).map(lambda size: struct.pack("<I", size) + b"\x02")
SAID = st.tuples(
    st.sampled_from([HELLO, b""]), st.lists(st.one_of(FRAMES, LYING, st.binary(max_size=30)), max_size=5)
).map(lambda said: said[0] + b"".join(said[1]))


def test_everything_that_a_guest_is_asked_is_here() -> None:
    assert {name for name in vars(guests.GuestClient) if not name.startswith("_")} == set(ASKS)


@pytest.mark.parametrize("name", ASKS)
async def test_an_honest_guest_is_believed(name: str) -> None:
    """Else nothing that is said here of a lying one would mean much."""
    await _against(whole(name), ASKS[name])


@pytest.mark.parametrize("name", ASKS)
def test_whatever_a_guest_says_becomes_a_value_or_an_error_of_ours(name: str) -> None:
    @hypothesis.settings(max_examples=150, database=None)
    @hypothesis.given(SAID)
    def play(said: bytes) -> None:
        with contextlib.suppress(errors.BangerError):
            asyncio.run(_against(said, ASKS[name]))

    play()


@pytest.mark.parametrize("name", ASKS)
async def test_a_guest_that_says_hello_and_falls_silent_holds_nobody(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads nothing either: what was to be sent stays in our buffers, and must not keep us."""
    ours, theirs = socket.socketpair()
    theirs.sendall(HELLO)

    async def connect() -> guests.Stream:
        return await asyncio.open_connection(sock=ours, limit=guest.MAX_PAYLOAD_BYTES * 2)

    async def ask(client: guests.GuestClient) -> object:
        if name == "put":
            return await _put(client, pieces=200)
        if name == "exec":  # a command may be silent for as long as it likes; its user hangs up
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5), client.exec(guest.ExecSpec(argv=("cat",))) as running:
                    while True:
                        await running.write(bytes(1 << 16))
            raise errors.DeadlineError("hung up")
        return await ASKS[name](client)

    with _quick(monkeypatch), theirs:
        async with asyncio.timeout(30):
            with pytest.raises(errors.BangerError):
                await ask(guests.GuestClient(connect))


async def test_a_flood_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of output that nobody takes, of entries without end: 64 MiB arrive, and a few are held."""
    flood = HELLO + guest.frame(F.STARTED, guest.encode([(T.PID, 2)]))
    flood += guest.frame(F.STDOUT, bytes(guest.MAX_PAYLOAD_BYTES)) * ((64 << 20) // guest.MAX_PAYLOAD_BYTES)

    async def look_at_one(client: guests.GuestClient) -> object:
        async with client.exec(guest.ExecSpec(argv=("yes",))) as running:
            async for event in running.output():
                await asyncio.sleep(0.2)
                return event
        return None

    tracemalloc.start()
    try:
        await _against(flood, look_at_one)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


STARTED = guest.frame(F.STARTED, guest.encode([(T.PID, 2)]))
OUT_OF_TURN = {
    "output without content": guest.frame(F.STDOUT) * 2,
    "output after its end": guest.frame(F.STDERR) + guest.frame(F.STDERR, b"x"),
    "starting again": STARTED,
    "giving back nothing": guest.frame(F.WINDOW, guest.encode([(T.COUNT, 0)])),
    "giving back what was not sent": guest.frame(F.WINDOW, guest.encode([(T.COUNT, 1)])),
    "what has no meaning here": guest.frame(F.ENTRY),
}


@pytest.mark.parametrize("what", OUT_OF_TURN)
async def test_a_command_s_frames_come_in_turn(what: str) -> None:
    """Whatever could be sent without end and means nothing ends the command."""
    with pytest.raises(errors.ProtocolError):
        await _against(HELLO + STARTED + OUT_OF_TURN[what], ASKS["exec"])


async def test_a_flood_of_small_frames_lets_others_come_in_between() -> None:
    """All of them are here already, and nothing is waited for."""
    count = 10_000
    reader = asyncio.StreamReader(limit=1 << 20)
    reader.feed_data(guest.frame(F.STDOUT, b"x") * count + guest.frame(F.DATA, b"x") * count)
    link = guests._Link(reader, None, guest.Fields(b""))  # type: ignore[arg-type] # nothing is written
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    beside = asyncio.create_task(others())
    output = guests.Exec(link, lambda: None).output()
    for _ in range(count):
        await anext(output)
    assert turns > count // 100
    turns, tunnel = 0, guests.Tunnel(link, lambda: None)
    for _ in range(count):
        await tunnel.read()
    assert turns > count // 100
    beside.cancel()


# --- through the CLI ---


@pytest.fixture
async def served(daemon: conftest.Daemon) -> AsyncIterator[api_served.Served]:
    await daemon.create()
    async with api_served.serving(daemon) as made:
        yield made


async def _banger(served: api_served.Served, *words: str) -> cli_process.Done:
    return await asyncio.to_thread(cli_process.Cli(served.path).run, *words)


def _tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return made.getvalue()


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o7777
    return info


TRICKS = {
    "traversal": [(_member("../../outside"), b"x")],
    "absolute": [(_member("/outside"), b"x")],
    "through a link": [
        (_member("x/link", tarfile.SYMTYPE, "../.."), b""),
        (_member("x/link/outside"), b"x"),
    ],
    "through an absolute link": [(_member("x", tarfile.SYMTYPE, "/"), b""), (_member("x/outside"), b"x")],
    "hard link outside": [(_member("x", tarfile.LNKTYPE, "../kept"), b"")],
    "hard link over a link": [
        (_member("x/a", tarfile.SYMTYPE, "../../kept"), b""),
        (_member("x/b", tarfile.LNKTYPE, "x/a"), b""),
        (_member("x/b"), b"changed"),
    ],
    "device": [(_member("x", tarfile.CHRTYPE), b"")],
    "pipe": [(_member("x", tarfile.FIFOTYPE), b"")],
    "name of escapes": [(_member(f"x/{ANSI}/../../../outside"), b"x")],
}


@pytest.mark.parametrize("trick", TRICKS)
async def test_no_archive_of_a_guest_writes_outside_its_target(
    served: api_served.Served, tmp_path: Path, trick: str
) -> None:
    top = tmp_path / "top"
    target = top / "in" / "target"
    target.mkdir(parents=True)
    kept = top / "in" / "kept"
    kept.write_text("kept")
    data = _tar(*((info, data) for info, data in TRICKS[trick]))
    served.daemon.world.behaviour.answers = (
        HELLO + guest.frame(F.DATA, data) + guest.frame(F.DATA) + guest.frame(F.REPLY)
    )
    done = await _banger(served, "vm", "cp", "web:/x", str(target))
    assert "\x1b" not in done.err
    outside = {path for path in top.rglob("*") if target not in (path, *path.parents)}
    assert outside == {top / "in", kept}
    assert kept.read_text() == "kept"
    assert "outside" not in os.listdir("/")
    for path in target.rglob("*"):
        assert not path.lstat().st_mode & 0o6000, "set-id bits come out of no guest"
        assert path.is_symlink() or path.is_dir() or path.is_file() or path.is_fifo()


async def test_what_a_guest_calls_an_error_cannot_drive_the_terminal(served: api_served.Served) -> None:
    said = guest.encode([(T.CODE, f"bad{ANSI}"), (T.MESSAGE, f"no {ANSI} way")])
    served.daemon.world.behaviour.answers = HELLO + guest.frame(F.ERROR, said)
    for words in (
        ("vm", "exec", "web", "--", "true"),
        ("vm", "cp", "web:/x", "/tmp/x"),
        ("vm", "ports", "web"),
    ):
        done = await _banger(served, *words)
        assert done.status != 0, words
        assert "\x1b" not in done.err, words
        assert "\x1b" not in done.text, words
        assert "\u202e" not in done.err, words
