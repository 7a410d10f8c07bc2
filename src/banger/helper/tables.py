# SPDX-License-Identifier: MIT
"""banger's own nftables tables: fixed rules, loaded whole, and the VMs as elements of their sets.

Both are named `banger`. The bridge table sees every frame of a guest first: it must come from the tap's own
hardware and IP address, and speak for no other one. nft 1.0.6 has no name for target and hardware address
in a neighbour discovery packet: they are bits behind the transport header, and numbers in their sets. The
inet table sees what is for the host or goes through it. Whatever no element admits is dropped and counted.

A frame for bridges themselves (01:80:c2:00:00:0x) goes past the bridge table, and to the host by the tap
instead of the bridge, as everything does where somebody took the bridge away: the inet table drops it.

With br_netfilter loaded (Docker loads it) the inet table also sees frames that the bridge passes between
peers; `member_macs` tells them from packets that a guest sends through the host to reach its neighbour.
"""

from __future__ import annotations

import hashlib
import string
from typing import Final

from banger.contract import egress, names
from banger.helper import policy as policies

TABLE: Final = "banger"
TAP_GROUP: Final = 0xFC0213
"""Interface group of every tap of ours: a rule that names it holds for a tap from its first frame."""
BRIDGE_MAC: Final = "02:fc:00:00:00:01"
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
        "to_routers",
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
        "around_bridge",
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
        icmpv6 type mld-listener-query counter name router_advertisement drop
        iifname != @with_ipv6 counter name ipv6_frame drop
        icmpv6 type { nd-router-solicit, mld-listener-report } counter name to_routers drop
        icmpv6 type { mld-listener-reduction, mld2-listener-report } counter name to_routers drop
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
        iifgroup $group counter name around_bridge drop
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
        iifgroup $group counter name around_bridge drop
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
        ip daddr { $metadata } counter name metadata drop
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
        metadata=", ".join(map(str, egress.METADATA)),
    )
