# SPDX-License-Identifier: MIT
"""The owner's configuration (every key optional) and where things are (from root's install.toml)."""

from __future__ import annotations

import ipaddress
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, TypeVar

import msgspec

from banger.contract import errors, names
from banger.vm import host as hosts

CONFIG_PATH: Final = Path("/etc/banger/config.toml")
INSTALL_PATH: Final = Path("/etc/banger/install.toml")

T = TypeVar("T")
Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """config.toml. Absent sizes follow the host."""

    image: str = "debian-bookworm"
    kernel: str | None = None
    """Absent: the one that the image names."""
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=32)] | None = None
    memory_mib: Annotated[int, msgspec.Meta(ge=64)] | None = None
    disk_size_mib: Annotated[int, msgspec.Meta(ge=16)] | None = None
    agent_deadline_s: Seconds = 60.0
    flush_deadline_s: Seconds = 10.0
    power_off_deadline_s: Seconds = 4.0
    dns: tuple[str, ...] = ()

    @property
    def limits(self) -> hosts.Limits:
        return hosts.Limits(self.agent_deadline_s, self.flush_deadline_s, self.power_off_deadline_s)


class Installation(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of install.toml that the daemon needs; the others are the helper's."""

    owner_uid: int
    network: str = names.NETWORK
    state_dir: str = "/var/lib/banger"
    helper_dir: str = "/var/lib/banger-root"


@dataclass(frozen=True, slots=True)
class Paths:
    """Where this daemon's things are."""

    state: Path
    cache: Path
    run: Path
    helper_socket: Path
    helper_dir: Path
    install: Path

    @property
    def socket(self) -> Path:
        return self.run / "bangerd.sock"

    @property
    def database(self) -> Path:
        return self.state / "banger.db"

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
    return ipaddress.IPv4Network(installation.network)


def _decode(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), type=kind)
    except FileNotFoundError:
        return None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise errors.BadRequestError(
            f"{path}: {error}", hint="correct the file, then restart bangerd"
        ) from error
