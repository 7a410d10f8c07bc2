# SPDX-License-Identifier: MIT
"""The network on this machine's kernel, in namespaces of its own: what each step of a start costs, and NAT.

The rival of a step is the least that must happen: a tap without rules, by the same system calls. The rival
of NAT is a bare tap, routed by a host that has neither tables nor bridge. A process of the same kind carries
the frames of both guests.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from banger.contract import names, privileged
from banger.helper import filesystem, network, operations, spares
from banger.helper.linux import netlink
from bench import host, report
from tests.root import helper_world, network_world

_ROUNDS: Final = 30
_GUESTS: Final = 200
_SECONDS: Final = 1.0
_CHUNK: Final = 1 << 18
_TURNS: Final = 7
_TUNSETOFFLOAD: Final = 0x400454D0
_OFFLOADS: Final = 0x01 | 0x02 | 0x04  # TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6


def run(_: host.Host) -> report.Report:
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        Path(directory).chmod(0o755)
        world = helper_world.make(Path(directory))
        with helper_world.network_namespace():
            rows = _steps(world)
        with helper_world.network_namespace():
            rows += _throughput(world)
    return report.Report(
        name="network",
        rival="a bare tap, plainly routed",
        rows=tuple(rows),
        notes=(f"medians of {_ROUNDS}",),
    )


def _steps(world: helper_world.HelperWorld) -> list[report.Row]:
    def ask(request: privileged.AnyRequest) -> Callable[[], object]:
        return lambda: operations.run(world.policy, request)

    rows = [report.Row("bridge, made", _once_ms(ask(privileged.EnsureBridge())), "ms")]
    for others in (0, _GUESTS):
        for slot in range(1, others + 1):
            filesystem.make_jail(world.policy, _id(slot), slot)
            ask(privileged.CreateTap(vm_id=_id(slot), slot=slot))()
            ask(privileged.SetGuestRules(vm_id=_id(slot), slot=slot, nat=slot % 2 == 0))()
        slot = 3000
        filesystem.make_jail(world.policy, _id(slot), slot)
        make = privileged.CreateTap(vm_id=_id(slot), slot=slot)
        rules = privileged.SetGuestRules(vm_id=_id(slot), slot=slot, nat=True)
        timed: dict[str, list[float]] = {}
        for warm in (True, False) * _ROUNDS:
            if warm:
                timed.setdefault("pool filled", []).append(_once_ms(lambda: network.refill(world.policy)))
            steps = (
                ("bridge, there already", ask(privileged.EnsureBridge())),
                ("packet rules with NAT", ask(rules)),
                (f"tap, pool {'warm' if warm else 'empty'}", ask(make)),
                ("rules deleted", ask(privileged.DeleteGuestRules(vm_id=_id(slot)))),
                ("tap deleted", ask(privileged.DeleteTap(vm_id=_id(slot)))),
            )
            for name, step in steps:
                timed.setdefault(name, []).append(_once_ms(step))
            timed.setdefault("bare tap", []).append(_bare_tap_ms())
            spares.drain()
        bare = report.median(timed.pop("bare tap"))
        rivals = {"tap, pool empty": bare, "tap, pool warm": bare}
        where = f", beside {others} guests"
        rows += [
            report.Row(name + where, report.median(found), "ms", rivals.get(name))
            for name, found in timed.items()
        ]
    return rows


def _bare_tap_ms() -> float:
    """Making it; that it goes takes the kernel much longer, and nobody waits for that in a start."""
    began = time.perf_counter()
    tap, _ = netlink.open_tap("bare0", owner=12345)
    took = (time.perf_counter() - began) * 1000
    os.close(tap)
    return took


def _throughput(world: helper_world.HelperWorld) -> list[report.Row]:
    """By turns: a guest on a tap of the helper's, with NAT, and one on a bare tap of another host's."""
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(network_world.networks(world))
        ours = network_world.Guest(_id(1), 1, network_world.Namespace(), "10.213.240.2")
        net.guests.append(ours)
        net.ask(privileged.CreateTap(vm_id=ours.vm_id, slot=ours.slot))
        net.rules(ours, nat=True)
        _plug(stack, ours, ours.tap, network_world.BRIDGE)
        stack.enter_context(helper_world.network_namespace())
        bare, internet = _bare_host(stack)
        rates: dict[str, tuple[list[float], list[float]]] = {}
        for _ in range(_TURNS):
            for guest_sends, what in ((True, "guest to internet"), (False, "internet to guest")):
                found = rates.setdefault(what, ([], []))
                found[0].append(_gbit_per_s(net.internet, ours.space, guest_sends=guest_sends))
                found[1].append(_gbit_per_s(internet, bare.space, guest_sends=guest_sends))
    return [
        report.Row(
            f"{what}, TCP, with bridge, rules and NAT", report.median(mine), "Gbit/s", report.median(its)
        )
        for what, (mine, its) in rates.items()
    ]


def _bare_host(stack: contextlib.ExitStack) -> tuple[network_world.Guest, network_world.Namespace]:
    """This thread's network: a tap with the guests' gateway on it, routed to an internet; nothing else."""
    guest = network_world.Guest(_id(2), 2, network_world.Namespace(), "10.213.240.3")
    internet = network_world.Namespace()
    stack.callback(internet.close)
    stack.callback(guest.space.close)
    network_world.run("ip", "link", "add", "uplink0", "type", "veth", "peer", "name", "inet0")
    network_world.run("ip", "link", "set", "inet0", "netns", f"/proc/{os.getpid()}/fd/{internet.fd}")
    network_world.run("ip", "addr", "add", f"{network_world.UPLINK}/24", "dev", "uplink0")
    network_world.run("ip", "link", "set", "uplink0", "up")
    network_world.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    internet.ip("addr", "add", f"{network_world.GATEWAY}/24", "dev", "inet0")
    internet.ip("addr", "add", f"{network_world.INTERNET}/32", "dev", "lo")
    internet.ip("link", "set", "inet0", "up")
    internet.ip("route", "add", "10.213.240.0/20", "via", network_world.UPLINK)
    network_world.run("ip", "route", "add", "default", "via", network_world.GATEWAY)
    network_world.run("ip", "tuntap", "add", "bare0", "mode", "tap", "vnet_hdr")
    network_world.run("ip", "addr", "add", f"{network_world.BRIDGE}/20", "dev", "bare0")
    network_world.run("ip", "link", "set", "bare0", "up")
    _plug(stack, guest, "bare0", network_world.BRIDGE)
    return guest, internet


def _plug(stack: contextlib.ExitStack, guest: network_world.Guest, tap: str, gateway: str) -> None:
    """The guest's `eth0`, and a process that carries its frames to and from the host's tap."""
    outside = network_world.open_tap(tap)
    with guest.space.entered():
        inside = network_world.open_tap("eth0")
    for fd in (outside, inside):
        fcntl.ioctl(fd, _TUNSETOFFLOAD, _OFFLOADS)
    argv = [sys.executable, "-m", "bench.pump", str(outside), str(inside)]
    pump = stack.enter_context(subprocess.Popen(argv, stdin=subprocess.PIPE, pass_fds=(outside, inside)))
    os.close(outside)
    os.close(inside)
    guest.space.ip("link", "set", "eth0", "address", guest.mac)
    guest.space.ip("addr", "add", f"{guest.address}/20", "dev", "eth0")
    guest.space.ip("link", "set", "eth0", "up")
    guest.space.ip("route", "add", "default", "via", gateway)
    stack.callback(pump.kill)


def _gbit_per_s(
    internet: network_world.Namespace, guest: network_world.Namespace, *, guest_sends: bool
) -> float:
    """One connection that the guest makes, for some seconds."""
    with internet.entered():
        server = socket.create_server((network_world.INTERNET, 0))
    with guest.entered():
        wire = socket.socket()
    with server, wire:
        server.settimeout(network_world.DEADLINE_S)
        wire.settimeout(network_world.DEADLINE_S)
        wire.connect(server.getsockname())
        taken, _ = server.accept()
        with taken:
            sender, receiver = (wire, taken) if guest_sends else (taken, wire)
            thread = threading.Thread(target=_drain, args=(receiver,))
            thread.start()
            sent, data, began = 0, bytes(_CHUNK), time.perf_counter()
            while time.perf_counter() - began < _SECONDS:
                sent += sender.send(data)
            sender.shutdown(socket.SHUT_WR)
            thread.join()
            return sent * 8 / (time.perf_counter() - began) / 1e9


def _drain(wire: socket.socket) -> None:
    while wire.recv(_CHUNK):
        pass


def _id(slot: int) -> names.VmId:
    return names.VmId(f"{slot:04x}" * 3)


def _once_ms(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000
