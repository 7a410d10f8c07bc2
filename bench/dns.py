# SPDX-License-Identifier: MIT
"""Questions to the DNS server on loopback, beside dnsmasq with the same names, which is C.

Latency is of questions at a steady pace, whether or not the last one was answered: so a late answer counts
with all its lateness. Throughput is of as many as are answered while 64 wait. Server and client are two
processes.
"""

from __future__ import annotations

import asyncio
import ipaddress
import multiprocessing
import os
import select
import socket
import statistics
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from typing import Final

import dnslib

from banger.net import dns, wire, zone
from bench import host, report

RATE: Final = 5000
SECONDS: Final = 4
ROUNDS: Final = 3
_LOOPBACK: Final = ipaddress.IPv4Address("127.0.0.1")
_NETWORK: Final = ipaddress.IPv4Network("10.213.240.0/20")
_GRACE_S: Final = 1.0
_START_S: Final = 10.0
_WINDOW: Final = 64
_VMS: Final = [(f"vm{number}", _NETWORK.network_address + 2 + number) for number in range(200)]

Work = Callable[[connection.Connection], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """Milliseconds, and questions without an answer."""

    p50_ms: float
    p99_ms: float
    lost: int
    per_s: float


def run(_: host.Host) -> report.Report:
    rounds: dict[str, list[tuple[Measured, Measured]]] = {"repeated": [], "new": []}
    for _round in range(ROUNDS):
        for kind, found in rounds.items():
            queries = list(_queries(kind))
            with _served(_serve_dns) as ours, _dnsmasq() as theirs:
                found.append((_measured(ours, queries), _measured(theirs, queries)))
    return summed_up(rounds)


def summed_up(rounds: dict[str, list[tuple[Measured, Measured]]]) -> report.Report:
    rows = []
    for kind, found in rounds.items():
        ours, theirs = zip(*found, strict=True)
        for name, what, unit in (("p50_ms", "p50", "ms"), ("p99_ms", "p99", "ms"), ("per_s", "most", "/s")):
            mine, other = (
                statistics.median(getattr(each, name) for each in side) for side in (ours, theirs)
            )
            rows.append(report.Row(f"{kind} questions, {what}", mine, unit, other))
    lost = sum(each.lost for found in rounds.values() for pair in found for each in pair[:1])
    return report.Report(
        name="dns",
        rival="dnsmasq",
        rows=tuple(rows),
        notes=(f"{RATE} questions a second for {SECONDS} s, n = {ROUNDS}; {lost} without an answer",),
    )


def _queries(kind: str) -> Iterator[bytes]:
    for number in range(RATE * SECONDS):
        below = f"x{os.urandom(4).hex()}." if kind == "new" else ""
        yield bytes(dnslib.DNSRecord.question(f"{below}vm{number % 200}.vm").pack())


def _measured(port: int, queries: list[bytes]) -> Measured:
    p50_ms, p99_ms, lost = _paced(port, queries)
    return Measured(p50_ms, p99_ms, lost, _per_s(port, queries))


def _per_s(port: int, queries: list[bytes]) -> float:
    """With a window of questions that wait, as many resolvers together would have."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((str(_LOOPBACK), port))
        client.settimeout(_START_S)
        began = time.perf_counter()
        for number, query in enumerate(queries):
            if number >= _WINDOW:
                client.recv(2000)
            client.send(query)
        for _ in range(min(_WINDOW, len(queries))):
            client.recv(2000)
        return len(queries) / (time.perf_counter() - began)


def _paced(port: int, queries: list[bytes]) -> tuple[float, float, int]:
    sent: dict[int, float] = {}
    taken: list[float] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        client.connect((str(_LOOPBACK), port))
        began = time.perf_counter()
        for number, query in enumerate(queries):
            due = began + number / RATE
            while (left := due - time.perf_counter()) > 0:
                _collect(client, sent, taken, left)
            sent[number & 0xFFFF] = due
            client.send(struct.pack("!H", number & 0xFFFF) + query[2:])
        end = time.perf_counter() + _GRACE_S
        while sent and (left := end - time.perf_counter()) > 0:
            _collect(client, sent, taken, left)
    cuts = statistics.quantiles(taken, n=100)
    return cuts[49] * 1000, cuts[98] * 1000, len(queries) - len(taken)


def _collect(client: socket.socket, sent: dict[int, float], taken: list[float], limit_s: float) -> None:
    if not select.select([client], [], [], limit_s)[0]:
        return
    (number,) = struct.unpack("!H", client.recv(2000)[:2])
    taken.append(time.perf_counter() - sent.pop(number))


@contextmanager
def _served(work: Work) -> Iterator[int]:
    """The port of a server in a process of its own, gone with the block."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=work, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


@contextmanager
def _dnsmasq() -> Iterator[int]:
    """Each name and all below it, as ours; no other server is asked, and nothing is logged."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((str(_LOOPBACK), 0))
        port = probe.getsockname()[1]
    own = [f"--address=/{name}.vm/{address}" for name, address in _VMS]
    plain = ("--keep-in-foreground", "--conf-file=/dev/null", "--pid-file", "--no-resolv", "--no-hosts")
    where = (f"--port={port}", f"--listen-address={_LOOPBACK}", "--bind-interfaces", "--local=/vm/")
    process = subprocess.Popen(["/usr/sbin/dnsmasq", *plain, *where, *own])
    try:
        _wait_until_it_answers(port)
        yield port
    finally:
        process.terminate()
        process.wait()


def _wait_until_it_answers(port: int) -> None:
    question = bytes(dnslib.DNSRecord.question("vm1.vm").pack())
    end = time.monotonic() + _START_S
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(0.1)
        client.connect((str(_LOOPBACK), port))
        while True:
            try:
                client.send(question)
                client.recv(2000)
                return
            except OSError:
                if time.monotonic() > end:
                    raise


def _serve_dns(told: connection.Connection) -> None:
    asyncio.run(_answer(told))


async def _answer(told: connection.Connection) -> None:
    respond = wire.responder(zone.of(_VMS, _NETWORK, serial=1))
    server = dns.Server(_LOOPBACK, 0, lambda data, *_: respond(data))
    await server.start()
    told.send(int(server.endpoint.rpartition(":")[2]))
    await asyncio.Event().wait()
