# SPDX-License-Identifier: MIT
"""A release's own units, laid by its own code.

`python -I -m banger.system.own_units OWNER`: an upgrade is driven by the version that is installed, which
cannot know the units of a later one. It runs this, as root, from the new version's environment, once that
is trusted.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from banger import run
from banger.contract import decoding, errors
from banger.system import host, releases

_LAY_S: Final = 60.0


class Laid(msgspec.Struct, frozen=True):
    """What a version says of its units to the one before."""

    links: tuple[str, ...] = ()
    """Absolute paths that were made: they lead nowhere before the switch, and go where it does not come."""
    started: tuple[str, ...] = host.ENABLED
    """What starts with the host, and so after the switch too."""

    @property
    def new(self) -> tuple[str, ...]:
        """Units that the version before did not have and that may run by now."""
        units = [link.name for link in map(Path, self.links) if link.parent.name == host.UNIT_DIR.name]
        return tuple(name for name in units if "@" not in name)


def lay(laid: releases.Releases, prefix: Path, owner: str, sources: Path) -> Laid:
    """Writes this version's units into its own directory, and the links to them that this host lacks."""
    laid.write_units(prefix, owner, sources)
    lacking = {link: target for link, target in laid.links().items() if not link.exists()}
    for link, target in lacking.items():
        link.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        laid.lead(link, target)
    return Laid(tuple(map(str, lacking)))


def unlink(laid: Laid) -> None:
    """The version that they were for does not come."""
    for link in laid.links:
        Path(link).unlink(missing_ok=True)


def end_stale(laid: releases.Releases, systemctl: Callable[..., None]) -> None:
    """What the installed version does not have: such a unit ends, and no link leads to it."""
    stale = laid.stale()
    for link in stale:
        if link.parent.name == host.UNIT_DIR.name:
            with contextlib.suppress(errors.BangerError):  # it need not run, nor be known
                systemctl("stop", link.name)
        link.unlink(missing_ok=True)
    if stale:
        systemctl("daemon-reload")


def asked_of(prefix: Path, owner: str) -> Laid:
    """Has the version at `prefix` lay its units; that runs its code."""
    argv = [str(prefix / "bin/python"), "-I", "-m", __name__, owner]
    return decoding.json(run.run(argv, deadline_s=_LAY_S).stdout, Laid)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("owner")
    options = parser.parse_args(argv)
    made = lay(releases.Releases(), Path(sys.prefix), options.owner, host.unit_sources())
    sys.stdout.write(msgspec.json.encode(made).decode())


if __name__ == "__main__":
    main()
