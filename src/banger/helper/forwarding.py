# SPDX-License-Identifier: MIT
"""What the host does for guests besides our own tables: it forwards, and other firewalls let them pass.

An `accept` of ours cannot overrule another base chain's drop (Docker sets the policy of FORWARD to drop,
ufw too, firewalld ends in a reject). So while a guest needs it, one rule tagged `banger` for each direction
stands at the head of every other base chain that may drop. Our own tables judge the same packets, so it
opens nothing more than they do. No rule of others is changed or moved, and ours go when they are not needed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from banger.contract import egress, errors
from banger.helper import addresses, program, ruleset, tables
from banger.helper import policy as policies
from banger.helper.linux import netlink, nftables

TAG: Final = "banger"
_LEGACY: Final = {"iptables-legacy": "ip_tables_names", "ip6tables-legacy": "ip6_tables_names"}
"""The programs, and where the kernel says below /proc/thread-self/net that something has used each."""
_FAMILIES: Final = ("ip", "ip6", "inet")
_DEADLINE_S: Final = 20.0
_PRIVATE: Final = (*map(ipaddress.IPv4Network, tables.PRIVATE), egress.LINK_LOCAL)
_FIRST_PRIORITY: Final = 0
"""Chains before `filter` mangle or track; accepting at their head would skip that and gain nothing."""


class Need(NamedTuple):
    """What the guests that there are ask of the host."""

    to_host: bool = False
    """Guests speak with the host: DNS."""
    through_host: bool = False
    """Guests have NAT, or peers whom br_netfilter shows to the IP firewall."""
    nat: bool = False
    private: bool = False
    """Also by links that lead to private networks alone."""
    ipv6: bool = False
    """One of them has an address in the IPv6 prefix."""


def needed(elements: Iterable[ruleset.Element]) -> Need:
    sets = {element.set for element in elements if element.owner}
    of = ruleset.REACH[4]
    nat = of.nat in sets
    reach = {of.everywhere, of.allowed, of.allowed_ports, of.named, of.named_ports}
    return Need(
        to_host=ruleset.GUESTS in sets,
        through_host=nat or ruleset.MEMBERS in sets,
        nat=nat,
        private=nat and bool(reach & sets),
        ipv6=ruleset.WITH_IPV6 in sets,
    )


def follow(policy: policies.Policy, change: ruleset.Change) -> None:
    """`sync` when a change of elements changes what they need, and whenever no guest is left.

    What was cut off between the elements and here is made whole by the daemon's next `EnsureBridge`, which
    comes while guests run; after the last one, by whoever tries its end again.
    """
    need = needed(change.after)
    if need != needed(change.before) or need == Need():
        sync(policy, change.after)


def sync(policy: policies.Policy, elements: set[ruleset.Element]) -> None:
    """Makes the host do what these elements need, and no more. Idempotent."""
    need = needed(elements)
    addresses.set_addresses6(policy, wanted=need.ipv6)
    _forward(policy, need, {json.loads(each.key) for each in elements if each.set == ruleset.OPENED})
    _pass_others(policy, need)


# --- forwarding ---


def _forward(policy: policies.Policy, need: Need, guarded: set[str]) -> None:
    """Forwarding for the links that carry guests' packets, where the host does not forward anyway.

    Replies come in by the uplink, so it must forward too; what else comes in by it is then dropped by the
    set `opened`, as it was dropped before. A file remembers which links we changed in this boot.
    """
    ways = _ways_out(policy, need) if need.nat else []
    known = [netlink.find(name) for name in (policy.bridge, *_opened(policy))]
    links = {link.name: link for link in (*known, *ways) if link is not None}
    ours, wanted = _opened(policy) & set(links), set[str]()
    if _host_forwards():
        ours = set[str]()  # all links forward now by the host's own will
    elif need.nat:
        wanted = {link.name for link in ways if link.name in ours or not link.forwards}
        if policy.bridge in links and not links[policy.bridge].forwards:
            netlink.set_forwarding(links[policy.bridge], on=True)
    elif policy.bridge in links and links[policy.bridge].forwards:
        netlink.set_forwarding(links[policy.bridge], on=False)
    _remember(policy, wanted | ours)
    if guarded != wanted:
        ruleset.set_opened(wanted | ours)
    for name in wanted:
        netlink.set_forwarding(links[name], on=True)
    for name in ours - wanted:
        netlink.set_forwarding(links[name], on=False)
    if guarded != wanted or ours - wanted:
        ruleset.set_opened(wanted)
    _remember(policy, wanted)


def _ways_out(policy: policies.Policy, need: Need) -> list[netlink.Link]:
    """The links of the routes to what guests may reach, looked up one by one: there may be many taps."""
    numbers = {
        number
        for route in netlink.routes()
        if need.private or not _is_private(route)
        for number in route.links
    }
    found = [netlink.find_number(number) for number in numbers]
    return [link for link in found if link is not None and link.name not in (policy.bridge, "lo")]


def _is_private(route: netlink.Route) -> bool:
    network = ipaddress.IPv4Network(f"{route.destination}/{route.prefix_length}")
    return any(network.subnet_of(each) for each in _PRIVATE)


def _host_forwards() -> bool:
    with open("/proc/sys/net/ipv4/ip_forward") as file:
        return file.read().strip() == "1"


def _record(policy: policies.Policy) -> str:
    return f"{policy.helper_dir}/forwarding.json"


def _opened(policy: policies.Policy) -> set[str]:
    """Links that we made forward in this boot; a reboot has undone what an older file says."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        with open(_record(policy)) as file:
            found = json.load(file)
        if found["boot_id"] == _boot_id():
            return set(found["links"])
    return set()


def _remember(policy: policies.Policy, links: set[str]) -> None:
    path = _record(policy)
    if links == _opened(policy):
        return
    if not links:
        os.unlink(path)
        return
    with open(f"{path}.new", "w") as file:
        json.dump({"boot_id": _boot_id(), "links": sorted(links)}, file)
    os.rename(f"{path}.new", path)


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


# --- other firewalls ---


class _Chain(NamedTuple):
    family: str
    table: str
    name: str
    hook: str
    drops: bool

    def rule(self, more: nftables.Json) -> nftables.Json:
        return {"family": self.family, "table": self.table, "chain": self.name, **more}


def _pass_others(policy: policies.Policy, need: Need) -> None:
    _pass_legacy(policy, need)
    for attempt in (1, 2):
        commands = _differences(policy, need)
        if not commands:
            return
        try:
            nftables.change(commands)
            return
        except nftables.RefusedError:
            if attempt == 2:  # not just a chain that its owner replaced meanwhile
                raise


def _differences(policy: policies.Policy, need: Need) -> list[nftables.Json]:
    chains = [
        _Chain(c["family"], c["table"], c["name"], c["hook"], c.get("policy") == "drop")
        for c in _bases(nftables.query("chains"))
    ]
    if not chains:
        return []
    seen = [each["table"] for each in nftables.query("tables")]
    owned = {(each["family"], each["name"]) for each in seen if _has_owner(each)}
    commands: list[nftables.Json] = []
    for chain in chains:
        here = _rules(chain)
        mine = [rule for rule in here if rule.get("comment") == TAG]
        wanted = _wanted(policy, need, chain) if chain.drops or len(here) > len(mine) else []
        if (chain.family, chain.table) not in owned:
            commands += _changes(chain, mine, wanted)
        elif wanted and chain.hook == "forward" and not _speaks_of(policy.bridge, chain):
            command = f"firewall-cmd --permanent --zone=trusted --add-interface={policy.bridge}"
            raise errors.ConflictError(
                f"table {chain.family} {chain.table} stops forwarding, and only its maker may change it",
                hint=f"for firewalld: `{command}`, then `firewall-cmd --reload`",
            )
    return commands


def _speaks_of(bridge: str, chain: _Chain) -> bool:
    """Somebody has told that firewall about our bridge."""
    return f'"{bridge}"' in json.dumps(nftables.query("table", family=chain.family, name=chain.table))


def _rules(chain: _Chain) -> list[nftables.Json]:
    found = nftables.query("chain", family=chain.family, table=chain.table, name=chain.name)
    return [each["rule"] for each in found if "rule" in each]


def _bases(listed: list[nftables.Json]) -> Iterator[nftables.Json]:
    for each in listed:
        fields = each.get("chain", {})
        if fields.get("hook") in ("input", "forward") and fields["family"] in _FAMILIES:
            ours = fields["table"] == tables.TABLE
            if fields.get("type") == "filter" and fields["prio"] >= _FIRST_PRIORITY and not ours:
                yield fields


def _has_owner(table: nftables.Json) -> bool:
    """Only the process that made such a table may change it."""
    return "owner" in table.get("flags", ())


def _wanted(policy: policies.Policy, need: Need, chain: _Chain) -> list[tuple[str, str]]:
    if chain.family == "ip6" and not need.ipv6:
        return []
    if chain.hook == "input":
        return [("iifname", policy.bridge)] if need.to_host else []
    return [("iifname", policy.bridge), ("oifname", policy.bridge)] if need.through_host else []


def _changes(
    chain: _Chain, mine: list[nftables.Json], wanted: list[tuple[str, str]]
) -> Iterator[nftables.Json]:
    if sorted(map(_match, mine)) == sorted(wanted):
        return
    for rule in mine:
        yield {"delete": {"rule": chain.rule({"handle": rule["handle"]})}}
    for key, link in wanted:
        compared = {"match": {"op": "==", "left": {"meta": {"key": key}}, "right": link}}
        # With a counter, iptables-nft shows it as a rule of its own kind.
        counter = {"counter": {"packets": 0, "bytes": 0}}
        rule = {"expr": [compared, counter, {"accept": None}], "comment": TAG}
        yield {"insert": {"rule": chain.rule(rule)}}


def _match(rule: nftables.Json) -> tuple[str, str]:
    with contextlib.suppress(KeyError, IndexError, TypeError):
        match: Any = rule["expr"][0]["match"]
        return str(match["left"]["meta"]["key"]), str(match["right"])
    return "", ""


def _pass_legacy(policy: policies.Policy, need: Need) -> None:
    """The old kernel interface, which nft does not see; only where something has used it."""
    for tool, listed in _LEGACY.items():
        asked = need.ipv6 or not tool.startswith("ip6")
        with contextlib.suppress(FileNotFoundError), open(f"/proc/thread-self/net/{listed}") as file:
            if "filter" in file.read().split():
                for chain, option, on in (
                    ("INPUT", "-i", need.to_host),
                    ("FORWARD", "-i", need.through_host),
                    ("FORWARD", "-o", need.through_host),
                ):
                    _set_legacy(tool, [chain, option, policy.bridge], on=on and asked)


def _set_legacy(tool: str, match: list[str], *, on: bool) -> None:
    rule = [*match, "-m", "comment", "--comment", TAG, "-j", "ACCEPT"]
    is_there = _legacy(tool, "-C", rule).status == 0
    if is_there != on:
        ended = _legacy(tool, "-I" if on else "-D", rule)
        if ended.status:
            why = ended.output.decode(errors="replace").strip()[:300]
            raise errors.OperationFailedError(f"{tool} refused a rule in {match[0]}: {why}")


def _legacy(tool: str, verb: str, rule: list[str]) -> program.Ended:
    return program.run_as_root(tool, ["-w", "5", verb, *rule], deadline_s=_DEADLINE_S)
