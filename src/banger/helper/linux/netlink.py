# SPDX-License-Identifier: MIT
"""Links and addresses by rtnetlink (linux/rtnetlink.h, if_link.h), and taps by /dev/net/tun (if_tun.h).

Only what the helper needs: importing a full library costs 20 MB and, on a slow host, a second of start.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
from collections.abc import Generator, Iterator
from typing import Final, NamedTuple

from banger.helper.linux import libc

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
NLMSG_ERROR, NLMSG_DONE = 2, 3
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR, RTM_GETROUTE = 20, 21, 22, 26
NLA_F_NESTED, NLA_TYPE_MASK = 0x8000, 0x3FFF
AF_BRIDGE: Final = 7
IFF_UP: Final = 1
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MASTER, IFLA_PROTINFO, IFLA_LINKINFO = 1, 3, 10, 12, 18
IFLA_IFALIAS, IFLA_AF_SPEC, IFLA_GROUP = 20, 26, 27
IFLA_INET_CONF, IPV4_DEVCONF_FORWARDING = 1, 1
RTA_DST, RTA_OIF, RTA_MULTIPATH, RTN_UNICAST = 1, 4, 9, 1
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
IFLA_TUN_OWNER: Final = 1
IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE = 8, 1
IFLA_BRPORT_ISOLATED: Final = 33
IFLA_BR_MULTI_BOOLOPT, BR_BOOLOPT_NO_LL_LEARN = 46, 1 << 0
IFA_ADDRESS, IFA_LOCAL = 1, 2
IFA_F_NODAD: Final = 2
TUNSETIFF, TUNSETPERSIST, TUNSETOWNER = 0x400454CA, 0x400454CB, 0x400454CC
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_TUN_EXCL = 0x0002, 0x1000, 0x4000, 0x8000
_HEADER: Final = struct.Struct("=IHHII")
_IFINFO: Final = struct.Struct("=BxHiII")
_IFADDR: Final = struct.Struct("=BBBBI")
_RTMSG: Final = struct.Struct("=BBBBBBBBI")
_RTNEXTHOP: Final = struct.Struct("=HBBi")

Attributes = dict[int, bytes]


class Link(NamedTuple):
    number: int
    name: str
    kind: str
    alias: str
    is_up: bool
    master: int
    tun_owner: int
    """uid that may open it; -1 when it is no tap or has no owner."""
    forwards: bool
    """Passes on IPv4 packets that come in through it."""


class Route(NamedTuple):
    destination: str
    prefix_length: int
    links: tuple[int, ...]


class Address(NamedTuple):
    link: int
    local: str
    prefix_length: int


def links() -> list[Link]:
    return [_link(body) for body in _request(RTM_GETLINK, NLM_F_DUMP, _ifinfo())]


def find(name: str) -> Link | None:
    return _find(_ifinfo() + _name(name), name)


def find_number(number: int) -> Link | None:
    return _find(_ifinfo(number), f"link {number}")


def _find(wanted: bytes, what: str) -> Link | None:
    found: Link | None = None
    with _gone_is_gone():
        found = _get(wanted, what)
    return found


def number_of(name: str) -> int:
    """Raises OSError when there is no such link."""
    return _get(_ifinfo() + _name(name), name).number


def add_bridge(name: str, *, alias: str, mac: bytes) -> int:
    """With a fixed hardware address: a bridge otherwise takes that of a port, and changes it with them."""
    info = _attribute(IFLA_INFO_KIND, b"bridge")
    attributes = _name(name) + _attribute(IFLA_ADDRESS, mac)
    attributes += _attribute(IFLA_LINKINFO | NLA_F_NESTED, info)
    _request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, _ifinfo() + attributes, name)
    number = number_of(name)
    try:
        bring_up(number, alias=alias)
    except BaseException:
        delete(number, name)
        raise
    return number


def bring_up(index: int, *, alias: str, name: str = "") -> None:
    """Labels a link that is down, gives it a name where there is one, and brings it up.

    Without the IPv6 address by which guests could pass around rules.
    """
    attributes = _attribute(IFLA_IFALIAS, alias.encode()) + _without_ipv6()
    if name:
        attributes += _name(name)
    _request(RTM_SETLINK, 0, _ifinfo(index) + attributes, name or alias)
    _request(RTM_SETLINK, 0, _ifinfo(index, flags=IFF_UP, change=IFF_UP), name or alias)


def add_port(index: int, *, alias: str, master: int, group: int) -> None:
    """Labels the link and makes it a port of the bridge `master`, isolated from the other isolated ones."""
    # By itself: the group is what packet rules know a port by, so it comes before the bridge does.
    _request(RTM_SETLINK, 0, _ifinfo(index) + _attribute(IFLA_GROUP, struct.pack("=I", group)), alias)
    attributes = _attribute(IFLA_IFALIAS, alias.encode()) + _without_ipv6()
    attributes += _attribute(IFLA_MASTER, struct.pack("=I", master))
    _request(RTM_SETLINK, 0, _ifinfo(index) + attributes, alias)
    set_isolated(index, alias, on=True)


def set_isolated(index: int, name: str, *, on: bool) -> None:
    port = _attribute(IFLA_PROTINFO | NLA_F_NESTED, _attribute(IFLA_BRPORT_ISOLATED, bytes([on])))
    _request(RTM_SETLINK, 0, _ifinfo(index, family=AF_BRIDGE) + port, name)


def _without_ipv6() -> bytes:
    mode = _attribute(IFLA_INET6_ADDR_GEN_MODE, bytes([IN6_ADDR_GEN_MODE_NONE]))
    return _attribute(IFLA_AF_SPEC | NLA_F_NESTED, _attribute(socket.AF_INET6 | NLA_F_NESTED, mode))


def learn_from_forwarded_frames(index: int, name: str) -> None:
    """Of a bridge: not from those for bridges themselves (802.1D), which no packet rule sees before."""
    option = _attribute(
        IFLA_BR_MULTI_BOOLOPT, struct.pack("=II", BR_BOOLOPT_NO_LL_LEARN, BR_BOOLOPT_NO_LL_LEARN)
    )
    info = _attribute(IFLA_INFO_KIND, b"bridge") + _attribute(IFLA_INFO_DATA | NLA_F_NESTED, option)
    _request(RTM_NEWLINK, 0, _ifinfo(index) + _attribute(IFLA_LINKINFO | NLA_F_NESTED, info), name)


def delete(index: int, name: str) -> None:
    """Gone is gone, whoever did it."""
    with _gone_is_gone():
        _request(RTM_DELLINK, 0, _ifinfo(index), name)


def addresses(family: int = socket.AF_INET) -> list[Address]:
    """Addresses of all links. A kernel without IPv6 answers with those of other families: none of ours."""
    found: list[Address] = []
    for body in _request(RTM_GETADDR, NLM_F_DUMP, _IFADDR.pack(family, 0, 0, 0, 0)):
        if body[0] != family:
            continue
        _, prefix_length, _, _, index = _IFADDR.unpack_from(body)
        attributes = _attributes(body[_IFADDR.size :])
        local = attributes.get(IFA_LOCAL) or attributes[IFA_ADDRESS]
        found.append(Address(index, socket.inet_ntop(family, local), prefix_length))
    return found


def add_address(address: Address, name: str) -> None:
    """An IPv6 address is usable at once: nobody is asked whether he has it too."""
    _request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, _ifaddr(address), name)


def delete_address(address: Address, name: str) -> None:
    """Gone is gone."""
    with _gone_is_gone():
        _request(RTM_DELADDR, 0, _ifaddr(address), name)


def _ifaddr(address: Address) -> bytes:
    family = socket.AF_INET6 if ":" in address.local else socket.AF_INET
    packed = socket.inet_pton(family, address.local)
    flags = IFA_F_NODAD if family == socket.AF_INET6 else 0
    head = _IFADDR.pack(family, address.prefix_length, flags, 0, address.link)
    return head + _attribute(IFA_LOCAL, packed) + _attribute(IFA_ADDRESS, packed)


def routes(family: int = socket.AF_INET) -> list[Route]:
    """Unicast routes of every table but the local one; of another family, as with addresses, none."""
    found: list[Route] = []
    for body in _request(RTM_GETROUTE, NLM_F_DUMP, _RTMSG.pack(family, *bytes(7), 0)):
        family_of, length, _, _, _, _, _, kind, _ = _RTMSG.unpack_from(body)
        if kind != RTN_UNICAST or family_of != family:
            continue
        attributes = _attributes(body[_RTMSG.size :])
        links = [_u32(attributes[RTA_OIF])] if RTA_OIF in attributes else []
        links += _next_hops(attributes.get(RTA_MULTIPATH, b""))
        destination = socket.inet_ntop(
            family, attributes.get(RTA_DST, bytes(16 if family != socket.AF_INET else 4))
        )
        found.append(Route(destination, length, tuple(links)))
    return found


def set_forwarding(link: Link, *, on: bool) -> None:
    """What `net.ipv4.conf.<link>.forwarding` says; /proc/sys is read-only to the helper."""
    conf = _attribute(IPV4_DEVCONF_FORWARDING, struct.pack("=I", on))
    family = _attribute(socket.AF_INET | NLA_F_NESTED, _attribute(IFLA_INET_CONF | NLA_F_NESTED, conf))
    _request(
        RTM_SETLINK, 0, _ifinfo(link.number) + _attribute(IFLA_AF_SPEC | NLA_F_NESTED, family), link.name
    )


def open_tap(name: str, *, owner: int) -> tuple[int, str]:
    """A new tap that lives as long as the descriptor, until `keep_tap`; for `%d` a number that is free."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_TUN_EXCL
        wanted = bytearray(struct.pack("=16sH22x", name.encode(), flags))
        libc.ioctl(fd, TUNSETIFF, wanted, name)
        set_tap_owner(fd, owner, name)
    except BaseException:
        os.close(fd)
        raise
    return fd, _text(bytes(wanted[:16]).partition(b"\0")[0])


def set_tap_owner(fd: int, owner: int, name: str) -> None:
    libc.ioctl(fd, TUNSETOWNER, owner, name)


def keep_tap(fd: int, name: str) -> None:
    libc.ioctl(fd, TUNSETPERSIST, 1, name)


def _ifinfo(index: int = 0, *, family: int = socket.AF_UNSPEC, flags: int = 0, change: int = 0) -> bytes:
    return _IFINFO.pack(family, 0, index, flags, change)


@contextlib.contextmanager
def _gone_is_gone() -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENODEV, errno.EADDRNOTAVAIL}:
            raise


def _get(wanted: bytes, what: str) -> Link:
    return _link(_request(RTM_GETLINK, 0, wanted, what)[0])


def _name(name: str) -> bytes:
    return _attribute(IFLA_IFNAME, name.encode() + b"\0")


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _attributes(data: bytes) -> Attributes:
    found: Attributes = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        found[kind & NLA_TYPE_MASK] = data[4:length]
        data = data[max(4, (length + 3) & ~3) :]
    return found


def _next_hops(data: bytes) -> list[int]:
    found: list[int] = []
    while len(data) >= _RTNEXTHOP.size:
        length, _, _, link = _RTNEXTHOP.unpack_from(data)
        found.append(link)
        data = data[max(_RTNEXTHOP.size, (length + 3) & ~3) :]
    return found


def _forwards(attributes: Attributes) -> bool:
    family = _attributes(attributes.get(IFLA_AF_SPEC, b"")).get(socket.AF_INET, b"")
    conf = _attributes(family).get(IFLA_INET_CONF, b"")
    return len(conf) >= 4 and bool(_u32(conf))


def _link(body: bytes) -> Link:
    _, _, index, flags, _ = _IFINFO.unpack_from(body)
    attributes = _attributes(body[_IFINFO.size :])
    info = _attributes(attributes.get(IFLA_LINKINFO, b""))
    kind = _text(info.get(IFLA_INFO_KIND, b""))
    tun = _attributes(info.get(IFLA_INFO_DATA, b"")) if kind == "tun" else {}
    return Link(
        index,
        _text(attributes[IFLA_IFNAME]),
        kind,
        _text(attributes.get(IFLA_IFALIAS, b"")),
        bool(flags & IFF_UP),
        _u32(attributes.get(IFLA_MASTER, bytes(4))),
        _u32(tun[IFLA_TUN_OWNER]) if IFLA_TUN_OWNER in tun else -1,
        _forwards(attributes),
    )


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def _u32(data: bytes) -> int:
    return int.from_bytes(data[:4], sys.byteorder)


def _request(kind: int, flags: int, payload: bytes, what: str = "netlink") -> list[bytes]:
    """Sends one message; the bodies of a dump, or nothing for an acknowledgement."""
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    ) as wire:
        wire.settimeout(5)
        wire.bind((0, 0))
        if flags & NLM_F_DUMP != NLM_F_DUMP:
            flags |= NLM_F_ACK
        wire.send(_HEADER.pack(_HEADER.size + len(payload), kind, flags | NLM_F_REQUEST, 1, 0) + payload)
        return list(_replies(wire, what))


def _replies(wire: socket.socket, what: str) -> Iterator[bytes]:
    while True:
        data = wire.recv(1 << 18)
        while len(data) >= _HEADER.size:
            length, kind, _, _, _ = _HEADER.unpack_from(data)
            body = data[_HEADER.size : length]
            if kind == NLMSG_DONE:
                return
            if kind == NLMSG_ERROR:
                (number,) = struct.unpack_from("=i", body)
                if number:
                    raise OSError(-number, os.strerror(-number), what)
                return
            yield body
            data = data[(length + 3) & ~3 :]
