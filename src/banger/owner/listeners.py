# SPDX-License-Identifier: MIT
"""The ports on which a guest listens, as its agent says, which of them speak HTTP, and published ones."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from banger.contract import errors, guest, names, ports
from banger.owner import guest as guests
from banger.vm import record

_PROBE_S: Final = 1.0
_PROBES_AT_ONCE: Final = 8
_MAX_PROBED: Final = 64
_QUESTION: Final = b"HEAD / HTTP/1.0\r\nHost: localhost\r\nConnection: close\r\n\r\n"


_Places = Mapping[tuple[int, str], Sequence[str]]
"""Where the host offers a port of the guest, by port and protocol."""


async def look(
    client: guests.GuestClient, vm: record.VmRecord, published: Iterable[ports.Publish]
) -> list[ports.GuestPort]:
    """`published`: where this host listens for the VM."""
    found = sorted(await client.ports(), key=lambda each: each.port)
    turn = asyncio.Semaphore(_PROBES_AT_ONCE)

    async def speaks_http(listener: guest.Listener) -> bool:
        async with turn:
            return await _speaks_http(client, listener)

    probed = await asyncio.gather(*(speaks_http(each) for each in found[:_MAX_PROBED]))
    answers = [*probed, *[False] * (len(found) - len(probed))]
    places = _places(published)
    shown = [_shown(vm, each, places, http=http) for each, http in zip(found, answers, strict=True)]
    return sorted(
        [*shown, *_awaited(places, shown)], key=lambda each: (each.port, each.protocol, each.address)
    )


def _places(published: Iterable[ports.Publish]) -> _Places:
    found: dict[tuple[int, str], list[str]] = {}
    for each in published:
        found.setdefault((each.guest_port, each.protocol), []).append(f"{each.address}:{each.host_port}")
    return found


def _awaited(places: _Places, shown: Sequence[ports.GuestPort]) -> Iterator[ports.GuestPort]:
    """What is published, and nothing listens there yet."""
    known = {(each.port, each.protocol) for each in shown}
    for (port, protocol), published in places.items():
        if (port, protocol) not in known:
            yield ports.GuestPort(
                protocol=protocol, address="", port=port, pid=0, process="", published=tuple(published)
            )


def _shown(vm: record.VmRecord, listener: guest.Listener, places: _Places, *, http: bool) -> ports.GuestPort:
    protocol = "udp" if listener.protocol.startswith("udp") else "tcp"
    published = places.get((listener.port, protocol), ())
    # Straight to the guest, published or not, a service on its loopback is not reached.
    open_to_host = vm.network and not _is_loopback(listener.address)
    target = f"{vm.name}.vm:{listener.port}" if open_to_host else ""
    links: Sequence[str] = [*published, *([target] if target else [])] if http else ()
    return ports.GuestPort(
        protocol=protocol,
        address=listener.address,
        port=listener.port,
        pid=listener.pid,
        process=listener.process,
        target=target,
        published=tuple(published),
        url=f"http://{links[0]}/" if links else "",
    )


def _is_loopback(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False


async def _speaks_http(client: guests.GuestClient, listener: guest.Listener) -> bool:
    """By the agent, which reaches a loopback service too."""
    if listener.protocol.startswith("udp") or listener.port == names.AGENT_PORT:
        return False
    try:
        async with (
            asyncio.timeout(_PROBE_S),
            client.connect(guest.ConnectSpec(port=listener.port)) as tunnel,
        ):
            await tunnel.write(_QUESTION)
            return (await tunnel.read()).startswith(b"HTTP/")
    except (errors.BangerError, TimeoutError):
        return False
