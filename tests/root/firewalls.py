# SPDX-License-Identifier: MIT
"""Rule sets as other programs load them, each dropping or refusing what the host forwards."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from tests.root import network_world

_COUNTS: Final = re.compile(r" \[\d+:\d+\]$")
_DOCKER: Final = """\
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
"""
_UFW: Final = """\
*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:ufw-before-input - [0:0]
:ufw-before-forward - [0:0]
:ufw-after-input - [0:0]
:ufw-after-forward - [0:0]
:ufw-reject-input - [0:0]
:ufw-reject-forward - [0:0]
:ufw-user-input - [0:0]
:ufw-user-forward - [0:0]
:ufw-not-local - [0:0]
-A INPUT -j ufw-before-input
-A INPUT -j ufw-after-input
-A INPUT -j ufw-reject-input
-A FORWARD -j ufw-before-forward
-A FORWARD -j ufw-after-forward
-A FORWARD -j ufw-reject-forward
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw-before-input -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A ufw-before-input -j ufw-not-local
-A ufw-before-input -j ufw-user-input
-A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-forward -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A ufw-before-forward -j ufw-user-forward
-A ufw-after-input -p udp -m udp --dport 137 -j DROP
-A ufw-reject-forward -j REJECT --reject-with icmp-port-unreachable
-A ufw-user-input -p tcp -m tcp --dport 22 -j ACCEPT
-A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN
-A ufw-not-local -m addrtype --dst-type MULTICAST -j RETURN
-A ufw-not-local -m addrtype --dst-type BROADCAST -j RETURN
-A ufw-not-local -j DROP
COMMIT
"""
_FIREWALLD: Final = """\
table inet firewalld {
    ct helper helper-netbios-ns-udp { type "netbios-ns" protocol udp; l3proto ip; }
    chain mangle_PREROUTING {
        type filter hook prerouting priority mangle + 10; policy accept;
    }
    chain filter_INPUT {
        type filter hook input priority filter + 10; policy accept;
        ct state { established, related } accept
        ct status dnat accept
        iifname "lo" accept
        ct state invalid drop
        jump filter_INPUT_ZONES
        reject with icmpx type admin-prohibited
    }
    chain filter_FORWARD {
        type filter hook forward priority filter + 10; policy accept;
        ct state { established, related } accept
        ct status dnat accept
        iifname "lo" accept
        ct state invalid drop
        jump filter_FORWARD_ZONES
        reject with icmpx type admin-prohibited
    }
    chain filter_INPUT_ZONES { tcp dport 22 ct state { new, untracked } accept; }
    chain filter_FORWARD_ZONES { }
}
"""
_WORKSTATION: Final = """\
table inet filter {
    chain input {
        type filter hook input priority filter; policy drop;
        ct state established,related accept
        iif "lo" accept
    }
    chain forward { type filter hook forward priority filter; policy drop; }
    chain output { type filter hook output priority filter; policy accept; }
}
"""


@dataclass(frozen=True, slots=True)
class Firewall:
    """`load` is a program that reads `text`; `save` shows all that it made."""

    name: str
    load: tuple[str, ...]
    text: str
    save: tuple[tuple[str, ...], ...]
    flush: tuple[tuple[str, ...], ...]
    """Takes everything of it away, as programs do that load their rules anew."""

    def start(self) -> None:
        network_world.run(*self.load, given=self.text)

    def shown(self) -> str:
        """As it is now, without dates and packet counts of policies."""
        return without_counts("".join(network_world.run(*command) for command in self.save))

    def without_ours(self) -> str:
        return "\n".join(line for line in self.shown().splitlines() if "banger" not in line)


def without_counts(text: str) -> str:
    """What a list of rules says, without dates and packet counts of policies."""
    return "\n".join(_COUNTS.sub("", line) for line in text.splitlines() if not line.startswith("#"))


def _tables(*tables: str) -> tuple[tuple[str, ...], ...]:
    return tuple(("nft", "-s", "list", "table", *table.split()) for table in tables)


def _deletes(*tables: str) -> tuple[tuple[str, ...], ...]:
    return tuple(("nft", "delete", "table", *table.split()) for table in tables)


def _flushes(*tables: str) -> tuple[tuple[str, ...], ...]:
    return tuple(("iptables-legacy", "-t", table, option) for table in tables for option in ("-F", "-X"))


_IPTABLES: Final = ("iptables-nft-restore",)
_LEGACY: Final = ("iptables-legacy-restore",)
_NFT: Final = ("nft", "-f", "-")
_SAVE: Final = (("iptables-nft-save",), *_tables("ip filter"))
_LEGACY_SAVE: Final = (("iptables-legacy-save",),)
FIREWALLS: Final = (
    Firewall("docker", _IPTABLES, _DOCKER, _SAVE, _deletes("ip filter", "ip nat")),
    Firewall("docker-legacy", _LEGACY, _DOCKER, _LEGACY_SAVE, _flushes("filter", "nat")),
    Firewall("ufw", _IPTABLES, _UFW, _SAVE, _deletes("ip filter")),
    Firewall("ufw-legacy", _LEGACY, _UFW, _LEGACY_SAVE, _flushes("filter")),
    Firewall("firewalld", _NFT, _FIREWALLD, _tables("inet firewalld"), _deletes("inet firewalld")),
    Firewall("nftables.conf", _NFT, _WORKSTATION, _tables("inet filter"), _deletes("inet filter")),
)
