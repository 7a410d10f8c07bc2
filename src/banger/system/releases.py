# SPDX-License-Identifier: MIT
"""Where versions of banger lie side by side, and which one is installed: a link that is switched by rename.

    /usr/local/lib/banger-releases/1.3.0/          a virtual environment, with the units of this version
    /usr/local/lib/banger-releases/current         → 1.3.0, or where the first installation was made
    /usr/local/lib/banger-releases/previous        → what was before
    /usr/local/lib/systemd/system/bangerd.service  → …/current/units/bangerd.service, and so are the others
    /usr/local/bin/banger                          → …/current/bin/banger

So one rename changes all at once, and whatever is cut off leaves the one version or the other; also when the
power goes, since all of a version is on the disk before anything leads to it. What runs
knows its own version's directory, not `current`: it goes on with the code that it began with.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from banger import artefacts
from banger.contract import errors
from banger.system import host

CURRENT: Final = "current"
PREVIOUS: Final = "previous"
_SYSTEM: Final = "etc/systemd/system"
_WANTS: Final = {
    name: f"{_SYSTEM}/{'sockets' if name.endswith('.socket') else 'multi-user'}.target.wants"
    for name in host.ENABLED
}
"""What starts with the host; as `systemctl enable` has it for units that do not lie in /etc."""


@dataclass(frozen=True, slots=True)
class Releases:
    """Those of one host, which begins at `root` in a test."""

    root: Path = Path("/")
    sync: Callable[[], None] = os.sync
    """All that was written is on the disk: thousands of files, and where they lie."""

    @property
    def top(self) -> Path:
        return self._at(host.RELEASES)

    def place(self, version: str) -> Path:
        return self.top / version

    def current(self) -> Path:
        """The virtual environment that is installed. Raises NotFoundError."""
        found = self.installed()
        if found is None:
            raise errors.NotFoundError(
                "banger is not installed on this host", hint="`sudo banger system install` sets it up"
            )
        return found

    def installed(self) -> Path | None:
        """As `current`; None where nothing is installed."""
        return self._led(CURRENT)

    def previous(self) -> Path | None:
        """What was installed before, if it is there."""
        return self._led(PREVIOUS)

    def switch(self, prefix: Path) -> None:
        """From now on `prefix` is what is installed, wholly."""
        self.sync()
        before = self.installed()
        if before is not None and before != prefix:
            self._lead_durably(PREVIOUS, before)
        self._lead_durably(CURRENT, prefix)
        # systemd looks for units anew when the directory has changed, and it is the link behind that did.
        os.utime(self._at(host.UNIT_DIR))

    def switch_back(self, prefix: Path, before: Path | None) -> None:
        """As it was: `prefix` installed, and `before` before it."""
        self._lead_durably(CURRENT, prefix)
        if before is None:
            (self.top / PREVIOUS).unlink(missing_ok=True)
        else:
            self._lead_durably(PREVIOUS, before)
        os.utime(self._at(host.UNIT_DIR))

    def write_units(self, prefix: Path, owner: str, sources: Path) -> None:
        """This version's units, for this owner, into its own directory; nothing leads there yet."""
        directory = prefix / host.OWN_UNITS
        directory.mkdir(exist_ok=True)
        for left in directory.iterdir():  # where a version goes into the place of the one before
            if left.name not in host.UNITS and not left.is_dir():
                left.unlink()
        for name in host.UNITS:
            text = host.unit_text(sources / name, owner, Path("/") / prefix.relative_to(self.root))
            staged = directory / f".{name}.new"
            staged.write_text(text)
            staged.chmod(0o644)
            staged.rename(directory / name)
        directory.chmod(0o755)

    def links(self) -> dict[Path, Path]:
        """All that leads into what is installed, and where each leads."""
        current = self.top / CURRENT
        found = {self._at(host.BIN / name): current / "bin" / name for name in host.COMMANDS}
        found |= {self._at(host.UNIT_DIR / name): current / host.OWN_UNITS / name for name in host.UNITS}
        wanted = {self.root / where / name: self._at(host.UNIT_DIR / name) for name, where in _WANTS.items()}
        return found | wanted

    def stale(self) -> list[Path]:
        """Links into what is installed that lead nowhere: another version had what they are for."""
        here = os.path.realpath(self.current())
        places = sorted({link.parent for link in self.links()})
        found = [link for place in places if place.is_dir() for link in place.iterdir() if link.is_symlink()]
        return [
            link for link in found if not link.exists() and Path(os.path.realpath(link)).is_relative_to(here)
        ]

    def pins(self) -> Iterator[Path]:
        """Links that `systemctl enable` made by hand: they lead to one version's units, past `current`."""
        for name in host.UNITS:
            link = self.root / _SYSTEM / name
            if link.is_symlink() and link.readlink().parent.name == host.OWN_UNITS:
                yield link

    def prune(self) -> list[Path]:
        """Deletes every version but what is installed and what was before; what it deleted."""
        kept = {self.current(), self.previous()}
        old = [path for path in self.top.iterdir() if path.is_dir() and not path.is_symlink()]
        gone = [path for path in (*old, self._at(host.PREFIX)) if path not in kept and path.exists()]
        for path in gone:
            shutil.rmtree(path)
        return gone

    def _at(self, path: Path) -> Path:
        return self.root / path.relative_to("/")

    def _led(self, name: str) -> Path | None:
        link = self.top / name
        if not link.is_symlink():
            return None
        found = Path(os.path.normpath(self.top / link.readlink()))
        return found if found.is_dir() else None

    def _lead_durably(self, name: str, target: Path) -> None:
        """What follows, such as the deletion of other versions, is never on the disk before it."""
        self.lead(self.top / name, target)
        artefacts.sync(self.top)

    def lead(self, link: Path, target: Path) -> None:
        """Makes a link lead there, at once: it is the old one or the new one."""
        staged = link.with_name(f".{link.name}.new")
        staged.unlink(missing_ok=True)
        staged.symlink_to(target if self.root == Path("/") else os.path.relpath(target, link.parent))
        staged.rename(link)
