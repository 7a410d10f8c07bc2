# SPDX-License-Identifier: MIT
"""Files in and out of the real agent: exact both ways, and never outside their directory."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import stat
import tarfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from banger.contract import errors, guest
from banger.owner import guest as guests
from tests.contract import agent

MTIME_NS = 1_700_000_000_123_456_789


@pytest.fixture(scope="module", params=agent.KINDS)
def agent_socket(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A running agent's socket."""
    with agent.running(request.param) as path:
        yield path


@pytest.fixture
def client(agent_socket: Path) -> guests.GuestClient:
    """A client of the agent under test."""
    return guests.GuestClient(lambda: asyncio.open_unix_connection(str(agent_socket)))


async def pieces(data: bytes, size: int = 10_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def member(name: str, kind: bytes = tarfile.REGTYPE, **values: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.uid, info.gid = os.getuid(), os.getgid()
    for key, value in values.items():
        setattr(info, key, value)
    return info


def archive(*members: tuple[tarfile.TarInfo, bytes], fmt: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=fmt) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


async def fetch(client: guests.GuestClient, path: Path) -> tarfile.TarFile:
    async with client.get(guest.GetSpec(str(path))) as stream:
        data = b"".join([piece async for piece in stream])
    return tarfile.open(fileobj=io.BytesIO(data))


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
async def test_members_of_every_kind_are_unpacked(
    client: guests.GuestClient, tmp_path: Path, fmt: int
) -> None:
    long = "d" * 90 + "/" + "f" * 90
    data = archive(
        (member("tree", tarfile.DIRTYPE, mode=0o750, mtime=1_000_000_000), b""),
        (member("tree/tool", mode=0o4755, mtime=1_000_000_001), b"#!/bin/sh\n"),
        (member("tree/link", tarfile.SYMTYPE, linkname="/etc/passwd"), b""),
        (member("tree/again", tarfile.LNKTYPE, linkname="tree/tool"), b""),
        (member("tree/fifo", tarfile.FIFOTYPE, mode=0o620), b""),
        (member("tree/" + long), b"deep"),
        fmt=fmt,
    )
    got = await client.put(guest.PutSpec(str(tmp_path)), pieces(data, 77))
    tree = tmp_path / "tree"
    assert (got.entries, got.content_bytes) == (6, 14)
    assert stat.S_IMODE((tree / "tool").stat().st_mode) == 0o4755
    assert (tree / "tool").stat().st_ino == (tree / "again").stat().st_ino
    assert (tree / "link").readlink() == Path("/etc/passwd")
    assert stat.S_ISFIFO((tree / "fifo").stat().st_mode)
    assert stat.S_IMODE((tree / "fifo").stat().st_mode) == 0o620
    assert (tree / long).read_bytes() == b"deep"
    assert (stat.S_IMODE(tree.stat().st_mode), int(tree.stat().st_mtime)) == (0o750, 1_000_000_000)


async def test_a_tree_comes_back_as_it_is(client: guests.GuestClient, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "empty").mkdir(parents=True)
    (source / ("n" * 200)).write_bytes(b"x" * 100_001)
    (source / "naïve \n name").write_text("text")
    (source / "link").symlink_to("nowhere")
    os.link(source / ("n" * 200), source / "zz-again")
    os.utime(source / ("n" * 200), ns=(MTIME_NS, MTIME_NS))
    os.setxattr(source / "naïve \n name", "user.note", b"a\0b")
    with await fetch(client, source) as tar:
        names = {info.name: info for info in tar.getmembers()}
        assert set(names) == {
            "source",
            "source/empty",
            "source/" + "n" * 200,
            "source/naïve \n name",
            "source/link",
            "source/zz-again",
        }
        linked = [names["source/" + "n" * 200], names["source/zz-again"]]
        assert sorted(info.type for info in linked) == [tarfile.REGTYPE, tarfile.LNKTYPE]
        stored = next(info for info in linked if info.isreg())
        content = tar.extractfile(stored)
        assert content is not None
        assert content.read() == b"x" * 100_001
        assert stored.mtime == pytest.approx(MTIME_NS / 1e9, abs=1e-6)
        assert names["source/naïve \n name"].pax_headers["SCHILY.xattr.user.note"] == "a\0b"
        assert names["source/link"].linkname == "nowhere"


async def test_what_an_archive_cannot_tell_is_not_told_wrongly(
    client: guests.GuestClient, tmp_path: Path
) -> None:
    """A device with two names is two devices: nobody unpacks the first, and the other would lead nowhere."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("text")
    os.setxattr(source / "file", "user.a=b", b"value")
    os.setxattr(source / "file", "user.a", b"own")
    if os.geteuid() == 0:
        os.mknod(source / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.link(source / "null", source / "zero")
    with await fetch(client, source) as tar:
        names = {info.name: info for info in tar.getmembers()}
    said = names["source/file"].pax_headers
    assert {key: value for key, value in said.items() if "xattr" in key} == {"SCHILY.xattr.user.a": "own"}
    devices = {info.name for info in names.values() if info.type == tarfile.CHRTYPE}
    assert devices == {f"source/{name}" for name in ("null", "zero") if os.geteuid() == 0}


async def test_what_was_packed_is_unpacked_the_same(client: guests.GuestClient, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "big").write_bytes(os.urandom(3 << 20))
    (source / "small").write_bytes(b"s")
    os.setxattr(source / "small", "user.note", b"kept")
    os.utime(source / "small", ns=(MTIME_NS, MTIME_NS))
    async with client.get(guest.GetSpec(str(source))) as stream:
        await client.put(guest.PutSpec(str(target), strip=1, make_directory=True), stream)
    assert (
        hashlib.sha256((target / "big").read_bytes()).digest()
        == hashlib.sha256((source / "big").read_bytes()).digest()
    )
    assert os.getxattr(target / "small", "user.note") == b"kept"
    assert (target / "small").stat().st_mtime_ns == MTIME_NS


ESCAPES = {
    "absolute": [(member("/tmp/escaped"), b"x")],
    "dots": [(member("a/../../escaped"), b"x")],
    "through a link": [
        (member("out", tarfile.SYMTYPE, linkname=".."), b""),
        (member("out/escaped"), b"x"),
    ],
    "hard link through a link": [
        (member("out", tarfile.SYMTYPE, linkname=".."), b""),
        (member("own", tarfile.LNKTYPE, linkname="out/secret"), b""),
    ],
    "hard link by dots": [(member("own", tarfile.LNKTYPE, linkname="../secret"), b"")],
}


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("follow", [False, True])
async def test_nothing_leaves_the_directory(
    client: guests.GuestClient, tmp_path: Path, name: str, *, follow: bool
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_text("s")
    spec = guest.PutSpec(str(inside), follow_links=follow)
    with pytest.raises(errors.BangerError):
        await client.put(spec, pieces(archive(*ESCAPES[name])))
    assert sorted(os.listdir(tmp_path)) == ["inside", "secret"]
    assert not (inside / "own").exists()


async def test_a_link_is_replaced_and_not_written_through(
    client: guests.GuestClient, tmp_path: Path
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_text("s")
    (inside / "file").symlink_to("../secret")
    await client.put(guest.PutSpec(str(inside)), pieces(archive((member("file"), b"new"))))
    assert (tmp_path / "secret").read_text() == "s"
    assert (inside / "file").read_text() == "new"


async def test_the_directory_itself_takes_what_the_archive_says_of_it(
    client: guests.GuestClient, tmp_path: Path
) -> None:
    said = member("./", tarfile.DIRTYPE, mode=0o751, mtime=1_000_000_000)
    said.pax_headers = {"SCHILY.xattr.user.note": "kept"}
    await client.put(guest.PutSpec(str(tmp_path)), pieces(archive((said, b""))))
    assert os.getxattr(tmp_path, "user.note") == b"kept"
    status = os.stat(tmp_path)
    assert (stat.S_IMODE(status.st_mode), status.st_mtime) == (0o751, 1_000_000_000)


async def test_links_inside_are_followed_on_request(client: guests.GuestClient, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to("real")
    data = archive((member("alias/file"), b"x"))
    with pytest.raises(errors.BangerError):
        await client.put(guest.PutSpec(str(tmp_path)), pieces(data))
    await client.put(guest.PutSpec(str(tmp_path), follow_links=True), pieces(data))
    assert (tmp_path / "real" / "file").read_text() == "x"


@pytest.mark.parametrize("cut", [100, 512, 700, 1024])
async def test_a_cut_archive_is_refused(client: guests.GuestClient, tmp_path: Path, cut: int) -> None:
    data = archive((member("file"), b"y" * 600))[:cut]
    with pytest.raises(errors.BangerError, match="no tar archive, or a damaged one"):
        await client.put(guest.PutSpec(str(tmp_path)), pieces(data))


async def test_a_refusal_comes_while_much_is_still_to_be_sent(
    client: guests.GuestClient, tmp_path: Path
) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield archive((member("../escaped"), b"x"))[:1024]
        while True:
            yield bytes(1 << 20)

    async with asyncio.timeout(20):
        with pytest.raises(errors.BangerError, match="escaped"):
            await client.put(guest.PutSpec(str(tmp_path)), endless())


def wait_for_name(parent: int, name: bytes) -> None:
    """A child of parent has this argv[0]; nothing tells us of it, so we look."""
    deadline = time.monotonic() + 10
    while name not in child_names(parent):
        assert time.monotonic() < deadline, f"no process is called {name!r}"
        time.sleep(0.01)


def child_names(parent: int) -> list[bytes]:
    """Of those that are not about to end."""
    found: list[bytes] = []
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")[0])
    return found


async def test_a_transfer_does_not_outlive_systemd_s_last_killing(
    client: guests.GuestClient, tmp_path: Path
) -> None:
    """The agent itself does, by the @ of its name. Who has files open would keep them from an unmount."""
    agent_pid = (await client.health()).agent_pid
    data = archive((member("a"), b"content"))

    async def watched() -> AsyncIterator[bytes]:
        yield data[:512]
        await asyncio.to_thread(wait_for_name, agent_pid, b"banger-guest")
        yield data[512:]

    await client.put(guest.PutSpec(str(tmp_path)), watched())
    assert (tmp_path / "a").read_text() == "content"


def waiting_server(parent: int) -> tuple[int, bool]:
    """The process that serves a transfer, once it waits, and whether it does so without a timeout.

    Nothing tells of its name or its sleep, so we look.
    """
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for pid, (name, without_limit) in agent.waiting(parent).items():
            if name == b"banger-guest":
                return pid, without_limit
        time.sleep(0.01)
    raise AssertionError("no process waits")


def wait_until_gone(pid: int) -> None:
    """It is no child of ours, so nothing tells."""
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the transfer goes on"
        time.sleep(0.01)


async def test_a_copy_out_waits_for_a_client_that_pauses_and_ends_with_one_that_leaves(
    client: guests.GuestClient, tmp_path: Path
) -> None:
    with (tmp_path / "big").open("wb") as file:
        file.truncate(64 << 20)
    agent_pid = (await client.health()).agent_pid
    async with client.get(guest.GetSpec(str(tmp_path / "big"))) as stream:
        assert await anext(aiter(stream))
        pid, without_limit = await asyncio.to_thread(waiting_server, agent_pid)
        assert without_limit
    await asyncio.to_thread(wait_until_gone, pid)


async def test_a_copy_in_waits_for_a_client_that_pauses_and_ends_with_one_that_leaves(
    client: guests.GuestClient, tmp_path: Path
) -> None:
    agent_pid = (await client.health()).agent_pid
    waiting = asyncio.get_running_loop().create_future()

    async def paused() -> AsyncIterator[bytes]:
        yield archive((member("a"), b"content"))[:600]
        waiting.set_result(await asyncio.to_thread(waiting_server, agent_pid))
        await asyncio.Event().wait()

    copying = asyncio.create_task(client.put(guest.PutSpec(str(tmp_path)), paused()))
    pid, without_limit = await waiting
    assert without_limit
    copying.cancel()
    await asyncio.gather(copying, return_exceptions=True)
    await asyncio.to_thread(wait_until_gone, pid)


async def test_a_file_that_became_shorter_is_named_and_filled_up(
    client: guests.GuestClient, tmp_path: Path
) -> None:
    """The archive is whole, and what comes behind that file is in it."""
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(64 << 20)
    async with client.get(guest.GetSpec(str(tmp_path))) as archived:
        stream = aiter(archived)
        data = await anext(stream)
        os.truncate(big, 0)
        data += b"".join([piece async for piece in stream])
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [info.size for info in tar if info.isreg()] == [64 << 20]
    assert (archived.done.shrunk, archived.done.shrunk_count) == ((f"{tmp_path.name}/big",), 1)


async def test_a_missing_path_is_named(client: guests.GuestClient, tmp_path: Path) -> None:
    with pytest.raises(errors.NotFoundError, match="not-there"):
        await fetch(client, tmp_path / "not-there")
    with pytest.raises(errors.NotFoundError, match="not-there"):
        await client.put(guest.PutSpec(str(tmp_path / "not-there")), pieces(archive()))


async def test_the_listening_ports_are_found(client: guests.GuestClient) -> None:
    async def ignore(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(ignore, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        found = [item for item in await client.ports() if item.port == port]
    assert [(item.protocol, item.address, item.pid) for item in found] == [("tcp", "127.0.0.1", os.getpid())]


async def test_an_agent_that_does_not_own_the_machine_leaves_its_clock_and_power(
    client: guests.GuestClient,
) -> None:
    assert await client.time_ns() > MTIME_NS
    with pytest.raises(errors.BangerError, match="clock"):
        await client.set_time(MTIME_NS)
    with pytest.raises(errors.BangerError, match="power off"):
        await client.power_off(grace_ms=0)
