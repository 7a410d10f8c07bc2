# SPDX-License-Identifier: MIT
"""banger's own nftables tables: fixed rules, loaded whole, and the VMs as elements of their sets.

Two tables, both named `banger`. The bridge table sees every frame of a guest first: it must come from the
tap's own hardware and IP address, and speak for no other one. nft 1.0.6 has no name for the target and the
hardware address in a neighbour discovery packet: they are bits behind the transport header, and numbers in
their sets. The inet table sees what is for the host or goes through it. Whatever no
element admits is dropped and counted. Every element carries its VM's id as comment.

With br_netfilter loaded (Docker loads it) the inet table also sees frames that the bridge passes between
peers; `member_macs` tells them from packets that a guest sends through the host to reach its neighbour.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import string
import threading
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from banger.contract import egress, errors, names
from banger.helper import policy as policies
from banger.helper.linux import nftables

TABLE: Final = "banger"
TAP_GROUP: Final = 0xFC0213
"""Interface group of every tap of ours: a rule that names it holds for a tap from its first frame."""
BRIDGE_MAC: Final = "02:fc:00:00:00:01"
LINK_LOCAL: Final = "169.254.0.0/16"
PRIVATE6: Final = ("::/3", *map(str, egress.WRAPPED6), "4000::/2", "8000::/1")
"""All but global unicast (RFC 4291)."""
PRIVATE: Final = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.0.0.0/24",
    "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/3",
)  # fmt: skip
"""RFC 6890, without the documentation networks, and all multicast and reserved addresses."""
COUNTERS: Final = {
    "bridge": (
        "spoofed",
        "spoofed_arp",
        "spoofed_ndp",
        "router_advertisement",
        "ipv6_frame",
        "guest_to_guest",
    ),
    "inet": (
        "host_service",
        "hairpin",
        "inbound_new",
        "no_nat",
        "metadata",
        "private_network",
        "egress_policy",
        "foreign_transit",
    ),
}  # fmt: skip
"""One for each reason to drop."""

_TEXT: Final = string.Template("""\
add table bridge banger
delete table bridge banger
add table inet banger
delete table inet banger

table bridge banger {
    $bridge_counters
    set guests { type ifname . ether_addr . ipv4_addr; }
    set with_ipv6 { type ifname; }
    set sources6 { type ifname . ether_addr . ipv6_addr; }
    set targets6 { typeof iifname . ether saddr . @th,64,128; }
    set macs6 { typeof iifname . @th,208,48; }
    map networks { type ifname : mark; }
    set members { type mark . ifname; }

    chain $version { }

    chain prerouting {
        type filter hook prerouting priority dstnat; policy accept;
        iifgroup != $group return
        iifname . ether saddr . arp saddr ip @guests iifname . arp saddr ether . arp saddr ip @guests accept
        ether type arp counter name spoofed_arp drop
        iifname . ether saddr . ip saddr @guests accept
        ether type ip6 goto ipv6
        counter name spoofed drop
    }

    chain ipv6 {
        icmpv6 type { nd-router-advert, nd-redirect } counter name router_advertisement drop
        iifname != @with_ipv6 counter name ipv6_frame drop
        icmpv6 type { nd-router-solicit, mld-listener-query, mld-listener-report } drop
        icmpv6 type { mld-listener-reduction, mld2-listener-report } drop
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } goto neighbours
        ip6 saddr fe80::/10 counter name ipv6_frame drop
        iifname . ether saddr . ip6 saddr @sources6 accept
        counter name spoofed drop
    }

    chain neighbours {
        icmpv6 type nd-neighbor-solicit ip6 saddr :: iifname . ether saddr . @th,64,128 @targets6 accept
        iifname . ether saddr . ip6 saddr != @sources6 counter name spoofed_ndp drop
        icmpv6 type nd-neighbor-solicit goto hardware_address
        iifname . ether saddr . @th,64,128 @targets6 goto hardware_address
        counter name spoofed_ndp drop
    }

    chain hardware_address {
        ip6 length 24 accept
        ip6 length 32 @th,192,16 { 0x0101, 0x0201 } iifname . @th,208,48 @macs6 accept
        counter name spoofed_ndp drop
    }

    chain forward {
        type filter hook forward priority filter; policy accept;
        iifgroup != $group return
        meta mark set iifname map @networks
        meta mark . oifname @members accept
        counter name guest_to_guest drop
    }
}

table inet banger {
    $inet_counters
    set nat { type ipv4_addr; }
    set internet { type ipv4_addr; }
    set everywhere { type ipv4_addr; }
    set allowed { type ipv4_addr . ipv4_addr; flags interval; }
    set allowed_ports { type ipv4_addr . ipv4_addr . inet_service; flags interval; }
    set named { type ipv4_addr . ipv4_addr; flags timeout; }
    set named_ports { type ipv4_addr . ipv4_addr . inet_service; flags timeout; }
    set nat6 { type ipv6_addr; }
    set internet6 { type ipv6_addr; }
    set everywhere6 { type ipv6_addr; }
    set allowed6 { type ipv6_addr . ipv6_addr; flags interval; }
    set allowed_ports6 { type ipv6_addr . ipv6_addr . inet_service; flags interval; }
    set named6 { type ipv6_addr . ipv6_addr; flags timeout; }
    set named_ports6 { type ipv6_addr . ipv6_addr . inet_service; flags timeout; }
    set member_macs { type ether_addr; }
    set opened { type ifname; }
    set private { type ipv4_addr; flags interval; elements = { $private } }

    chain $version { }

    chain name_service {
        type nat hook prerouting priority dstnat; policy accept;
        iifname "$bridge" ip daddr $address udp dport 53 redirect to :$dns_port
        iifname "$bridge" ip daddr $address tcp dport 53 redirect to :$dns_port
    }

    chain input {
        type filter hook input priority filter - 10; policy accept;
        iifname != "$bridge" return
        ct state established,related accept
        ip daddr $address udp dport $dns_port accept
        ip daddr $address tcp dport $dns_port accept
        ip daddr $address icmp type echo-request accept
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
        ip6 daddr $address6 icmpv6 type echo-request accept
        counter name host_service drop
    }

    chain forward {
        type filter hook forward priority filter - 10; policy accept;
        oifname "$bridge" jump to_guest
        iifname "$bridge" jump from_guest
        meta nfproto ipv4 iifname @opened counter name foreign_transit drop
    }

    chain to_guest {
        iifname "$bridge" meta pkttype { broadcast, multicast } accept
        iifname "$bridge" ether daddr @member_macs accept
        iifname "$bridge" counter name hairpin drop
        ip daddr @nat ct state established,related accept
        ip6 daddr @nat6 ct state established,related accept
        counter name inbound_new drop
    }

    chain from_guest {
        meta nfproto ipv6 goto from_guest6
        ip saddr != @nat counter name no_nat drop
        ip saddr . ip daddr @allowed accept
        meta l4proto { tcp, udp } ip saddr . ip daddr . th dport @allowed_ports accept
        ip saddr . ip daddr @named accept
        meta l4proto { tcp, udp } ip saddr . ip daddr . th dport @named_ports accept
        ip daddr $link_local counter name metadata drop
        ip saddr @everywhere accept
        ip daddr @private counter name private_network drop
        ip saddr @internet accept
        counter name egress_policy drop
    }

    chain from_guest6 {
        ip6 saddr != @nat6 counter name no_nat drop
        ip6 saddr . ip6 daddr @allowed6 accept
        meta l4proto { tcp, udp } ip6 saddr . ip6 daddr . th dport @allowed_ports6 accept
        ip6 saddr . ip6 daddr @named6 accept
        meta l4proto { tcp, udp } ip6 saddr . ip6 daddr . th dport @named_ports6 accept
        ip6 daddr { $metadata6 } counter name metadata drop
        ip6 saddr @everywhere6 accept
        ip6 daddr { $private6 } counter name private_network drop
        ip6 saddr @internet6 accept
        counter name egress_policy drop
    }

    chain postrouting {
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr @nat oifname != "$bridge" masquerade
        ip6 saddr @nat6 oifname != "$bridge" masquerade
    }
}
""")

lock: Final = threading.RLock()
"""Held from looking to acting; callers hold it on until the host serves what they changed."""


class Set(NamedTuple):
    family: str
    name: str


GUESTS: Final = Set("bridge", "guests")
NETWORKS: Final = Set("bridge", "networks")
MEMBERS: Final = Set("bridge", "members")
MEMBER_MACS: Final = Set("inet", "member_macs")
NAT: Final = Set("inet", "nat")
INTERNET: Final = Set("inet", "internet")
EVERYWHERE: Final = Set("inet", "everywhere")
ALLOWED: Final = Set("inet", "allowed")
ALLOWED_PORTS: Final = Set("inet", "allowed_ports")
NAMED: Final = Set("inet", "named")
NAMED_PORTS: Final = Set("inet", "named_ports")
OPENED: Final = Set("inet", "opened")
WITH_IPV6: Final = Set("bridge", "with_ipv6")
SOURCES6: Final = Set("bridge", "sources6")
TARGETS6: Final = Set("bridge", "targets6")
MACS6: Final = Set("bridge", "macs6")


class Reach(NamedTuple):
    """The sets of one family that say what a guest reaches."""

    nat: Set
    internet: Set
    everywhere: Set
    allowed: Set
    allowed_ports: Set
    named: Set
    named_ports: Set


REACH: Final = {
    4: Reach(NAT, INTERNET, EVERYWHERE, ALLOWED, ALLOWED_PORTS, NAMED, NAMED_PORTS),
    6: Reach(*(Set("inet", f"{name}6") for name in Reach._fields)),
}
"""By the version of IP."""


class Element(NamedTuple):
    """`key` is JSON as nft prints it, so that what is wanted and what is there compare."""

    set: Set
    key: str
    value: int = 0
    """Of a map."""
    owner: str = ""
    """The VM's id."""
    timeout_s: int = 0
    """Not compared: it counts down."""

    @property
    def identity(self) -> tuple[Set, str, int, str]:
        return (self.set, self.key, self.value, self.owner)


def key(*parts: Any) -> str:
    """Of one value, or of a concatenation."""
    return json.dumps(parts[0] if len(parts) == 1 else {"concat": list(parts)}, sort_keys=True)


def text(policy: policies.Policy) -> str:
    """The ruleset of this policy, in nft's language."""
    return _filled(policy, version(policy))


def version(policy: policies.Policy) -> str:
    """Names an empty chain in both tables: tables with another one are not these rules."""
    return "version_" + hashlib.sha256(_filled(policy, "").encode()).hexdigest()[:12]


def _filled(policy: policies.Policy, name: str) -> str:
    counters = {
        f"{family}_counters": "\n    ".join(f"counter {counter} {{ }}" for counter in found)
        for family, found in COUNTERS.items()
    }
    return _TEXT.substitute(
        counters,
        version=name,
        group=TAP_GROUP,
        bridge=policy.bridge,
        bridge_mac=BRIDGE_MAC,
        address=names.bridge_address(policy.prefix),
        dns_port=names.DNS_PORT,
        address6=names.bridge_address6(policy.prefix6),
        private=", ".join(PRIVATE),
        private6=", ".join(PRIVATE6),
        metadata6=", ".join(map(str, (egress.LINK_LOCAL6, *egress.METADATA6))),
        link_local=LINK_LOCAL,
    )


class Ensured(NamedTuple):
    rebuilt: bool
    """The tables had to be made, and are empty."""
    elements: set[Element]


def ensure(policy: policies.Policy) -> Ensured:
    """The tables are there and of this version."""
    wanted = version(policy)
    with lock:
        tables = _tables()
        for family, found in tables.items():
            if not _is_ours(found):
                raise errors.ConflictError(
                    f"table {family} {TABLE} exists and is not banger's", hint="rename or delete it"
                )
        if all(wanted in _chains(tables.get(family, [])) for family in COUNTERS):
            return Ensured(False, _elements(tables))
        nftables.load(text(policy))
        return Ensured(True, set())


def delete() -> None:
    """Gone is gone. A table of our name that is not ours is left alone."""
    with lock:
        for family, found in _tables().items():
            if _is_ours(found):
                nftables.change([{"delete": {"table": {"family": family, "name": TABLE}}}])


def elements() -> set[Element]:
    """All that VMs own, and the links that were opened. Empty when the tables are not there."""
    return _elements(_tables())


class Change(NamedTuple):
    before: set[Element]
    after: set[Element]


def replace(owner: str, wanted: Iterable[Element]) -> Change:
    """Exactly `wanted` of this owner holds, in one change; returns all elements there were and are."""
    with lock:
        tables = _tables()
        present = _elements(tables)
        want = {each.identity: each for each in wanted}
        if want and len(tables) < len(COUNTERS):
            raise errors.NotFoundError("the packet rules are not loaded", hint="ensure the bridge first")
        have = {each.identity: each for each in present if each.owner == owner}
        gone = [each for name, each in have.items() if name not in want]
        fresh = [each for name, each in want.items() if name not in have]
        commands = [_command("delete", each) for each in gone] + [_command("add", each) for each in fresh]
        if commands:
            nftables.change(commands)
        return Change(present, present - set(gone) | set(fresh))


def refresh(wanted: Iterable[Element]) -> None:
    """Adds elements with a timeout, which begins anew for those that are there."""
    with lock:
        present = {each.identity for each in elements()}
        commands = []
        for each in wanted:
            if each.identity in present:
                commands.append(_command("delete", each))
            commands.append(_command("add", each))
        nftables.change(commands)


def set_opened(links: set[str]) -> None:
    """What comes in by these links and is not for a guest is dropped."""
    with lock:
        present = {each for each in elements() if each.set == OPENED}
        wanted = {Element(OPENED, key(name)) for name in links}
        commands = [_command("delete", each) for each in present - wanted]
        commands += [_command("add", each) for each in wanted - present]
        if commands:
            nftables.change(commands)


def _tables() -> dict[str, list[nftables.Json]]:
    """What is in each table of our name that there is, by family; each is read once, and alone."""
    found = {}
    for family in COUNTERS:
        try:
            found[family] = nftables.query("table", family=family, name=TABLE)
        except nftables.RefusedError:
            if (family, TABLE) in _table_names():
                raise
    return found


def _table_names() -> list[tuple[str, str]]:
    tables = [each["table"] for each in nftables.query("tables")]
    return [(each["family"], each["name"]) for each in tables]


def _chains(table: list[nftables.Json]) -> list[str]:
    return [each["chain"]["name"] for each in table if "chain" in each]


def _is_ours(table: list[nftables.Json]) -> bool:
    return any(name.startswith("version_") for name in _chains(table))


def _elements(tables: dict[str, list[nftables.Json]]) -> set[Element]:
    parsed: set[Element] = set()
    for each in itertools.chain.from_iterable(tables.values()):
        fields = each.get("set") or each.get("map")
        if fields is not None and fields["name"] != "private":
            of = Set(fields["family"], fields["name"])
            parsed |= {_element(of, raw) for raw in fields.get("elem", ())}
    return parsed


def _element(of: Set, raw: Any) -> Element:
    """nft wraps an element only when there is more to say than its value."""
    value = 0
    if isinstance(raw, list):
        raw, value = raw
    inner: nftables.Json = raw["elem"] if isinstance(raw, dict) and "elem" in raw else {"val": raw}
    name = json.dumps(inner["val"], sort_keys=True)
    return Element(of, name, value, inner.get("comment", ""), inner.get("timeout", 0))


def _command(verb: str, element: Element) -> nftables.Json:
    inner: nftables.Json = {"val": json.loads(element.key)}
    if element.owner:
        inner["comment"] = element.owner
    if element.timeout_s and verb == "add":
        inner["timeout"] = element.timeout_s
    raw: Any = {"elem": inner}
    if element.set == NETWORKS:
        raw = [raw, element.value]
    of = {"family": element.set.family, "table": TABLE, "name": element.set.name, "elem": [raw]}
    return {verb: {"element": of}}
