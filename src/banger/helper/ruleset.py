# SPDX-License-Identifier: MIT
"""The elements of banger's own nftables tables: what VMs own of the sets that `rules.nft` lays out.

Every element carries its VM's id as comment. Whatever is changed is one change: all of it holds, or nothing.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Collection, Iterable
from typing import Any, Final, NamedTuple, cast

from banger.contract import errors
from banger.helper import policy as policies
from banger.helper import tables
from banger.helper.linux import nftables

lock: Final = threading.RLock()
"""Held from looking to acting; callers hold it on until the host serves what they changed."""
_reading: Final = threading.Lock()
"""To read them all takes memory by their number, and as many threads as there are may want to."""
MAX_ELEMENTS: Final = 60_000
"""All that as many guests as there may be take without rules of their own. So many are 200 MiB to read."""
MAX_OF_ONE: Final = 2_048
"""What names stand for is up to who answers for them, and how often is asked to the guest."""


class Set(NamedTuple):
    family: str
    name: str


GUESTS: Final = Set("bridge", "guests")
NETWORKS: Final = Set("bridge", "networks")
MEMBERS: Final = Set("bridge", "members")
MEMBER_MACS: Final = Set("inet", "member_macs")
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
    version: Reach(*(Set("inet", f"{name}{end}") for name in Reach._fields))
    for version, end in ((4, ""), (6, "6"))
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


def ensure(policy: policies.Policy) -> tuple[bool, set[Element]]:
    """The tables are there and of this version. Whether they had to be made, and what is in them."""
    wanted = tables.version(policy)
    with lock:
        listed = _listed()
        for family, content in listed.items():
            if not _is_ours(content):
                raise errors.ConflictError(
                    f"table {family} {tables.TABLE} exists and is not banger's", hint="rename or delete it"
                )
        if all(wanted in _chains(listed.get(family, [])) for family in tables.FAMILIES):
            return False, _elements(listed)
        nftables.load(tables.text(policy))
        return True, set()


def delete() -> None:
    """Gone is gone. A table of our name that is not ours is left alone."""
    with lock:
        for family, content in _listed().items():
            if _is_ours(content):
                nftables.change([{"delete": {"table": {"family": family, "name": tables.TABLE}}}])


def elements() -> set[Element]:
    """All that VMs own, and the links that were opened. Empty when the tables are not there."""
    with _reading:
        return _elements(_listed())


class Change(NamedTuple):
    before: set[Element]
    after: set[Element]


def replace(owner: str, wanted: Iterable[Element], *, addresses: Collection[str] = ()) -> Change:
    """Exactly `wanted` of this owner holds, in one change; returns all elements there were and are.

    `addresses` are this owner's: all that another has who speaks of one was left over, and goes.
    """
    with lock:
        listed = _listed()
        present = _elements(listed)
        want = {each.identity: each for each in wanted}
        if want and len(listed) < len(tables.FAMILIES):
            raise errors.NotFoundError("the packet rules are not loaded", hint="ensure the bridge first")
        have = {each.identity: each for each in present if each.owner == owner}
        gone = [each for name, each in have.items() if name not in want]
        theirs = [each for each in present if addresses and _guest_of(each) in addresses]
        strangers = {each.owner for each in theirs} - {owner, ""}
        gone += [each for each in present if each.owner in strangers]
        fresh = [each for name, each in want.items() if name not in have]
        after = present - set(gone) | set(fresh)
        _exchange(gone, fresh, len(after))
        return Change(present, after)


def _guest_of(element: Element) -> str:
    """The address of the guest that it speaks of; empty where it names none."""
    value: Any = json.loads(element.key)
    parts = cast("list[Any]", value["concat"] if isinstance(value, dict) else [value])
    if element.set in (GUESTS, SOURCES6):
        return str(parts[-1])
    return str(parts[0]) if any(element.set in reach for reach in REACH.values()) else ""


def refresh(owner: str, wanted: Collection[Element]) -> None:
    """Adds elements of the owner's with a timeout, which begins anew for those that are there."""
    with lock:
        there = elements()
        present = {each.identity for each in there}
        mine = {each.identity for each in (*there, *wanted) if each.owner == owner}
        if len(mine) > MAX_OF_ONE and not mine <= present:
            raise errors.ConflictError(f"VM {owner} has too many addresses allowed", vm=owner)
        after = present | mine
        _exchange([each for each in wanted if each.identity in present], wanted, len(after))


def set_opened(links: set[str]) -> None:
    """What comes in by these links and is not for a guest is dropped."""
    with lock:
        present = {each for each in elements() if each.set == OPENED}
        wanted = {Element(OPENED, key(name)) for name in links}
        _exchange(present - wanted, wanted - present)


def _exchange(gone: Collection[Element], fresh: Collection[Element], after: int = 0) -> None:
    """`after` is how many there then are in all, where that may be too many."""
    if after > MAX_ELEMENTS and len(fresh) > len(gone):
        hint = "end VMs, or allow fewer addresses and names"
        raise errors.ConflictError(f"{after} packet rules are too many", hint=hint)
    # One whose time has ended since it was read cannot be deleted, and to add one that is there is nothing.
    there = [_command("add", each) for each in gone if each.timeout_s]
    commands = there + [_command("delete", each) for each in gone]
    commands += [_command("add", each) for each in fresh]
    if commands:
        nftables.change(commands)


def _listed() -> dict[str, list[nftables.Json]]:
    """What is in each table of our name that there is, by family; each is read once, and alone."""
    found: dict[str, list[nftables.Json]] = {}
    for family in tables.FAMILIES:
        try:
            found[family] = nftables.query("table", family=family, name=tables.TABLE)
        except nftables.RefusedError:
            if (family, tables.TABLE) in _table_names():
                raise
    return found


def _table_names() -> list[tuple[str, str]]:
    found = [each["table"] for each in nftables.query("tables")]
    return [(each["family"], each["name"]) for each in found]


def _chains(table: list[nftables.Json]) -> list[str]:
    return [each["chain"]["name"] for each in table if "chain" in each]


def _is_ours(table: list[nftables.Json]) -> bool:
    return any(name.startswith("version_") for name in _chains(table))


def _elements(listed: dict[str, list[nftables.Json]]) -> set[Element]:
    parsed: set[Element] = set()
    for each in itertools.chain.from_iterable(listed.values()):
        fields = each.get("set") or each.get("map")
        if fields is not None:
            of = Set(fields["family"], fields["name"])
            parsed |= {_element(of, raw) for raw in fields.get("elem", ())}
    return parsed


def _element(of: Set, raw: Any) -> Element:
    """nft wraps an element only when there is more to say than its value."""
    pair: list[Any] = raw if isinstance(raw, list) else [raw, 0]  # pyright: ignore[reportUnknownVariableType]
    wrapped = cast(nftables.Json, pair[0]) if isinstance(pair[0], dict) else {}
    inner: nftables.Json = wrapped.get("elem", {"val": pair[0]})
    name = json.dumps(inner["val"], sort_keys=True)
    return Element(of, name, pair[1], inner.get("comment", ""), inner.get("timeout", 0))


def _command(verb: str, element: Element) -> nftables.Json:
    inner: nftables.Json = {"val": json.loads(element.key)}
    if element.owner:
        inner["comment"] = element.owner
    if element.timeout_s and verb == "add":
        inner["timeout"] = element.timeout_s
    raw: Any = {"elem": inner}
    if element.set == NETWORKS:
        raw = [raw, element.value]
    of = {"family": element.set.family, "table": tables.TABLE, "name": element.set.name, "elem": [raw]}
    return {verb: {"element": of}}
