# SPDX-License-Identifier: MIT
"""A host in a directory that is upgraded: systemd, both services and the rows, all kept in files of it.

So a process that works on it may be killed at any event, and another one goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from banger.contract import errors
from banger.system import environment, host, machine, own_units, releases

OLD, NEW = "1.2.0", "1.3.0"
SCHEMAS = {OLD: 4, NEW: 5}
LATER = "banger-later.service"
OWNER = "alice"
_EXEC = "ExecStart="


class Host(machine.Machine):
    """`faults`: what goes wrong with the new version, by name. `event`: called before anything changes."""

    def __init__(self, root: Path, event: Callable[[str], None] = lambda name: None) -> None:
        self.root = root
        self.releases = releases.Releases(root, lambda: self.event("sync"))
        self.helper_dir = root / "var/lib/banger-root"
        self.signers = root / "etc/banger/release-signers"
        self.faults: set[str] = set()
        self.started: set[str] = set()
        self.event = event

    def install_first(self) -> None:
        """The old version, as an installation leaves it; it runs, and there are rows."""
        first = self.at(host.PREFIX)
        for path in (self.helper_dir, self.signers.parent, self.root / "run", self.releases.top):
            path.mkdir(parents=True)
        self._fill(first, OLD)
        own_units.lay(self.releases, first, OWNER, host.unit_sources())
        self.releases.switch(first)
        self.db.write_text(f"{SCHEMAS[OLD]} web")
        self.boot()

    def at(self, path: Path) -> Path:
        return self.root / path.relative_to("/")

    @property
    def db(self) -> Path:
        """Its schema, and its rows."""
        return self.root / "db"

    @property
    def running(self) -> str:
        """The version of bangerd that runs; empty when none does."""
        path = self.root / "run/bangerd"
        return path.read_text() if path.exists() else ""

    def boot(self) -> None:
        """The host starts anew, with what is on its disk."""
        shutil.rmtree(self.root / "run")
        (self.root / "run").mkdir()
        self.faults.clear()
        self.systemctl("daemon-reload")
        self.systemctl("restart", "bangerd.service")

    def installed(self) -> set[str]:
        """The versions that commands and units lead to: one, or it is a half."""
        found = {environment.version(self.releases.current())}
        for link in self.releases.links():
            for parent in link.resolve().parents:
                if version := environment.version(parent):
                    found.add(version)
        return found

    def systemctl(self, *arguments: str) -> None:
        self.event(f"systemctl {' '.join(arguments)}")
        match arguments:
            case ("daemon-reload",):
                unit = (self.at(host.UNIT_DIR) / "bangerd.service").read_text()
                (line,) = [each for each in unit.splitlines() if each.startswith(_EXEC)]
                self._keep("loaded", line.removeprefix(_EXEC).removesuffix("/bin/bangerd"))
            case ("restart", "bangerd.service"):
                self._stop()
                self._start(self.at(Path((self.root / "run/loaded").read_text())))
            case ("stop", *names):
                if "bangerd.service" in names:
                    self._stop()
                self.started -= set(names)
            case ("start", *names):
                assert all((self.at(host.UNIT_DIR) / name).exists() for name in names)
                self.started |= set(names)
            case ("reset-failed", *_):
                pass
            case _:
                raise AssertionError(arguments)

    def make_environment(self, prefix: Path, wheels: Sequence[Path]) -> None:
        self.event("make_environment")
        assert not prefix.exists()
        assert [wheel.read_text() for wheel in wheels] == [NEW]
        self._fill(prefix, NEW, half="unpack" in self.faults)
        if "unpack" in self.faults:
            raise errors.NoSpaceError("no space left on device")

    def require_trust(self, prefix: Path) -> None:
        if "trust" in self.faults:
            raise errors.BadRequestError(f"{prefix} can be written by others than root")

    def lay_units(self, prefix: Path) -> own_units.Laid:
        """The new version has a unit more, which starts with the host."""
        laid = own_units.lay(self.releases, prefix, OWNER, host.unit_sources())
        if (prefix / host.OWN_UNITS / LATER).exists() or environment.version(prefix) != NEW:
            return laid
        (prefix / host.OWN_UNITS / LATER).write_text("[Service]\n")
        link = self.at(host.UNIT_DIR / LATER)
        self.releases.lead(link, self.releases.top / releases.CURRENT / host.OWN_UNITS / LATER)
        return own_units.Laid((*laid.links, str(link)), (*laid.started, LATER))

    def bangerd(self, prefix: Path, *arguments: str, ok: Collection[int] = (0,)) -> int:
        self.event(f"bangerd {arguments[0]}")
        own, found = SCHEMAS[environment.version(prefix)], self._schema()
        if arguments == ("--undo-migrations",):
            assert self.running == "", "somebody uses the rows"
            if found > own:
                kept = self.root / f"db.v{own}"
                if not kept.exists() or self._rows(self.db) - self._rows(kept):
                    raise errors.ConflictError("rows would be lost")
                shutil.copy(self.root / f"db.v{own}", self.root / "db.new")
                (self.root / "db.new").rename(self.db)
            return 0
        if arguments == ("--settle-migrations",):
            for kept in self.root.glob("db.v*"):
                kept.unlink()
            return 0
        assert arguments == ("--check-migrations",)
        if "migrations" in self.faults:
            raise errors.OperationFailedError("bangerd exited 3: no such table")
        status = 0 if found == own else 1 if found < own else 2
        assert status in ok
        return status

    def answers(self, version: str) -> bool:
        return self.running == version

    async def wait_answer(self, version: str) -> None:
        self.event(f"answer {version}")
        if version == NEW and "slow" in self.faults:
            await asyncio.Event().wait()
        if version == NEW and "answer" in self.faults:
            raise errors.UnavailableError("bangerd-root does not answer")
        if self.running != version:
            raise errors.DeadlineError(f"the daemon did not answer: {self.running or 'none'} runs")

    def _rows(self, path: Path) -> set[str]:
        return set(path.read_text().split()[1:])

    def _schema(self) -> int:
        return int(self.db.read_text().split()[0])

    def _start(self, prefix: Path) -> None:
        version = environment.version(prefix)
        found, own = self._schema(), SCHEMAS[version]
        if found > own:
            raise errors.OperationFailedError("bangerd.service failed: the database is newer")
        if found < own:
            shutil.copy(self.db, self.root / "staged")
            (self.root / "staged").rename(self.root / f"db.v{found}")
            (self.root / "staged").write_text(self.db.read_text().replace(str(found), str(own), 1))
            (self.root / "staged").rename(self.db)
            if "lost" in self.faults:
                (self.root / f"db.v{found}").unlink()
        if version == NEW and "services" in self.faults:
            error = errors.OperationFailedError("bangerd.service failed")
            error.add_note("its last words")
            raise error
        self._keep("bangerd", version)

    def _stop(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.root / "run/bangerd").unlink()

    def _keep(self, name: str, text: str) -> None:
        (self.root / "run/staged").write_text(text)
        (self.root / "run/staged").rename(self.root / "run" / name)

    def _fill(self, prefix: Path, version: str, *, half: bool = False) -> None:
        site = prefix / "lib/python3.11/site-packages"
        site.mkdir(parents=True)
        if not half:
            (site / f"banger-{version}.dist-info").mkdir()
            (prefix / "bin").mkdir()
            for name in host.COMMANDS:
                (prefix / "bin" / name).write_text(version)
