# SPDX-License-Identifier: MIT
"""Networks of a test's own: host in the thread's namespace, an internet behind an uplink, guests on taps.

A guest is a namespace whose `eth0` is a tap; a thread carries its frames to and from the tap that the helper
made, as a VMM would. Nothing leaves these namespaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from banger.contract import destinations, egress, names, privileged
from banger.helper import operations
from banger.helper.linux import nftables
from tests.root import helper_world

INTERNET: Final = "203.0.113.10"
PRIVATE: Final = "192.168.77.10"
METADATA: Final = "169.254.169.254"
UPLINK: Final = "198.51.100.2"
GATEWAY: Final = "198.51.100.1"
BRIDGE: Final = "10.213.240.1"
"""Of the default network, as `BRIDGE6`."""
INTERNET6: Final = "2001:db8:77::10"
PRIVATE6: Final = "fd77::10"
METADATA6: Final = "fd00:ec2::254"
UPLINK6: Final = "2001:db8:1::2"
GATEWAY6: Final = "2001:db8:1::1"
BRIDGE6: Final = "fd62:616e:6765:7200::1"
_CLONE_NEWNET: Final = 0x40000000
_TUNSETIFF: Final = 0x400454CA
_TAP_FLAGS: Final = 0x0002 | 0x1000 | 0x4000  # IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
DEADLINE_S: Final = 10.0


def _checked(result: int) -> None:
    assert result == 0, os.strerror(ctypes.get_errno())


class Namespace:
    """An empty network that lives as long as its descriptor."""

    def __init__(self) -> None:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _checked(_LIBC.unshare(_CLONE_NEWNET))
            self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            _checked(_LIBC.setns(home, _CLONE_NEWNET))
            os.close(home)
        self.ip("link", "set", "lo", "up")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Sockets made inside stay in this network."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        _checked(_LIBC.setns(self.fd, _CLONE_NEWNET))
        try:
            yield
        finally:
            _checked(_LIBC.setns(home, _CLONE_NEWNET))
            os.close(home)

    def run(self, *argv: str) -> str:
        with self.entered():
            return run(*argv)

    def ip(self, *words: str) -> None:
        self.run("ip", *words)

    def close(self) -> None:
        os.close(self.fd)


def run(*argv: str, given: str | None = None) -> str:
    done = subprocess.run(argv, input=given, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, (argv, done.stderr)
    return done.stdout


def open_tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("=16sH22x", name.encode(), _TAP_FLAGS))
    return fd


@dataclass(slots=True)
class Guest:
    """A VM as far as the network sees it."""

    vm_id: str
    slot: int
    space: Namespace
    address: str
    address6: str = ""

    @property
    def tap(self) -> str:
        return names.tap_name(names.VmId(self.vm_id))

    @property
    def mac(self) -> str:
        return names.mac_address(names.VmId(self.vm_id))


@dataclass(slots=True)
class Net:
    """Everything, with the helper's policy. `drops` counts what the rules dropped, by reason."""

    world: helper_world.HelperWorld
    internet: Namespace
    guests: list[Guest] = field(default_factory=list)
    _sockets: list[socket.socket] = field(default_factory=list)
    _pairs: dict[int, int] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)
    _pump: threading.Thread | None = None

    def ask(self, request: privileged.AnyRequest) -> None:
        operations.run(self.world.policy, request)

    def rules(self, guest: Guest, *, allow: tuple[str, ...] = (), **more: Any) -> None:
        """Sets the guest's rules."""
        found = destinations.networks(allow)
        if "egress" in more:
            more["egress"] = egress.Egress(more["egress"])
        self.ask(privileged.SetGuestRules(vm_id=guest.vm_id, slot=guest.slot, allow=found, **more))

    def guest(self, slot: int, *, peers: str = "", ipv6: bool = False, **more: Any) -> Guest:
        """Makes its tap and its rules, and plugs it in."""
        vm_id = f"{slot:04x}" * 3
        prefix, prefix6 = self.world.policy.prefix, self.world.policy.prefix6
        address = str(names.guest_address(prefix, slot))
        address6 = str(names.guest_address6(prefix6, slot)) if ipv6 else ""
        made = Guest(vm_id, slot, Namespace(), address, address6)
        self.ask(privileged.CreateTap(vm_id=vm_id, slot=slot, peers=bool(peers)))
        self.rules(made, peers=peers, ipv6=ipv6, **more)
        outside = open_tap(made.tap)
        with made.space.entered():
            inside = open_tap("eth0")
        made.space.ip("link", "set", "eth0", "address", made.mac)
        made.space.run("sysctl", "-qw", f"net.ipv6.conf.eth0.disable_ipv6={int(not ipv6)}")
        made.space.ip("addr", "add", f"{address}/{prefix.prefixlen}", "dev", "eth0")
        made.space.ip("link", "set", "eth0", "up")
        made.space.ip("route", "add", "default", "via", str(names.bridge_address(prefix)))
        if ipv6:
            made.space.ip("addr", "add", f"{address6}/64", "dev", "eth0", "nodad")
            made.space.ip("route", "add", "default", "via", str(names.bridge_address6(prefix6)))
        self._pairs |= {outside: inside, inside: outside}
        self.guests.append(made)
        return made

    def unplug(self, guest: Guest) -> None:
        self.ask(privileged.DeleteTap(vm_id=guest.vm_id))
        self.ask(privileged.DeleteGuestRules(vm_id=guest.vm_id))

    def drops(self) -> dict[str, int]:
        """Without what kernels of guests with IPv6 tell routers, which they do when they like."""
        found: dict[str, int] = {}
        for family in ("bridge", "inet"):
            for each in nftables.query("counters", family=family, table="banger"):
                if each["counter"]["table"] == "banger":
                    found[each["counter"]["name"]] = each["counter"]["packets"]
        if any(guest.address6 for guest in self.guests):
            found.pop("to_routers", None)
        return found

    def wire(
        self, family: int, kind: int, number: int = 0, *, space: Namespace | None = None
    ) -> socket.socket:
        """One in a namespace, the host's by default; closed with everything."""
        with space.entered() if space else contextlib.nullcontext():
            made = socket.socket(family, kind, number)
        self._sockets.append(made)
        return made

    def udp_server(self, address: str, port: int, space: Namespace | None = None) -> socket.socket:
        server = self.wire(family_of(address), socket.SOCK_DGRAM, space=space)
        server.bind((address, port))
        server.setblocking(False)
        return server

    def tcp_server(self, address: str, port: int, space: Namespace | None = None) -> socket.socket:
        server = self.wire(family_of(address), socket.SOCK_STREAM, space=space)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        server.listen(16)
        server.settimeout(DEADLINE_S)
        return server

    def plug_lan(self, space: Namespace, ours: str, theirs: str) -> None:
        """Another network of the host's, on `lan0`, where someone else is."""
        length = 64 if ":" in ours else 24
        more = ("nodad",) if ":" in ours else ()
        run("ip", "link", "add", "lan0", "type", "veth", "peer", "name", "eth0")
        run("ip", "link", "set", "eth0", "netns", f"/proc/{os.getpid()}/fd/{space.fd}")
        run("ip", "addr", "add", f"{ours}/{length}", "dev", "lan0", *more)
        run("ip", "link", "set", "lan0", "up")
        space.ip("addr", "add", f"{theirs}/{length}", "dev", "eth0", *more)
        space.ip("link", "set", "eth0", "up")
        space.ip("route", "add", "default", "via", ours)

    def start(self) -> None:
        self._pump = threading.Thread(target=self._carry)
        self._pump.start()

    def stop(self) -> None:
        self._ended.set()
        if self._pump is not None:
            self._pump.join(timeout=DEADLINE_S)
        for fd in self._pairs:
            os.close(fd)
        for each in self._sockets:
            each.close()
        for guest in self.guests:
            guest.space.close()
        self.internet.close()

    def _carry(self) -> None:
        while not self._ended.is_set():
            ready, _, _ = select.select(list(self._pairs), [], [], 0.02)
            for fd in ready:
                with contextlib.suppress(OSError):  # a link that is down or gone
                    os.write(self._pairs[fd], os.read(fd, 70000))


@contextlib.contextmanager
def networks(world: helper_world.HelperWorld) -> Iterator[Net]:
    """The calling thread's namespace becomes the host, whose uplink leads to an internet."""
    net = Net(world, Namespace())
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "uplink0", "type", "veth", "peer", "name", "inet0")
    run("ip", "link", "set", "inet0", "netns", f"/proc/{os.getpid()}/fd/{net.internet.fd}")
    run("ip", "addr", "add", f"{UPLINK}/24", "dev", "uplink0")
    run("ip", "link", "set", "uplink0", "up")
    run("ip", "route", "add", "default", "via", GATEWAY)
    net.internet.ip("addr", "add", f"{GATEWAY}/24", "dev", "inet0")
    for address in (INTERNET, PRIVATE, METADATA):
        net.internet.ip("addr", "add", f"{address}/32", "dev", "lo")
    net.internet.ip("link", "set", "inet0", "up")
    net.internet.ip("route", "add", world.policy.network, "via", UPLINK)
    _add_ipv6(net.internet, world.policy.network6)
    net.start()
    try:
        net.ask(privileged.EnsureBridge())
        yield net
    finally:
        net.stop()


def _add_ipv6(internet: Namespace, guests: str) -> None:
    """The host forwards IPv6: that is a switch of its own, which we never touch."""
    run("sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")
    run("ip", "addr", "add", f"{UPLINK6}/64", "dev", "uplink0", "nodad")
    internet.ip("addr", "add", f"{GATEWAY6}/64", "dev", "inet0", "nodad")
    for address in (INTERNET6, PRIVATE6, METADATA6):
        internet.ip("addr", "add", f"{address}/128", "dev", "lo", "nodad")
    run("ip", "route", "add", "default", "via", GATEWAY6)
    internet.ip("route", "add", guests, "via", UPLINK6)


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def received(server: socket.socket) -> bytes:
    """What has arrived; nothing when nothing has."""
    with contextlib.suppress(BlockingIOError):
        return server.recv(2048)
    return b""


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for it, with a deadline that only a broken test reaches."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def fate(net: Net, send: Callable[[], object], arrived: Callable[[], bool]) -> str:
    """What became of a packet: `arrived`, or the reason that counted it."""
    before = net.drops()
    send()
    outcome: list[str] = []

    def known() -> bool:
        counted = [name for name, count in net.drops().items() if count > before[name]]
        # In this order: a packet that was seen may have been counted further on.
        outcome.extend(["arrived"] if arrived() else counted)
        return bool(outcome)

    until(known, "a packet neither arrived nor was counted")
    return outcome[0]


def connects(space: Namespace, address: str, port: int, timeout_s: float = DEADLINE_S) -> bool:
    """Makes a TCP connection."""
    with space.entered():
        wire = socket.socket(family_of(address))
    with wire:
        wire.settimeout(timeout_s)
        try:
            wire.connect((address, port))
        except OSError:
            return False
        return True


def remove_rules(*reasons: str) -> None:
    """Takes the rules out that drop for these reasons, to show that it is they."""
    for family in ("bridge", "inet"):
        for each in nftables.query("table", family=family, name="banger"):
            rule = each.get("rule", {})
            if any(
                part.get("counter") in reasons for part in rule.get("expr", ()) if isinstance(part, dict)
            ):
                where = {name: rule[name] for name in ("family", "table", "chain", "handle")}
                nftables.change([{"delete": {"rule": where}}])
