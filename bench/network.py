# SPDX-License-Identifier: MIT
"""The network on this machine's kernel, in namespaces of its own: what each step of a start costs, and NAT.

The rival of a step is the least that must happen: a tap without rules, by the same system calls. The rival
of NAT is the same veth, routed by the same kernel without tables, bridge or translation.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from banger.contract import names, privileged
from banger.helper import operations, tables
from banger.helper.linux import libc, netlink
from bench import host, report
from tests.root import helper_world, network_world

_ROUNDS: Final = 30
_GUESTS: Final = 200
_SECONDS: Final = 2.0
_CHUNK: Final = 1 << 18
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFNAME: Final = 0x8923


def run(_: host.Host) -> report.Report:
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        Path(directory).chmod(0o755)
        world = helper_world.make(Path(directory))
        with helper_world.network_namespace():
            rows = _steps(world)
        with helper_world.network_namespace():
            rows += _throughput(world)
    return report.Report(
        name="network", rival="a bare tap; plain routing", rows=tuple(rows), notes=(f"medians of {_ROUNDS}",)
    )


def _steps(world: helper_world.HelperWorld) -> list[report.Row]:
    def ask(request: privileged.AnyRequest) -> Callable[[], object]:
        return lambda: operations.run(world.policy, request)

    rows = [report.Row("bridge, made", _once_ms(ask(privileged.EnsureBridge())), "ms")]
    for others in (0, _GUESTS):
        for slot in range(1, others + 1):
            ask(privileged.CreateTap(vm_id=_id(slot), slot=slot))()
            ask(privileged.SetGuestRules(vm_id=_id(slot), slot=slot, nat=slot % 2 == 0))()
        slot = 3000
        make = privileged.CreateTap(vm_id=_id(slot), slot=slot)
        rules = privileged.SetGuestRules(vm_id=_id(slot), slot=slot, nat=True)
        timed: dict[str, list[float]] = {}
        for _ in range(_ROUNDS):
            steps = (
                ("bridge, there already", ask(privileged.EnsureBridge())),
                ("packet rules with NAT", ask(rules)),
                ("tap", ask(make)),
                ("rules deleted", ask(privileged.DeleteGuestRules(vm_id=_id(slot)))),
                ("tap deleted", ask(privileged.DeleteTap(vm_id=_id(slot)))),
            )
            for name, step in steps:
                timed.setdefault(name, []).append(_once_ms(step))
            timed.setdefault("bare tap", []).append(_bare_tap_ms())
            timed.setdefault("tap from a warm pool", []).append(_pooled_tap_ms(world))
        rivals = {"tap": report.median(timed.pop("bare tap"))}
        where = f", beside {others} guests"
        rows += [
            report.Row(name + where, report.median(found), "ms", rivals.get(name))
            for name, found in timed.items()
        ]
    return rows


def _bare_tap_ms() -> float:
    """Making it; that it goes takes the kernel much longer, and nobody waits for that in a start."""
    began = time.perf_counter()
    tap = netlink.open_tap("bare0", owner=12345)
    took = (time.perf_counter() - began) * 1000
    os.close(tap)
    return took


def _pooled_tap_ms(world: helper_world.HelperWorld) -> float:
    """What a pool would leave to do: one that stands ready as a port of the bridge becomes a VM's.

    Name and label, by which it is found after a crash, and the owner come late, as they are the VM's; the
    kernel renames only a link that is down.
    """
    bridge = netlink.find(world.policy.bridge)
    tap = netlink.open_tap("pool0", owner=world.policy.uid(3001))
    ready = netlink.find("pool0")
    if bridge is None or ready is None:
        raise RuntimeError("the links of this benchmark are not there")
    netlink.bring_up(ready.number, alias="banger/pool", master=bridge.number, group=tables.TAP_GROUP)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wire:
        fcntl.ioctl(wire, _SIOCSIFFLAGS, struct.pack("=16sh22x", b"pool0", 0))
        began = time.perf_counter()
        libc.ioctl(tap, netlink.TUNSETOWNER, world.policy.uid(3000), "pool0")
        fcntl.ioctl(wire, _SIOCSIFNAME, struct.pack("=16s16s8x", b"pool0", b"tap-pooled"))
        netlink.bring_up(ready.number, alias=f"banger/{_id(3000)}")
        took = (time.perf_counter() - began) * 1000
    os.close(tap)
    return took


def _throughput(world: helper_world.HelperWorld) -> list[report.Row]:
    with network_world.networks(world) as net:
        guest = network_world.Guest(_id(1), 1, network_world.Namespace(), "10.213.240.2")
        net.guests.append(guest)
        network_world.run("ip", "link", "add", guest.tap, "type", "veth", "peer", "name", "eth0")
        network_world.run("ip", "link", "set", "eth0", "netns", f"/proc/{os.getpid()}/fd/{guest.space.fd}")
        network_world.run("ip", "link", "set", guest.tap, "group", str(tables.TAP_GROUP), "up")
        network_world.run("ip", "link", "set", guest.tap, "master", "br-fc")
        guest.space.ip("link", "set", "eth0", "address", guest.mac)
        guest.space.ip("addr", "add", f"{guest.address}/20", "dev", "eth0")
        guest.space.ip("link", "set", "eth0", "up")
        guest.space.ip("route", "add", "default", "via", network_world.BRIDGE)
        net.rules(guest, nat=True)
        natted = _gbit_per_s(net, guest)
        for family in ("bridge", "inet"):
            network_world.run("nft", "delete", "table", family, "banger")
        network_world.run("ip", "link", "set", guest.tap, "nomaster")
        network_world.run("ip", "addr", "flush", "dev", "br-fc")
        network_world.run("ip", "addr", "add", f"{network_world.BRIDGE}/20", "dev", guest.tap)
        network_world.run("ip", "link", "set", "br-fc", "down")
        guest.space.ip("neigh", "flush", "all")
        network_world.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        plain = _gbit_per_s(net, guest)
    return [report.Row("guest to internet, TCP, with NAT and rules", natted, "Gbit/s", plain)]


def _gbit_per_s(net: network_world.Net, guest: network_world.Guest) -> float:
    server = net.tcp_server(network_world.INTERNET, 0, net.internet)
    wire = net.wire(socket.AF_INET, socket.SOCK_STREAM, space=guest.space)
    wire.settimeout(network_world.DEADLINE_S)
    wire.connect(server.getsockname())
    taken, _ = server.accept()
    thread = threading.Thread(target=_drain, args=(taken,))
    thread.start()
    sent, data, began = 0, bytes(_CHUNK), time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        sent += wire.send(data)
    wire.close()
    thread.join()
    return sent * 8 / (time.perf_counter() - began) / 1e9


def _drain(wire: socket.socket) -> None:
    with wire, contextlib.suppress(OSError):
        while wire.recv(_CHUNK):
            pass


def _id(slot: int) -> names.VmId:
    return names.VmId(f"{slot:04x}" * 3)


def _once_ms(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000
