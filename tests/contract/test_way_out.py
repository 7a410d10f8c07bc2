# SPDX-License-Identifier: MIT
"""A build's way out, on real sockets: what it may reach, and what it is never told."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from banger.net import forward, outside, tcp_server
from banger.owner import way_out
from tests.fakes import origin as origins

SECRET = base64.b64encode(b"user:p/w").decode()
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody"
Asks = Callable[[str | bytes], bytes]


@pytest.fixture
def origin() -> Iterator[origins.Origin]:
    made = origins.Origin()
    yield made
    made.close()


@pytest.fixture
def proxy(
    _nothing_of_this_machine: None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[origins.Origin]:
    """A proxy that the daemon has, with a password."""
    made = origins.Origin(**getattr(request, "param", {}))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://user:p%2Fw@127.0.0.1:{made.port}")
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, and no resolver: it could take its time over what there is not."""
    real = outside.resolve

    async def resolve(host: str, port: int) -> list[outside.Address]:
        if host == "name.invalid":
            raise OSError
        return await real(host, port)

    monkeypatch.setattr(outside, "resolve", resolve)
    for name in [each for each in os.environ if each.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@contextlib.contextmanager
def served(*sources: forward.Place) -> Iterator[Asks]:
    """What a build's programs hear when they say this, to the end."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def ask(text: str | bytes) -> bytes:
        said = b""
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(text if isinstance(text, bytes) else text.encode())
            client.shutdown(socket.SHUT_WR)
            while piece := client.recv(1 << 16):
                said += piece
        return said

    with way_out.serving(listener, sources):
        yield ask
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=10)


def get(url: str, *headers: str) -> str:
    return "\r\n".join([f"GET {url} HTTP/1.1", "Host: other.example", *headers, "", ""])


def tunnel(place: str, then: str = "") -> str:
    return f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\n{then}"


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "0x7f000001", "0", "[::ffff:127.0.0.1]"]
)
def test_the_host_s_loopback_is_not_reached(origin: origins.Origin, host: str) -> None:
    with served() as ask:
        assert ask(get(f"http://{host}:{origin.port}/")).startswith(b"HTTP/1.1 403 ")
        assert ask(tunnel(f"{host}:{origin.port}", "GET / HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 403 ")
    assert origin.heads == []


def test_why_is_where_apt_shows_it(proxy: origins.Origin) -> None:
    """Of an answer that refuses, it shows the first line."""
    with served() as ask:
        [first, *_] = ask(get("http://10.1.2.3:8080/dists")).split(b"\r\n")
    assert first == b"HTTP/1.1 403 a build does not reach 10.1.2.3"


@pytest.mark.parametrize(
    "host", ["169.254.169.254", "[fd00:ec2::254]", "168.63.129.16", "10.0.0.1", "192.168.1.1", "[fe80::1]"]
)
def test_metadata_and_private_networks_are_not_reached(host: str, proxy: origins.Origin) -> None:
    """Neither from here, nor by a proxy that knows no better."""
    with served() as ask:
        assert ask(get(f"http://{host}/latest/meta-data/")).startswith(b"HTTP/1.1 403 ")
        assert ask(tunnel(f"{host}:443")).startswith(b"HTTP/1.1 403 ")
    assert proxy.heads == []


def test_an_address_of_this_host_s_own_is_not_reached(
    origin: origins.Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a public one, which is known by its route alone."""
    monkeypatch.setattr(outside, "is_public", lambda address: True)
    with served() as ask:
        assert ask(get(f"{origin.url}/")).startswith(b"HTTP/1.1 403 ")
    assert origin.heads == []


def test_a_name_of_which_one_address_is_inside_is_refused(
    origin: origins.Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever owns it chooses what is tried first."""

    async def resolve(host: str, port: int) -> list[outside.Address]:
        return [ipaddress.ip_address(each) for each in ("8.8.8.8", "127.0.0.1")]

    monkeypatch.setattr(outside, "resolve", resolve)
    with served() as ask:
        assert ask(get(f"http://rebound.example:{origin.port}/")).startswith(b"HTTP/1.1 403 ")


def test_what_is_outside_is_reached_as_it_was_judged(
    origin: origins.Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its address: another question could be answered with another."""
    asked = []

    async def resolve(host: str, port: int) -> list[outside.Address]:
        asked.append(host)
        return [ipaddress.ip_address("127.0.0.1")]

    monkeypatch.setattr(outside, "resolve", resolve)
    monkeypatch.setattr(outside, "is_outside", lambda address: True)
    with served() as ask:
        assert ask(get(f"http://public.example:{origin.port}/x?y=1")).endswith(origins.BODY)
        assert ask(tunnel(f"public.example:{origin.port}", "HEAD / HTTP/1.1\r\n\r\n")).startswith(
            b"HTTP/1.1 200 Connection established\r\n\r\nHTTP/1.1 200 OK\r\n"
        )
    assert asked == ["public.example"] * 2
    first = origin.heads[0].decode().split("\r\n")
    assert first[:2] == ["GET /x?y=1 HTTP/1.1", f"Host: public.example:{origin.port}"]


@pytest.fixture
def silent_address(origin: origins.Origin) -> Iterator[str]:
    """Where nothing answers, as with a network that swallows IPv6: a queue that is full."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.2", origin.port))
        full.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        yield "127.0.0.2"


def test_an_address_that_does_not_answer_does_not_keep_the_next_one(
    origin: origins.Origin, silent_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """apt gives up after half a minute."""

    async def resolve(host: str, port: int) -> list[outside.Address]:
        return [ipaddress.ip_address(each) for each in (silent_address, "127.0.0.1")]

    monkeypatch.setattr(way_out, "_NEXT_S", 0.2)
    monkeypatch.setattr(outside, "resolve", resolve)
    with served(("mirror.example", origin.port)) as ask:
        assert ask(get(f"http://mirror.example:{origin.port}/")).endswith(origins.BODY)


def test_package_sources_are_reached_wherever_they_are_and_nothing_beside_them(
    origin: origins.Origin,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, served(("127.0.0.1", origin.port)) as ask:
        assert ask(get(f"{origin.url}/dists/x")).endswith(origins.BODY)
        assert ask(get(f"http://127.0.0.1:{other.getsockname()[1]}/")).startswith(b"HTTP/1.1 403 ")
        assert ask(get(f"http://localhost:{origin.port}/")).startswith(b"HTTP/1.1 403 ")


def test_each_request_of_a_connection_is_judged(origin: origins.Origin) -> None:
    with origins.scripted([ANSWER, ANSWER], [ANSWER]) as kept, served(("127.0.0.1", kept.port)) as ask:
        heard = ask(get(f"{kept.url}/a") + get("http://169.254.169.254/") + get(f"{kept.url}/b"))
        assert heard.startswith(ANSWER + b"HTTP/1.1 403 ")
        assert len(kept.heads) == 1
        heard = ask(get(f"{kept.url}/a") + get(f"{origin.url}/"))
        assert heard.startswith(ANSWER + b"HTTP/1.1 403 ")
    assert origin.heads == []


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x\r\nabc\r\n0\r\nTrailer: y\r\n\r\n"
KEPT = {
    "a length": [ANSWER, ANSWER],
    "chunks": [CHUNKED, ANSWER],
    "nothing new": [b"HTTP/1.1 304 Same\r\nContent-Length: 5\r\n\r\n", ANSWER],
    "what goes before": [b"HTTP/1.1 100 Go on\r\n\r\n" + ANSWER, ANSWER],
}


@pytest.mark.parametrize("what", KEPT)
def test_one_connection_serves_a_client_s_requests_to_one_place(what: str) -> None:
    """apt has hundreds of them."""
    with origins.scripted(KEPT[what]) as there, served(("127.0.0.1", there.port)) as ask:
        heard = ask(get(f"{there.url}/a") + get(f"{there.url}/b"))
        assert heard == b"".join(KEPT[what]).removeprefix(b"HTTP/1.1 100 Go on\r\n\r\n")
        assert there.connections == 1
    assert [head.split(b" ")[1] for head in there.heads] == [b"/a", b"/b"]


@pytest.mark.parametrize(
    "last",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nab",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\n\r\nuntil the end",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nab",
    ],
)
def test_an_answer_that_is_the_last_ends_the_client_s_connection(last: bytes) -> None:
    with origins.scripted([last]) as there, served(("127.0.0.1", there.port)) as ask:
        assert ask(get(f"{there.url}/a") + get(f"{there.url}/b")) == last
    assert len(there.heads) == 1


def test_trailers_without_end_take_no_memory() -> None:
    """Of who asks for them and takes none; a server in league with a build says them as long as it likes."""
    line = b"X: " + b"x" * 8000 + b"\r\n"
    with (
        socket.create_server(("127.0.0.1", 0)) as origin,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket() as deaf,
        contextlib.ExitStack() as stack,
    ):
        place = ("127.0.0.1", origin.getsockname()[1])
        stack.enter_context(way_out.serving(listener.dup(), [place]))
        deaf.connect(listener.getsockname())
        deaf.sendall(get(f"http://127.0.0.1:{place[1]}/").encode())
        there, _ = origin.accept()
        with there:
            there.settimeout(1)
            there.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
            with pytest.raises(TimeoutError):
                there.sendall(line * 8000)


def test_a_kept_connection_that_has_ended_is_made_anew() -> None:
    """Servers end them as they like."""
    with origins.scripted([ANSWER], [ANSWER]) as there, served(("127.0.0.1", there.port)) as ask:
        assert ask(get(f"{there.url}/a") + get(f"{there.url}/b")) == ANSWER * 2
    assert there.connections == 2


@pytest.mark.parametrize(
    "cut",
    [ANSWER[:-1], CHUNKED[:-9], b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"],
)
def test_an_answer_that_is_cut_off_is_not_taken_for_whole(cut: bytes) -> None:
    with (
        origins.scripted([cut]) as there,
        served(("127.0.0.1", there.port)) as ask,
        pytest.raises(ConnectionResetError),
    ):
        ask(get(f"{there.url}/a"))


@pytest.mark.parametrize("nonsense", [b"nonsense\r\n\r\n", b"", b"HTTP/1.1 20 X\r\n\r\n"])
def test_what_is_no_answer_is_told_as_that(nonsense: bytes) -> None:
    with origins.scripted([nonsense]) as there, served(("127.0.0.1", there.port)) as ask:
        assert ask(get(f"{there.url}/a")).startswith(b"HTTP/1.1 502 ")


def test_the_daemon_s_proxy_is_told_its_password_and_builds_are_not(proxy: origins.Origin) -> None:
    with served() as ask:
        heard = ask(get("http://name.invalid/x", "Proxy-Authorization: Basic eA==", "Accept: a/b"))
        heard += ask(tunnel("name.invalid:443", "GET / HTTP/1.1\r\n\r\n"))
    assert heard.count(origins.BODY) == 2
    assert SECRET.encode() not in heard
    plain, asked, inside = (head.decode().split("\r\n") for head in proxy.heads)
    assert plain == [
        "GET http://name.invalid/x HTTP/1.1",
        "Host: name.invalid",
        f"Proxy-Authorization: Basic {SECRET}",
        "accept: a/b",
        *("", ""),
    ]
    assert asked[0] == "CONNECT name.invalid:443 HTTP/1.1"
    assert f"Proxy-Authorization: Basic {SECRET}" in asked
    assert inside == ["GET / HTTP/1.1", "", ""]


@pytest.mark.parametrize(
    "proxy",
    [
        {"tunnel": b"HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=secret\r\n\r\n"},
        {"tunnel": b"nonsense\r\n\r\n"},
        {"tunnel": b""},
    ],
    indirect=True,
)
def test_a_proxy_that_refuses_is_told_of_without_what_it_says(proxy: origins.Origin) -> None:
    with served() as ask:
        heard = ask(tunnel("name.invalid:443"))
    assert heard.startswith(b"HTTP/1.1 502 ")
    assert b"secret" not in heard


def test_a_proxy_that_is_no_address_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://user:secret/word@proxy:3128")
    with served() as ask:
        heard = ask(get("http://name.invalid/"))
    assert heard.startswith(b"HTTP/1.1 502 ")
    assert b"secret" not in heard


@pytest.mark.parametrize(
    "request_",
    [
        b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET http:/// HTTP/1.1\r\n\r\n",
        b"GET file:///etc/passwd HTTP/1.1\r\n\r\n",
        b"GET http://a@127.0.0.1/ HTTP/1.1\r\n\r\n",
        b"GET http://h:99999/ HTTP/1.1\r\n\r\n",
        b"GET http://h:0/ HTTP/1.1\r\n\r\n",
        b"GET http://h\\@127.0.0.1/ HTTP/1.1\r\n\r\n",
        b"GET http://h/ HTTP/1.1\nX: y\r\n\r\n",
        b"GET http://h/\r\n HTTP/1.1\r\n\r\n",
        b"GET http://h/ HTTP/2\r\n\r\n",
        b"POST http://h/ HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
        b"GET http://h/ HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
        b"GET http://h/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET http://h/ HTTP/1.1\r\nA: b\nProxy-Authorization: x\r\n\r\n",
        b"GET http://h/ HTTP/1.1\r\n folded\r\n\r\n",
        b"GET http://h/ HTTP/1.1\r\nTransfer-Encoding : chunked\r\n\r\n",
        b"GET http://h/ HTTP/1.1\r\nno header\r\n\r\n",
        b"CONNECT http://h/ HTTP/1.1\r\n\r\n",
        b"CONNECT h:443/ HTTP/1.1\r\n\r\n",
        b"CONNECT :443 HTTP/1.1\r\n\r\n",
        b"CONNECT [::1%lo]:443 HTTP/1.1\r\n\r\n",
        b"\xff" * 100 + b"\r\n\r\n",
    ],
)
def test_what_is_not_exactly_a_request_reaches_nobody(request_: bytes, proxy: origins.Origin) -> None:
    """Two readers of one request must not differ in what it is."""
    with served() as ask:
        assert ask(request_)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 405")
    assert proxy.heads == []


@pytest.mark.parametrize("text", [b"", b"GET http://h/", b"A" * (1 << 20)])
def test_a_request_that_does_not_end_is_hung_up_on(text: bytes) -> None:
    with served() as ask, contextlib.suppress(OSError):
        assert ask(text) == b""


def test_the_end_ends_what_is_going_on(proxy: origins.Origin) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with socket.socket() as client:
        client.settimeout(10)
        with way_out.serving(listener, ()):
            client.connect(listener.getsockname())
            client.sendall(tunnel("name.invalid:443").encode())
            assert client.recv(100).startswith(b"HTTP/1.1 200 ")
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""


def test_a_listener_that_waits_where_it_should_not_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A build shares it: it may have it block, and take the connection away that there was."""
    monkeypatch.setattr(way_out, "_GRACE_S", 0.1)
    listener = socket.create_server(("127.0.0.1", 0))
    blocked = threading.Event()

    class Server(tcp_server.TcpServer):
        def start(self, listening: socket.socket) -> None:
            super().start(listening)
            listening.setblocking(True)
            asyncio.get_running_loop().call_soon(blocked.set)
            asyncio.get_running_loop().call_soon(self._accept, listening)

    monkeypatch.setattr(tcp_server, "TcpServer", Server)
    with way_out.serving(listener, ()):
        assert blocked.wait(10)
    assert not [each for each in threading.enumerate() if each.name == "way-out"]
