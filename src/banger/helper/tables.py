# SPDX-License-Identifier: MIT
"""banger's own nftables tables: `rules.nft`, and what it leaves to be defined. Both are named `banger`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from banger.contract import egress, names
from banger.helper import policy as policies

TABLE: Final = "banger"
FAMILIES: Final = ("bridge", "inet")
TAP_GROUP: Final = 0xFC0213
"""Interface group of every tap of ours: a rule that names it holds for a tap from its first frame."""
BRIDGE_MAC: Final = "02:fc:00:00:00:01"
PRIVATE6: Final = ("::/3", *egress.WRAPPED6, "4000::/2", "8000::/1")
"""All but global unicast (RFC 4291)."""
PRIVATE: Final = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.0.0.0/24",
    "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/3",
)  # fmt: skip
"""RFC 6890, without the documentation networks, and all multicast and reserved addresses."""
_RULES: Final = Path(__file__).with_name("rules.nft").read_text()


def text(policy: policies.Policy) -> str:
    """The ruleset of this policy, in nft's language."""
    name = version(policy)
    return _rules(policy) + "".join(f"add chain {family} {TABLE} {name}\n" for family in FAMILIES)


def version(policy: policies.Policy) -> str:
    """Names an empty chain in both tables: tables with another one are not these rules."""
    return "version_" + hashlib.sha256(_rules(policy).encode()).hexdigest()[:12]


def _rules(policy: policies.Policy) -> str:
    defined = {
        "tap_group": TAP_GROUP,
        "bridge_link": f'"{policy.bridge}"',
        "bridge_ip": names.bridge_address(policy.prefix),
        "bridge_ip6": names.bridge_address6(policy.prefix6),
        "dns_port": names.DNS_PORT,
        "private": _set(PRIVATE),
        "private6": _set(PRIVATE6),
        "metadata": _set(egress.METADATA),
        "metadata6": _set((egress.LINK_LOCAL6, *egress.METADATA6)),
    }
    return "".join(f"define {name} = {value}\n" for name, value in defined.items()) + _RULES


def _set(networks: Iterable[object]) -> str:
    return f"{{ {', '.join(map(str, networks))} }}"
