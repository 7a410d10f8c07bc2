# SPDX-License-Identifier: MIT
"""What an installation decided: install.toml, as installing again, an upgrade and doctor read it."""

from __future__ import annotations

import contextlib
import pwd
import tomllib
from pathlib import Path
from typing import Final

import msgspec

from banger.contract import decoding, errors, names
from banger.system import host

MEND: Final = (
    f"correct it, or: sudo mv {host.INSTALL_TOML} {host.INSTALL_TOML}.bad && "
    "sudo banger system install --owner USER"
)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of install.toml that are needed here."""

    owner_uid: int
    owner_gid: int
    owner_name: str
    network: str = names.NETWORK
    network6: str = names.NETWORK6
    uid_base: int = names.UID_BASE
    uid_count: int = names.MAX_SLOTS
    state_dir: str = str(host.STATE)
    helper_dir: str = str(host.HELPER)
    firecracker_sha256: str
    jailer_sha256: str

    def owner_now(self) -> str:
        """What its owner is called on this host, who may have been renamed; empty when there is none."""
        try:
            return pwd.getpwuid(self.owner_uid).pw_name
        except KeyError:
            return ""


def written() -> dict[str, str | int]:
    """All keys there are, also those that nobody here needs; those kept, where nothing is installed."""
    for path in (host.INSTALL_TOML, host.KEPT_TOML):
        with contextlib.suppress(FileNotFoundError):
            return tomllib.loads(path.read_text())
    return {}


def read(path: Path = host.INSTALL_TOML) -> Settings | None:
    """None when it is not there: banger is not installed. Raises BadRequestError for no such file."""
    try:
        return decoding.toml(path.read_bytes(), Settings)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, ValueError) as error:
        named = host.KEPT_TOML if path == host.KEPT_TOML else host.INSTALL_TOML
        raise errors.BadRequestError(
            f"{named} is not valid: {error}", hint=MEND.replace(str(host.INSTALL_TOML), str(named))
        ) from error
