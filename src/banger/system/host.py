# SPDX-License-Identifier: MIT
"""Where an installation puts things, and what a host must offer. Used by install and uninstall."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from banger import run
from banger.contract import errors

ETC: Final = Path("/etc/banger")
INSTALL_TOML: Final = ETC / "install.toml"
KEPT_TOML: Final = ETC / "install.toml.kept"
"""Of an installation that was taken off without --purge: what the next one goes on with."""
CONFIG_TOML: Final = ETC / "config.toml"
STATE: Final = Path("/var/lib/banger")
CACHE: Final = Path("/var/cache/banger")
HELPER: Final = Path("/var/lib/banger-root")
RUNTIME: Final = HELPER / "runtime"
UNIT_DIR: Final = Path("/usr/local/lib/systemd/system")
OWN_UNITS: Final = "units"
"""In a virtual environment: its version's units, for this host's owner. Those in UNIT_DIR lead there."""
PREFIX: Final = Path("/usr/local/lib/banger")
"""Of the virtual environment, unless it was installed from another."""
RELEASES: Final = Path("/usr/local/lib/banger-releases")
"""Of the virtual environments that upgrades make, and of the link to what is installed."""
SIGNERS: Final = ETC / "release-signers"
BIN: Final = Path("/usr/local/bin")
MODULES: Final = Path("/etc/modules-load.d/banger.conf")
API_SOCKET: Final = Path("/run/banger/bangerd.sock")
HELPER_SOCKET: Final = Path("/run/banger-root/bangerd-root.sock")
BUILDER_SOCKET: Final = Path("/run/banger-build/bangerd-build.sock")
GUESTS: Final = "banger-guests.service"
"""Does nothing but be stopped, before all others, when the host goes down: then it has the VMs stopped."""
UNITS: Final = (
    "bangerd.service",
    "bangerd-root.socket",
    "bangerd-root.service",
    "bangerd-build.socket",
    "bangerd-build@.service",
    "banger-vms.service",
    GUESTS,
)
LOADED: Final = tuple(name for name in UNITS if "@" not in name)
"""Those that systemd knows something of when nothing is being built."""
ENABLED: Final = ("bangerd.service", "bangerd-root.socket", "bangerd-build.socket", GUESTS)
"""What starts with the host."""
BUILDS: Final = "bangerd-build@*.service"
"""A unit for each build that is going on."""
SLICE: Final = "banger.slice"
COMMANDS: Final = ("banger", "bangerd")
_TOOLS: Final = {"e2fsck": "e2fsprogs", "debugfs": "e2fsprogs", "mkfs.ext4": "e2fsprogs"}
_SYSTEMCTL_S: Final = 480.0
_JOURNALCTL_S: Final = 20.0


def unit_sources() -> Path:
    """In the wheel, or in the tree."""
    packaged = Path(__file__).parents[1] / "_units"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "units"


def unit_text(source: Path, owner: str, prefix: Path) -> str:
    """A unit as it is installed for this owner, from a virtual environment at `prefix`."""
    text = source.read_text().replace("@OWNER@", owner)
    return re.sub(rf"{re.escape(str(PREFIX))}(?=/)", str(prefix), text)


def systemctl(*arguments: str) -> None:
    """Raises as `run.run`; of a unit that does not start, with what it said last."""
    try:
        run.run(["systemctl", *arguments], deadline_s=_SYSTEMCTL_S)
    except errors.BangerError as error:
        if arguments[0] in ("start", "restart"):
            error.hint = "see: journalctl -u bangerd -u bangerd-root"
            for line in _last_words():
                error.add_note(line)
        raise


def forget_units() -> None:
    """They have gone: what systemd knew of them goes too."""
    for socket in (HELPER_SOCKET, BUILDER_SOCKET):
        with contextlib.suppress(FileNotFoundError):
            socket.parent.rmdir()
    systemctl("daemon-reload")
    # A unit that never failed is not known any more, which is what was wanted.
    with contextlib.suppress(errors.BangerError):
        systemctl("reset-failed", *LOADED, SLICE)


def _last_words() -> list[str]:
    """An installation that fails takes its units back: afterwards systemctl knows nothing of them."""
    units = [f"--unit={name}" for name in LOADED]
    argv = ["journalctl", "--no-pager", "-q", "--output=cat", "--priority=warning", "--lines=5", *units]
    try:
        return run.run(argv, deadline_s=_JOURNALCTL_S).text.splitlines()
    except errors.BangerError:
        return []


def check(owner: str) -> pwd.struct_passwd:
    """Everything that would make an installation fail later, looked at before anything is changed."""
    if os.geteuid() != 0:
        raise errors.UnauthorizedError("installing needs root", hint="run it with sudo")
    if not Path("/run/systemd/system").is_dir():
        raise errors.MissingToolError("this host does not run systemd")
    if not Path("/sys/fs/cgroup/cgroup.controllers").exists():
        raise errors.MissingToolError(
            "this host does not use cgroup v2", hint="boot with systemd.unified_cgroup_hierarchy=1"
        )
    for tool, package in _TOOLS.items():
        run.require(tool, package)
    return find_owner(owner)


def find_owner(owner: str) -> pwd.struct_passwd:
    try:
        found = pwd.getpwnam(owner)
    except KeyError:
        raise errors.NotFoundError(f"there is no user {owner!r}", hint="see: getent passwd") from None
    if found.pw_uid == 0:
        raise errors.BadRequestError(
            "the owner must not be root", hint="name an ordinary user: --owner USER"
        )
    return found


def as_user(user: pwd.struct_passwd, argv: Sequence[str]) -> list[str]:
    """The command, run by root as that user with its groups and no way back."""
    return _as_ids(user.pw_uid, user.pw_gid, "--init-groups", argv)


def as_uid(uid: int, argv: Sequence[str]) -> list[str]:
    """As `as_user`, for a uid that may be no user's any more."""
    return _as_ids(uid, uid, "--clear-groups", argv)


def _as_ids(uid: int, gid: int, groups: str, argv: Sequence[str]) -> list[str]:
    who = [f"--reuid={uid}", f"--regid={gid}", groups, "--no-new-privs"]
    return [run.require("setpriv", "util-linux"), *who, *argv]
