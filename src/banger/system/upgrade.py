# SPDX-License-Identifier: MIT
"""`banger system upgrade`: a signed release beside what is installed, then one switch; VMs go on running.

Nothing of the release is unpacked before its signature and every hash were right. Nothing is changed for
those who use banger before it is complete, root's alone, and able to migrate this host's rows. Cut off at
any moment, the host has the old version or the new one, wholly; a failure brings the old one back with its
rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from banger import run, steps
from banger.contract import errors
from banger.system import alone, environment, machine, own_units, signed, versions

_UNDO_S: Final = 600.0
_CURRENT: Final = 0
_TOO_NEW: Final = 2
"""What `bangerd --check-migrations` says; 1 is that it will migrate."""


class Upgrade:
    """One upgrade of one host. `plan` is data; what each step made is remembered for its undo."""

    def __init__(self, directory: Path, host: machine.Machine, say: Callable[[str], None]) -> None:
        self._directory = directory
        self._host = host
        self._say = say
        self._releases = host.releases
        self._old = self._releases.current()
        self._older = self._releases.previous()
        self._from = environment.version(self._old)
        self._scratch = host.helper_dir / "upgrade"
        self._release = signed.Release("", ())
        self._new = Path()
        self._mark = host.helper_dir / machine.UPGRADING
        self._laid = own_units.Laid()
        """Where an upgrade that was cut off is finished, these are the units of who finishes it."""
        self._stopped = False
        """The old services were: the way back starts them again."""
        self._stays = False
        """The rows could not go back: the new version stays, since the old one cannot read them."""

    async def run(self) -> None:
        """Raises what made it fail, once the old version is back; ConflictError when it is older."""
        os.umask(0o022)
        with alone.on_host(self._host.helper_dir), alone.cancelled_by_signals():
            try:
                self._release = await run.in_thread(self._read)
                self._new = self._releases.place(self._release.version)
                if self._release.version == self._from:
                    await self._finish()
                    return
                versions.refuse_older(self._release.version, self._from)
                self._say(f"upgrading banger {self._from} to {self._release.version}")
                await self._drive(self.plan())
                await self._settle()
            finally:
                shutil.rmtree(self._scratch, ignore_errors=True)

    def plan(self) -> list[steps.Step]:
        step = steps.Step
        return [
            step("copy", self._copy, detail="copying and verifying its files"),
            step("unpack", self._unpack, self._delete_new, detail="unpacking it beside what is installed"),
            step("trust", self._look, detail="looking at all that root would execute"),
            step("migrations", self._rehearse, detail="trying it on a copy of the database"),
            step("units", self._lay_units, self._unlink_new, detail="having it write its units"),
            *self._switching(),
        ]

    def _switching(self) -> list[steps.Step]:
        step = steps.Step
        return [
            step("back", self._begin, self._start_old, detail="making sure of the way back"),
            step("switch", self._switch, self._switch_back, detail="switching to it"),
            step("services", self._start_new, self._stop_new, detail="starting both services anew"),
            step("answer", self._answer, detail="waiting until both answer"),
        ]

    async def _drive(self, plan: list[steps.Step]) -> None:
        try:
            await steps.run(plan, machine.Said(self._say), undo_timeout_s=_UNDO_S)
        except BaseException as error:
            wholly = not any(note.startswith("rollback_") for note in getattr(error, "__notes__", ()))
            now = f"banger {self._from} is installed as before"
            if self._stays:
                now = f"banger {environment.version(self._new)} stays installed: its rows cannot go back"
            elif not wholly:
                now = f"banger {self._from} may not be as before"
            error.add_note(f"{now}; VMs go on running")
            raise

    async def _finish(self) -> None:
        """The release is what is installed. One that was cut off after the switch may not run yet.

        Only then is there a way back: after it had answered once, what was kept is of the past.
        """
        self._new, before = self._old, self._older
        if await run.in_thread(self._host.answers, self._from):
            await self._settle()
            self._say(f"banger {self._from} is installed and runs; there is nothing to do")
            return
        if before is None or before == self._old or not self._was_cut_off():
            self._say(f"banger {self._from} is installed and does not answer; starting it anew")
            await self._start_new()
            await self._answer()
            await self._settle()
            return
        self._say(f"an upgrade to banger {self._from} was cut off; finishing it")
        self._old, self._older = before, None
        self._from = environment.version(before)
        await self._drive(self._switching())
        await self._settle()

    def _was_cut_off(self) -> bool:
        return self._mark.exists() and self._mark.read_text() == self._from

    def _read(self) -> signed.Release:
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(mode=0o700)
        return signed.read(self._directory, self._host.signers, self._scratch)

    async def _copy(self) -> None:
        names = set(environment.chosen(wheel.name for wheel in self._release.wheels))
        wheels = tuple(wheel for wheel in self._release.wheels if wheel.name in names)
        self._release = signed.Release(self._release.version, wheels)
        (self._scratch / "wheels").mkdir()
        await run.in_thread(signed.copy, self._release, self._directory, self._scratch / "wheels")

    async def _unpack(self) -> None:
        # What an upgrade left that was cut off; nothing leads there.
        shutil.rmtree(self._new, ignore_errors=True)
        wheels = [self._scratch / "wheels" / wheel.name for wheel in self._release.wheels]
        await run.in_thread(self._host.make_environment, self._new, wheels)

    async def _delete_new(self) -> None:
        if self._stays:
            return
        await asyncio.to_thread(shutil.rmtree, self._new, ignore_errors=True)

    async def _look(self) -> None:
        found = environment.version(self._new)
        if found != self._release.version:
            raise errors.BadRequestError(f"the release says {self._release.version}, and is {found}")
        await run.in_thread(self._host.require_trust, self._new)

    async def _rehearse(self) -> None:
        """Run as the owner, whose rows they are."""
        said = await run.in_thread(self._host.bangerd, self._new, "--check-migrations", ok=(0, 1, 2))
        if said == _TOO_NEW:
            raise errors.ConflictError(
                f"the database of this host is newer than banger {self._release.version} understands",
                hint="a newer banger wrote it: upgrade to that version, or a newer one",
            )
        if said != _CURRENT:
            self._say("its rows will be migrated; what they are now is kept")

    async def _lay_units(self) -> None:
        self._laid = await run.in_thread(self._host.lay_units, self._new)

    async def _unlink_new(self) -> None:
        if not self._stays:
            await run.in_thread(own_units.unlink, self._laid)

    async def _begin(self) -> None:
        """What is acquired here is the duty to start again what was."""
        staged = self._mark.with_name(f".{self._mark.name}.new")
        staged.write_text(environment.version(self._new))
        staged.rename(self._mark)

    async def _start_old(self) -> None:
        self._host.systemctl("daemon-reload")
        if self._stopped:
            await self._start_again()
        await run.in_thread(own_units.end_stale, self._releases, self._host.systemctl)
        self._mark.unlink(missing_ok=True)

    async def _start_again(self) -> None:
        with contextlib.suppress(errors.BangerError):  # a unit that never failed may not be known
            self._host.systemctl("reset-failed", "bangerd.service", "bangerd-root.service")
        self._host.systemctl("restart", "bangerd.service")
        if not self._stays:
            await self._host.wait_answer(self._from)

    async def _switch(self) -> None:
        for pin in self._releases.pins():
            pin.unlink()
        self._releases.switch(self._new)

    async def _switch_back(self) -> None:
        if not self._stays:
            self._releases.switch_back(self._old, self._older)

    async def _start_new(self) -> None:
        self._stopped = True
        self._host.systemctl("daemon-reload")
        # A stopped helper starts with the next request, in its new version; VMs do not notice.
        self._host.systemctl("stop", "bangerd-root.service")
        self._host.systemctl("restart", "bangerd.service")
        self._host.systemctl("start", *self._laid.started)

    async def _stop_new(self) -> None:
        """And its rows go back before the switch does: the new version can migrate them again."""
        self._stopped = True
        self._host.systemctl("stop", "bangerd.service", "bangerd-root.service", *self._laid.new)
        try:
            await run.in_thread(self._host.bangerd, self._old, "--undo-migrations")
        except errors.BangerError:
            self._stays = True
            raise

    async def _answer(self) -> None:
        await self._host.wait_answer(environment.version(self._new))

    async def _settle(self) -> None:
        """The switch has held: no way leads back to rows that grow old from now on.

        What cannot be deleted now goes with the next upgrade.
        """
        self._mark.unlink(missing_ok=True)
        with contextlib.suppress(OSError, errors.BangerError):
            await run.in_thread(own_units.end_stale, self._releases, self._host.systemctl)
        try:
            await run.in_thread(self._host.bangerd, self._new, "--settle-migrations")
        except errors.BangerError as error:
            self._say(f"the rows of before are still kept: {error}")
        with contextlib.suppress(OSError):
            for path in self._releases.prune():
                self._say(f"deleted {path}")
