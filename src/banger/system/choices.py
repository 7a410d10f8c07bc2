# SPDX-License-Identifier: MIT
"""What the installing user decided, beside what is installed and what is derived from this host."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field, replace
from pathlib import Path

from banger.contract import errors, names
from banger.net import addresses
from banger.system import settings


@dataclass(frozen=True, slots=True)
class Choices:
    """What the installing user decided. What is not said stays as it is where banger is installed."""

    owner: str = ""
    """Empty and nothing installed: `caller`."""
    caller: str = ""
    network: str = ""
    network6: str = ""
    """Empty and nothing installed: derived from this host's machine id, and so always the same."""
    programs: dict[str, Path] = field(default_factory=dict)
    """Own files for `firecracker` and `jailer`; absent ones come from the catalog."""
    pinned: bool = False
    """The catalog's, in the place of own files that an earlier installation was given."""
    signers: Path | None = None
    """Who may sign releases, as ssh-keygen's allowed signers; None keeps what is there."""


def completed(choices: Choices, settled: settings.Settings | None) -> Choices:
    """With what is installed where nothing was said, and then the defaults."""
    if settled is None:
        return replace(
            choices, owner=choices.owner or choices.caller, network=choices.network or names.NETWORK
        )
    owner = settled.owner_now() or choices.caller
    return replace(
        choices,
        owner=choices.owner or owner,
        network=choices.network or settled.network,
        network6=choices.network6 or settled.network6,
    )


def parse_network6(text: str) -> ipaddress.IPv6Network:
    try:
        return names.parse_network6(text) if text else addresses.derived_network6(_machine_id())
    except ValueError as error:
        raise errors.BadRequestError(f"no network for guests: {error}") from None


def _machine_id() -> str:
    """A host without one has the prefix of all such hosts; it is only ever seen behind NAT."""
    try:
        return Path("/etc/machine-id").read_text().strip()
    except FileNotFoundError:
        return ""


def parse_network(text: str) -> ipaddress.IPv4Network:
    try:
        return ipaddress.IPv4Network(text)
    except ValueError as error:
        raise errors.BadRequestError(f"{text!r} is not an IPv4 network: {error}") from None


def refuse_small(network: ipaddress.IPv4Network, old: settings.Settings | None) -> None:
    """Raises BadRequestError for one with which neither service starts."""
    count = old.uid_count if old is not None else names.MAX_SLOTS
    if network.num_addresses < count + 3:
        longest = network.max_prefixlen - (count + 2).bit_length()
        raise errors.BadRequestError(
            f"network {network} is too small for {count} VMs", hint=f"name a /{longest}, or a larger one"
        )
