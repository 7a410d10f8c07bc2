# SPDX-License-Identifier: MIT
"""Published ports: real sockets on this machine's loopback, and a real agent for guests without network."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from banger.cli import vm_look, vm_ports
from banger.contract import errors, guest, names, ports, privileged, resources
from banger.owner import composition, config, listeners, publish, published
from banger.owner import guest as guests
from tests.contract import agent, conftest, gates, publishing
from tests.fakes import world as worlds

MIB = 1 << 20


@pytest.fixture(scope="module")
def agent_socket() -> Iterator[Path]:
    """A running agent's socket; this machine plays its guest."""
    with agent.running("shipped") as path:
        yield path


@pytest.fixture
def client(agent_socket: Path) -> guests.GuestClient:
    """A client of that agent."""
    return guests.GuestClient(lambda: asyncio.open_unix_connection(str(agent_socket)))


@pytest.fixture
async def publisher(client: guests.GuestClient) -> AsyncIterator[publish.Publisher]:
    """Publishes for a guest that only its agent reaches."""
    made = publish.Publisher(conftest.NETWORK, lambda _: client)
    yield made
    await made.close()


@contextlib.asynccontextmanager
async def echo() -> AsyncIterator[int]:
    """The port of a service that sends back what it got once the sender has ended."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0, limit=8 * MIB) as server:
        yield server.sockets[0].getsockname()[1]


async def sent_back(port: int, data: bytes) -> bytes:
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        writer.write_eof()
        found = await reader.read()
        writer.close()
        return found


async def refuses(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


async def test_tcp_travels_through_the_agent_and_each_end_is_told(publisher: publish.Publisher) -> None:
    port = publishing.free_port()
    async with echo() as service:
        vm = publishing.row(f"{port}:{service}")
        publisher.take(vm)
        await publisher.serve(vm)
        assert await asyncio.gather(*(sent_back(port, bytes([n]) * MIB) for n in range(8))) == [
            bytes([n]) * MIB for n in range(8)
        ]
        await publisher.release(vm.id)
    assert await refuses(port)


async def test_udp_travels_through_the_agent(publisher: publish.Publisher) -> None:
    port, service = publishing.free_port(), publishing.free_port()
    loop = asyncio.get_running_loop()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking,
    ):
        for each in (server, asking):
            each.setblocking(False)
        server.bind(("127.0.0.1", service))
        await publisher.serve(publishing.row(f"{port}:{service}/udp"))
        asking.connect(("127.0.0.1", port))
        async with asyncio.timeout(20):
            for text in (b"one", b"two"):
                await loop.sock_sendall(asking, text)
                data, peer = await loop.sock_recvfrom(server, 100)
                await loop.sock_sendto(server, data.upper(), peer)
                assert await loop.sock_recv(asking, 100) == text.upper()


@pytest.mark.parametrize("network", [False, True])
async def test_who_only_listens_by_udp_is_remembered_while_something_comes(
    client: guests.GuestClient, network: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "guest_address", lambda *_: "127.0.0.1")
    port, service = publishing.free_port(), publishing.free_port()
    loop = asyncio.get_running_loop()
    ahead_s, really = 0.0, loop.time
    monkeypatch.setattr(loop, "time", lambda: really() + ahead_s)
    publisher = publish.Publisher(conftest.NETWORK, lambda _: client)
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking,
    ):
        for each in (server, asking):
            each.setblocking(False)
        server.bind(("127.0.0.1", service))
        await publisher.serve(publishing.row(f"{port}:{service}/udp", network=network))
        asking.connect(("127.0.0.1", port))
        try:
            await loop.sock_sendall(asking, b"all of it")
            _, peer = await loop.sock_recvfrom(server, 100)
            for number in range(12):
                await loop.sock_sendto(server, b"%d" % number, peer)
                assert await loop.sock_recv(asking, 100) == b"%d" % number
                ahead_s += publish._UDP_IDLE_S / 2
                await asyncio.sleep(0)  # what is due by then is done
        finally:
            await publisher.close()


async def test_datagrams_that_nobody_takes_are_dropped(short_path: Path) -> None:
    """A kernel that takes no more, as one with a slow link: a flooding guest's answers are not all kept."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(short_path / "deaf"))
        sending = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sending.setblocking(False)
        transport, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, sock=sending)
        for _ in range(1000):
            publish._send(transport, bytes(16384), str(short_path / "deaf"))  # type: ignore[arg-type] # unix
        kept = transport.get_write_buffer_size()  # type: ignore[attr-defined] # asyncio has it
        assert 0 < kept <= 256 * 1024 + 16384
        transport.abort()


async def test_a_service_that_is_not_there_ends_the_connection(publisher: publish.Publisher) -> None:
    port = publishing.free_port()
    await publisher.serve(publishing.row(f"{port}:{publishing.free_port()}"))
    with contextlib.suppress(ConnectionError):
        assert await sent_back(port, b"x") == b""


def _reset(writer: asyncio.StreamWriter) -> None:
    """As the kernel does when a program with something unread is killed."""
    socket_ = writer.get_extra_info("socket")
    socket_.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@pytest.mark.parametrize("network", [False, True])
async def test_what_is_cut_off_does_not_look_whole(
    client: guests.GuestClient, network: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that dies half way is no service that has said all, and neither is who sends to it."""
    monkeypatch.setattr(names, "guest_address", lambda *_: "127.0.0.1")
    seen: asyncio.Queue[bytes | ConnectionError] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if await reader.readexactly(5) == b"serve":
                writer.write(b"half of it")
                await reader.readexactly(4)
                _reset(writer)
            else:
                seen.put_nowait(await reader.read())
        except ConnectionError as error:
            seen.put_nowait(error)
        finally:
            writer.close()

    port = publishing.free_port()
    publisher = publish.Publisher(conftest.NETWORK, lambda _: client)
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server, asyncio.timeout(20):
        service = server.sockets[0].getsockname()[1]
        await publisher.serve(publishing.row(f"{port}:{service}", network=network))
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"serve")
            assert await reader.readexactly(10) == b"half of it"
            writer.write(b"die!")
            with pytest.raises(ConnectionResetError):
                await reader.read()
            writer.close()
            if network:  # an agent closes, which the kernel of a guest says as it likes
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"taken")
                await writer.drain()
                _reset(writer)
                assert isinstance(await seen.get(), ConnectionError)
        finally:
            await publisher.close()


async def test_a_port_in_use_is_refused_and_none_is_taken(publisher: publish.Publisher) -> None:
    port = publishing.free_port()
    async with echo() as used:
        with pytest.raises(errors.AlreadyExistsError, match=str(used)) as caught:
            publisher.take(publishing.row(f"{port}:80", f"{used}:80"))
    assert "another port" in caught.value.hint
    publish.bound(ports.parse(f"{port}:80")).close()


async def test_a_port_that_another_vm_has_says_which(publisher: publish.Publisher) -> None:
    port = publishing.free_port()
    publisher.take(publishing.row(f"{port}:80"))
    for spec in (f"{port}:81", f"0.0.0.0:{port}:80"):
        with pytest.raises(errors.AlreadyExistsError, match=f"{port}/tcp of this host .* by web") as caught:
            publisher.require_free(ports.parse(spec))
        assert f"`banger vm unpublish web 127.0.0.1:{port}:80/tcp`" in caught.value.hint


async def goes_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A connection that has sent `before ` is cut off at no point."""
    writer.write(b"after")
    writer.write_eof()
    async with asyncio.timeout(20):
        assert await reader.read() == b"before after"


async def test_changing_ports_leaves_the_others_connections_alone(publisher: publish.Publisher) -> None:
    one, two = publishing.free_port(), publishing.free_port()
    async with echo() as service:
        await publisher.serve(publishing.row(f"{one}:{service}"))
        reader, writer = await asyncio.open_connection("127.0.0.1", one)
        writer.write(b"before ")
        await publisher.serve(publishing.row(f"{one}:{service}", f"{two}:{service}"))
        assert await sent_back(two, b"two") == b"two"
        await publisher.serve(publishing.row(f"{one}:{service}"))
        assert await refuses(two)
        await goes_on(reader, writer)
        writer.close()


@pytest.mark.parametrize("same_port", [True, False], ids=["its own", "another"])
async def test_a_change_that_meets_a_port_in_use_changes_nothing(
    publisher: publish.Publisher, *, same_port: bool
) -> None:
    """Neither what was there, with its connections, nor what came along with the port in use."""
    old, new = publishing.free_port(), publishing.free_port()
    async with echo() as service, echo() as used:
        await publisher.serve(publishing.row(f"{old}:{service}"))
        reader, writer = await asyncio.open_connection("127.0.0.1", old)
        writer.write(b"before ")
        fresh = old if same_port else new
        with pytest.raises(errors.AlreadyExistsError):
            await publisher.serve(publishing.row(f"{fresh}:{used}", f"{used}:{service}"))
        assert await sent_back(old, b"still there") == b"still there"
        if not same_port:
            assert await refuses(new)
            await goes_on(reader, writer)
        writer.close()


async def test_a_port_changes_what_it_leads_to(publisher: publish.Publisher) -> None:
    port = publishing.free_port()
    async with echo() as service:
        await publisher.serve(publishing.row(f"{port}:1"))
        await publisher.serve(publishing.row(f"{port}:{service}"))
        assert await sent_back(port, b"hello") == b"hello"


async def test_a_row_does_not_say_what_could_not_be_published(daemon: conftest.Daemon) -> None:
    old = publishing.free_port()
    body = resources.CreateVm(name="web", publish=(f"{old}:80",))
    await daemon.done(await daemon.services.vms.create(body))
    async with echo() as used:
        change = ports.ChangePorts(publish=(f"{used}:80",), unpublish=(f"{old}:80",))
        with pytest.raises(errors.AlreadyExistsError):
            await daemon.services.alterations.change_ports("web", change)
    assert (await daemon.services.vms.get("web")).publish == (f"127.0.0.1:{old}:80/tcp",)
    assert not await refuses(old)
    with pytest.raises(errors.AlreadyExistsError, match=f"{old}/tcp .* by web already, for its port 80"):
        await daemon.services.alterations.change_ports("web", ports.ChangePorts(publish=(f"{old}:81",)))
    shop = resources.CreateVm(name="shop", publish=(f"{old}:80",))
    with pytest.raises(errors.AlreadyExistsError, match=f"{old}/tcp .* by web already"):
        await daemon.services.vms.create(shop)


class _SomePorts(guests.GuestClient):
    """Knows of some ports alone: what else listens on this machine is not ours to ask."""

    only: frozenset[int] = frozenset()

    async def ports(self) -> list[guest.Listener]:
        return [each for each in await super().ports() if each.port in self.only]


async def _http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.0 200 OK\r\n\r\n")
    writer.close()


async def _no_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers, and speaks first, as mail and ssh do."""
    writer.write(b"220 smtp\r\n")
    await reader.readuntil(b"\r\n\r\n")
    writer.close()


async def test_ports_say_where_a_service_is_reached(agent_socket: Path) -> None:
    client = _SomePorts(lambda: asyncio.open_unix_connection(str(agent_socket)))
    port = publishing.free_port()
    async with await asyncio.start_server(_http, "127.0.0.1", 0) as server:
        service = server.sockets[0].getsockname()[1]
        client.only = frozenset({service})
        row = publishing.row(f"{port}:{service}", "1:1", "0.0.0.0:2:1", f"3:{service}/udp")
        waits, here, other = await listeners.look(client, row, ports.parse_all(row.publish))
        assert (here.url, here.published) == (f"http://127.0.0.1:{port}/", (f"127.0.0.1:{port}",))
        assert here.pid
        assert here.target == ""  # it listens on the guest's loopback
        assert (waits.port, waits.address, waits.published) == (1, "", ("127.0.0.1:1", "0.0.0.0:2"))
        assert (other.protocol, other.port, other.address) == ("udp", service, "")
        assert vm_ports._row(waits)[1:4] == ("-", "1", "nothing listens")
        (closed,) = await listeners.look(client, publishing.row(), [])
        assert closed.url == ""


async def test_what_answers_http_has_a_link_and_nothing_else(agent_socket: Path) -> None:
    client = _SomePorts(lambda: asyncio.open_unix_connection(str(agent_socket)))
    async with (
        await asyncio.start_server(_http, "0.0.0.0", 0) as web,  # noqa: S104 - as a service for others does
        await asyncio.start_server(_no_http, "0.0.0.0", 0) as mail,  # noqa: S104
    ):
        has_link, has_none = (each.sockets[0].getsockname()[1] for each in (web, mail))
        client.only = frozenset({has_link, has_none})
        found = {each.port: each for each in await listeners.look(client, publishing.row(network=True), [])}
    assert (found[has_link].target, found[has_link].url) == (
        f"web.vm:{has_link}",
        f"http://web.vm:{has_link}/",
    )
    assert (found[has_none].target, found[has_none].url) == (f"web.vm:{has_none}", "")


async def test_a_port_in_use_is_refused_before_the_vm_exists(daemon: conftest.Daemon) -> None:
    async with echo() as used:
        body = resources.CreateVm(name="web", publish=(f"{used}:80",))
        with pytest.raises(errors.AlreadyExistsError):
            await daemon.services.vms.create(body)
        assert await daemon.services.vms.list() == []
        assert daemon.world.leftovers() == {}


async def test_ports_live_with_their_vm_and_outlive_the_daemon(
    paths: config.Paths, world: worlds.World
) -> None:
    one, two = publishing.free_port(), publishing.free_port()
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        daemon = conftest.Daemon(services, paths, world)
        body = resources.CreateVm(name="web", publish=(f"{one}:80",))
        assert (await daemon.done(await services.vms.create(body))).error is None
        changed = await services.alterations.change_ports("web", ports.ChangePorts(publish=(f"{two}:81",)))
        assert changed.publish == (f"127.0.0.1:{one}:80/tcp", f"127.0.0.1:{two}:81/tcp")
        assert not await refuses(two)
        await services.alterations.change_ports("web", ports.ChangePorts(unpublish=(f"{one}:80",)))
        assert await refuses(one)
    assert await refuses(two)
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        daemon = conftest.Daemon(services, paths, world)
        assert not await refuses(two)
        await daemon.done(await services.vms.stop("web"))
        assert await refuses(two)
        await daemon.done(await services.vms.start("web"))
        assert not await refuses(two)
        await daemon.done(await services.vms.delete("web"))
        assert await refuses(two)


@contextlib.asynccontextmanager
async def port_taken_meanwhile(
    paths: config.Paths, world: worlds.World, *published: str
) -> AsyncIterator[tuple[conftest.Daemon, socket.socket]]:
    """A daemon that starts over a running VM, of whose ports another program has the first."""
    settings = (conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64)
    async with composition.compose(*settings) as services:
        body = resources.CreateVm(name="web", publish=published)
        done = await conftest.Daemon(services, paths, world).done(await services.vms.create(body))
        assert done.error is None
    first = ports.parse(published[0])
    with socket.create_server((first.address, first.host_port)) as other:
        async with composition.compose(*settings) as services:
            yield conftest.Daemon(services, paths, world), other


async def test_a_port_that_is_in_use_as_the_daemon_starts_keeps_no_other_and_comes_back(
    paths: config.Paths, world: worlds.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "_AGAIN_S", 0.01)
    used, free = publishing.free_port(), publishing.free_port()
    async with port_taken_meanwhile(paths, world, f"{used}:80", f"{free}:81") as (daemon, other):
        assert not await refuses(free)
        other.close()
        async with asyncio.timeout(20):
            while await refuses(used):  # noqa: ASYNC110 - nothing announces it
                await asyncio.sleep(0.01)
        await daemon.done(await daemon.services.vms.stop("web"))
        assert await refuses(used)
        assert await refuses(free)


async def test_what_is_not_published_now_is_not_said_to_be(paths: config.Paths, world: worlds.World) -> None:
    used, free, late = (publishing.free_port() for _ in range(3))
    async with port_taken_meanwhile(paths, world, f"{used}:80", f"{free}:81") as (daemon, other):
        shown = await daemon.services.vms.get("web")
        assert list(shown.unpublished) == [f"127.0.0.1:{used}:80/tcp"]
        assert "Address already in use" in shown.unpublished[f"127.0.0.1:{used}:80/tcp"]
        assert [vm.unpublished for vm in await daemon.services.vms.list()] == [shown.unpublished]
        facts = dict(vm_look._facts(shown))
        assert facts["published"] == f"127.0.0.1:{free}:81/tcp"
        assert facts["not published"].startswith(f"127.0.0.1:{used}:80/tcp, tried again every few seconds: ")
        rows, publisher = daemon.services.vms._store, daemon.services.vms._publisher
        assert [each.host_port for each in publisher.served(rows.find("web"))] == [free]
        more = ports.ChangePorts(publish=(f"{late}:82",))
        changed = await daemon.services.alterations.change_ports("web", more)
        assert (changed.unpublished, await refuses(late)) == (shown.unpublished, False)
        other.close()
        await published.PortKeeper(publisher, rows, daemon.services.vms._lifecycle).look()
        assert ((await daemon.services.vms.get("web")).unpublished, await refuses(used)) == ({}, False)
        await daemon.done(await daemon.services.vms.stop("web"))
        shown = await daemon.services.vms.get("web")
        assert shown.unpublished == {}
        assert dict(vm_look._facts(shown))["publishes"].endswith(f"127.0.0.1:{late}:82/tcp, while it runs")


@pytest.mark.parametrize("verb", ["stop", "delete", "unpublish"])
async def test_a_port_that_nobody_wants_any_more_does_not_come_back(
    paths: config.Paths, world: worlds.World, verb: str
) -> None:
    used = publishing.free_port()
    async with port_taken_meanwhile(paths, world, f"{used}:80") as (daemon, other):
        vms = daemon.services.vms
        if verb == "unpublish":
            gone = ports.ChangePorts(unpublish=(f"{used}:80",))
            await daemon.services.alterations.change_ports("web", gone)
        else:
            await daemon.done(await getattr(vms, verb)("web"))
        other.close()
        await published.PortKeeper(vms._publisher, vms._store, vms._lifecycle).look()
        assert await refuses(used)


@pytest.mark.parametrize("verb", ["stop", "kill", "delete"])
async def test_no_port_is_opened_while_its_vm_is_being_ended(
    paths: config.Paths, world: worlds.World, verb: str
) -> None:
    """Its row says that it runs until it has ended."""
    used = publishing.free_port()
    async with port_taken_meanwhile(paths, world, f"{used}:80") as (daemon, other):
        vms = daemon.services.vms
        gate = gates.Gate(world, privileged.TearDown)
        ending = await getattr(vms, verb)("web")
        await gate.reached.wait()
        other.close()
        await published.PortKeeper(vms._publisher, vms._store, vms._lifecycle).look()
        assert await refuses(used)
        gate.go.set()
        assert (await daemon.done(ending)).error is None
        assert await refuses(used)
        assert vms._publisher.holders() == []


async def test_what_a_change_left_half_is_made_whole(daemon: conftest.Daemon) -> None:
    """As when it was cancelled between the row and the port."""
    old, new = publishing.free_port(), publishing.free_port()
    body = resources.CreateVm(name="web", publish=(f"{old}:80",))
    await daemon.done(await daemon.services.vms.create(body))
    vms = daemon.services.vms
    row = vms._store.find("web")
    vms._store.save(msgspec.structs.replace(row, publish=(f"127.0.0.1:{new}:80/tcp",)))
    await published.PortKeeper(vms._publisher, vms._store, vms._lifecycle).look()
    assert (await refuses(old), await refuses(new)) == (True, False)
    vms._store.save(msgspec.structs.replace(row, state=resources.VmState.STOPPED))
    await published.PortKeeper(vms._publisher, vms._store, vms._lifecycle).look()
    assert await refuses(new)
