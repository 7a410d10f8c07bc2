# SPDX-License-Identifier: MIT
"""The owner's configuration (every key optional) and where things are (from root's install.toml)."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, TypeVar

import msgspec

from banger import toml_file
from banger.contract import errors, names, resources
from banger.images import reference
from banger.net import upstream
from banger.system import host as installed
from banger.vm import host as hosts
from banger.vm.capabilities import file_sync

CATALOG_NAME: Final = "images.toml"
"""Beside config.toml: images that this host adds to the catalog."""
DATABASE: Final = "banger.db"
"""In the state directory."""

T = TypeVar("T")
Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]
Reference = Annotated[str, msgspec.Meta(min_length=1)]
AbsolutePath = Annotated[str, msgspec.Meta(pattern=r"^/[^\0]*$(?!\n)")]


class FileSync(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file or directory of the owner's home that every VM gets."""

    source: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
    """Such as `~/.gitconfig`."""
    target: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)] | None = None
    """Below the guest's /root; absent: as below the owner's home."""

    def __post_init__(self) -> None:
        _below_home(self.source, "~/")
        if self.target is not None:
            _below_home(self.target, "/root/")

    @property
    def entry(self) -> file_sync.Entry:
        source = _below_home(self.source, "~/")
        return file_sync.Entry(source, _below_home(self.target, "/root/") if self.target else source)


def _below_home(text: str, home: str) -> str:
    """The path below a home. Raises ValueError for one that is not."""
    below = text.removeprefix(home)
    parts = below.split("/")
    if below.startswith(("/", "~")) or "\0" in below or not set(parts).isdisjoint({"", ".", ".."}):
        raise ValueError(f"{text!r} is not a path below {home}")
    return below


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """config.toml. Absent sizes follow the host."""

    image: Reference = "debian-bookworm"
    kernel: Reference | None = None
    """Absent: the one that the image names."""
    vcpus: resources.Vcpus | None = None
    memory_mib: resources.MemoryMib | None = None
    disk_size_mib: resources.DiskMib | None = None
    vms_memory_mib: resources.MemoryMib | None = None
    """What all VMs that run may have together; absent: as much as the host has."""
    ipv6: bool = False
    """New VMs with a network get an IPv6 address too, unless asked otherwise."""
    agent_deadline_s: Seconds = 60.0
    agent_silence_s: Seconds = 15.0
    """An agent that has not answered for so long is silent, and its VM no longer shown as running."""
    flush_deadline_s: Seconds = 10.0
    power_off_deadline_s: Seconds = 4.0
    dns: Annotated[tuple[str, ...], msgspec.Meta(max_length=3)] = ()
    """What guests ask for names instead of us; as many as a resolv.conf holds."""
    dns_listen: str = f"{names.DNS_ADDRESS}:{names.DNS_PORT}"
    """Where this host asks for names of VMs; empty: nowhere, and guests are not answered either."""
    dns_route: bool = True
    """systemd-resolved is told, where it runs."""
    dns_guests: bool = True
    """Guests are answered at the bridge's address."""
    dns_upstream: Annotated[tuple[str, ...], msgspec.Meta(max_length=3)] = ()
    """Whom we ask for guests with NAT, `ADDRESS[:PORT]` or `[IPV6]:PORT`; absent: whom the host asks."""
    file_sync: Annotated[tuple[FileSync, ...], msgspec.Meta(max_length=64)] = ()
    """Copied into /root of every VM when it starts."""
    insecure_registries: Annotated[tuple[str, ...], msgspec.Meta(max_length=100)] = ()
    """`host[:port]` of registries to speak to without TLS, or with a certificate that nobody vouches for."""

    def __post_init__(self) -> None:
        for text in self.dns:
            _check_resolver(text)
        targets = [each.entry.target for each in self.file_sync]
        if len(set(targets)) < len(targets):
            raise ValueError("file_sync: two entries have one target")
        for text in self.insecure_registries:
            _check_registry(text)
        _check_endpoints(self)

    @property
    def dns_endpoint(self) -> upstream.Endpoint | None:
        """`dns_listen`, parsed; None when it is off."""
        return upstream.parse_endpoint(self.dns_listen) if self.dns_listen else None

    def source_of(self, key: str) -> resources.SizeSource:
        """Whether a key has another value than its default."""
        changed = getattr(self, key) != getattr(Config(), key)
        return resources.SizeSource.CONFIG if changed else resources.SizeSource.DEFAULT

    @property
    def limits(self) -> hosts.Limits:
        return hosts.Limits(
            self.agent_deadline_s,
            self.flush_deadline_s,
            self.power_off_deadline_s,
            self.agent_silence_s,
        )


class Installation(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of install.toml that the daemon needs; the others are the helper's."""

    owner_uid: Annotated[int, msgspec.Meta(ge=0)]
    uid_count: Annotated[int, msgspec.Meta(ge=1, le=names.MAX_SLOTS)] = names.MAX_SLOTS
    network: str = names.NETWORK
    network6: str = names.NETWORK6
    bridge: str = names.BRIDGE
    state_dir: AbsolutePath = str(installed.STATE)
    helper_dir: AbsolutePath = str(installed.HELPER)

    def __post_init__(self) -> None:
        """The helper has the same rule; a daemon that breaks it would only fail later."""
        found = _network(self.network)
        # Besides the VMs: the network itself, the bridge and the broadcast address.
        if found.num_addresses < self.uid_count + 3:
            raise ValueError(f"network: {self.network!r} is too small for {self.uid_count} VMs")
        names.parse_network6(self.network6)


@dataclass(frozen=True, slots=True)
class Paths:
    """Where this daemon's things are."""

    state: Path
    cache: Path
    run: Path
    helper_socket: Path
    helper_dir: Path
    install: Path
    image_catalog: Path | None = None
    kernel_catalogs: Path = installed.ETC / "kernels.d"
    """The host's own kernels that can be pulled, as TOML files beside the configuration."""
    builder_socket: Path = installed.BUILDER_SOCKET

    @property
    def socket(self) -> Path:
        return self.run / "bangerd.sock"

    @property
    def database(self) -> Path:
        return self.state / DATABASE

    @property
    def layout(self) -> hosts.Layout:
        return hosts.Layout(self.state, jails=self.helper_dir / "jails", logs=self.helper_dir / "logs")


def load(path: Path) -> Config:
    """A missing file is an empty one. Raises BadRequestError that names the file and the key."""
    return _decode(path, Config) or Config()


def load_installation(path: Path) -> Installation:
    """Raises NotFoundError when banger is not installed."""
    found = _decode(path, Installation)
    if found is None:
        raise errors.NotFoundError(f"{path} does not exist", hint="install first: `banger system install`")
    return found


def prefix(installation: Installation) -> ipaddress.IPv4Network:
    return _network(installation.network)


def prefix6(installation: Installation) -> ipaddress.IPv6Network:
    return names.parse_network6(installation.network6)


def _decode(path: Path, kind: type[T]) -> T | None:
    try:
        return toml_file.read(path, kind, hint="correct the file, then restart bangerd")
    except FileNotFoundError:
        return None


def _check_resolver(text: str) -> None:
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        raise ValueError(f"dns: {text!r} is not an IPv4 address") from None
    if address.is_loopback:
        raise ValueError(f"dns: {text!r} would be the guest itself; name one that guests can reach")
    if address.is_multicast or address.is_unspecified or address.is_reserved:
        raise ValueError(f"dns: {text!r} is not the address of a host")


def _check_registry(text: str) -> None:
    try:
        reference.parse_host(text)
    except errors.BadRequestError:
        raise ValueError(f"insecure_registries: {text!r} is not a host with or without a port") from None


def _check_endpoints(settings: Config) -> None:
    try:
        found = settings.dns_endpoint
    except ValueError as error:
        raise ValueError(f"dns_listen: {settings.dns_listen!r} is not ADDRESS:PORT: {error}") from None
    if found is not None and not found[0].startswith("127."):
        raise ValueError(
            f"dns_listen: {settings.dns_listen!r} is not on the loopback, 127.0.0.0/8: others would ask too"
        )
    for text in settings.dns_upstream:
        try:
            upstream.parse_endpoint(text)
        except ValueError as error:
            raise ValueError(f"dns_upstream: {text!r} is not ADDRESS[:PORT]: {error}") from None


def _network(text: str) -> ipaddress.IPv4Network:
    try:
        return ipaddress.IPv4Network(text)
    except ValueError as error:
        raise ValueError(f"network: {text!r} is not an IPv4 network with its prefix: {error}") from None
