# SPDX-License-Identifier: MIT
"""An upgrade that fails in any step, or is killed before any change: the old version or the new, wholly."""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import hashlib
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from banger import artefacts, steps
from banger.contract import errors
from banger.system import own_units, signed, upgrade
from banger.system.host import ENABLED, UNIT_DIR, unit_sources
from tests.fakes import upgraded
from tests.fakes.upgraded import NEW, OLD

CHANGES = {"os.rename", "os.symlink", "os.remove"}
"""By which what leads where changes; and the host's own events besides."""
STEPS = ("copy", "unpack", "trust", "migrations", "units", "back", "switch", "services", "answer")
KILLED = 9


class Unsigned(upgrade.Upgrade):
    """Signatures have tests of their own, in test_release.py. `broken`: a step, and when it breaks."""

    broken: tuple[str, str] = ("", "")

    def _read(self) -> signed.Release:
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir()
        name = f"banger-{self._directory.name}-py3-none-any.whl"
        text = (self._directory / name).read_bytes()
        wheel = signed.Wheel(name, len(text), hashlib.sha256(text).hexdigest())
        return signed.Release(self._directory.name, (wheel,))

    def plan(self) -> list[steps.Step]:
        return [self._breaking(step) for step in super().plan()]

    def _breaking(self, step: steps.Step) -> steps.Step:
        if step.name != self.broken[0]:
            return step

        async def run() -> None:
            if self.broken[1] == "after":
                await step.run()
            raise OSError(f"{step.name} is broken")

        return dataclasses.replace(step, run=run)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """A host with the old version, and two releases beside it."""
    root = tmp_path / "template"
    upgraded.Host(root).install_first()
    for version in (NEW, "1.1.0"):
        (root / version).mkdir()
        (root / version / f"banger-{version}-py3-none-any.whl").write_text(version)
    return root


@pytest.fixture
def host(template: Path) -> upgraded.Host:
    return upgraded.Host(template)


def attempt(host: upgraded.Host, version: str = NEW, broken: tuple[str, str] = ("", "")) -> list[str]:
    """What the user was told."""
    said: list[str] = []
    made = Unsigned(host.root / version, host, said.append)
    made.broken = broken
    asyncio.run(made.run())
    return said


def judge_old(host: upgraded.Host) -> None:
    assert host.installed() == {OLD}
    assert host.running == OLD
    assert host.db.read_text() == f"{upgraded.SCHEMAS[OLD]} web"
    assert not host.releases.place(NEW).exists()
    assert not (host.helper_dir / "upgrade").exists()
    assert not (host.at(UNIT_DIR) / upgraded.LATER).is_symlink()
    assert upgraded.LATER not in host.started


def judge_new(host: upgraded.Host) -> None:
    assert host.installed() == {NEW}
    assert host.running == NEW
    assert host.db.read_text() == f"{upgraded.SCHEMAS[NEW]} web"
    assert not list(host.root.glob("db.v*"))
    assert not list(host.helper_dir.glob("*upgrading"))
    assert not (host.helper_dir / "upgrade").exists()
    assert (host.at(UNIT_DIR) / upgraded.LATER).exists()


def test_it_succeeds(host: upgraded.Host) -> None:
    assert attempt(host)[0] == f"upgrading banger {OLD} to {NEW}"
    judge_new(host)
    assert host.started >= {*ENABLED, upgraded.LATER}
    previous = host.releases.previous()
    assert previous is not None
    assert previous.name == "banger"
    host.boot()
    judge_new(host)
    assert attempt(host) == [f"banger {NEW} is installed and runs; there is nothing to do"]


def test_all_of_it_is_on_the_disk_before_anything_leads_to_it(
    host: upgraded.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power may go at any moment, and what was written last may be there and the rest not."""
    seen: list[str] = []

    def note(what: str) -> None:
        units = host.releases.place(NEW) / "units/bangerd.service"
        seen.append(f"{what}: {'whole' if units.exists() else 'not yet'}, {min(host.installed())} installed")

    host.event = lambda name: note(name) if name in ("sync", "make_environment") else None
    monkeypatch.setattr(artefacts, "sync", lambda path: note(f"fsync {path.name}"))
    attempt(host)
    assert seen == [
        f"make_environment: not yet, {OLD} installed",
        f"sync: whole, {OLD} installed",
        f"fsync banger-releases: whole, {OLD} installed",
        f"fsync banger-releases: whole, {NEW} installed",
    ]


def test_the_steps_are_those_that_are_broken_below(host: upgraded.Host) -> None:
    assert tuple(step.name for step in upgrade.Upgrade(Path(), host, print).plan()) == STEPS


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_brings_the_old_version_back(host: upgraded.Host, step: str, when: str) -> None:
    with pytest.raises(OSError, match=f"{step} is broken") as raised:
        attempt(host, broken=(step, when))
    assert raised.value.__notes__ == [f"banger {OLD} is installed as before; VMs go on running"]
    judge_old(host)
    attempt(host)
    judge_new(host)


@pytest.mark.parametrize("fault", ["unpack", "trust", "migrations", "services", "answer"])
def test_a_release_that_is_no_good_is_taken_back(host: upgraded.Host, fault: str) -> None:
    host.faults.add(fault)
    with pytest.raises(errors.BangerError) as raised:
        attempt(host)
    assert raised.value.__notes__[-1] == f"banger {OLD} is installed as before; VMs go on running"
    judge_old(host)
    host.boot()
    judge_old(host)


def test_who_ends_it_gets_the_old_version_back(host: upgraded.Host) -> None:
    def event(name: str) -> None:
        if name == f"answer {NEW}":
            signal.raise_signal(signal.SIGHUP)

    host.event = event
    host.faults.add("slow")
    with pytest.raises(asyncio.CancelledError) as raised:
        attempt(host)
    assert raised.value.__notes__ == [f"banger {OLD} is installed as before; VMs go on running"]
    judge_old(host)


def test_a_way_back_that_fails_is_said(host: upgraded.Host) -> None:
    host.faults |= {"answer", "lost"}
    with pytest.raises((errors.BangerError, OSError)) as raised:
        attempt(host)
    assert raised.value.__notes__[-1] == (
        f"banger {NEW} stays installed: its rows cannot go back; VMs go on running"
    )
    assert any(note.startswith("rollback_") for note in raised.value.__notes__)
    assert (host.installed(), host.running) == ({NEW}, NEW)


def test_once_it_has_answered_no_rows_go_back(host: upgraded.Host) -> None:
    """Weeks later the daemon is down, and the same command is given again."""
    attempt(host)
    grown = f"{upgraded.SCHEMAS[NEW]} web made-since"
    host.db.write_text(grown)
    host.systemctl("stop", "bangerd.service")
    host.faults.add("answer")
    with pytest.raises(errors.UnavailableError):
        attempt(host)
    assert (host.installed(), host.db.read_text()) == ({NEW}, grown)
    host.faults.clear()
    host.systemctl("stop", "bangerd.service")
    attempt(host)
    assert (host.running, host.db.read_text()) == (NEW, grown)


def test_cut_off_and_used_for_weeks_no_rows_go_back(host: upgraded.Host) -> None:
    made = host.releases.place(NEW)
    host.make_environment(made, [host.root / NEW / f"banger-{NEW}-py3-none-any.whl"])
    host.lay_units(made)
    (host.helper_dir / "upgrading").write_text(NEW)
    host.releases.switch(made)
    host.boot()
    grown = f"{upgraded.SCHEMAS[NEW]} web made-since"
    host.db.write_text(grown)
    host.systemctl("stop", "bangerd.service")
    host.faults.add("answer")
    with pytest.raises(errors.UnavailableError) as raised:
        attempt(host)
    assert raised.value.__notes__[-1].startswith(f"banger {NEW} stays installed")
    assert (host.installed(), host.running, host.db.read_text()) == ({NEW}, NEW, grown)


def test_an_older_release_is_refused_with_the_reason(host: upgraded.Host) -> None:
    with pytest.raises(errors.ConflictError, match=f"banger {OLD} is installed, and 1.1.0 is older"):
        attempt(host, "1.1.0")
    judge_old(host)


def test_rows_of_a_newer_banger_are_refused_with_the_reason(host: upgraded.Host) -> None:
    host.db.write_text("9 web")
    with pytest.raises(errors.ConflictError, match=f"newer than banger {NEW} understands"):
        attempt(host)
    assert host.installed() == {OLD}
    assert host.db.read_text() == "9 web"


def test_one_upgrade_at_a_time(host: upgraded.Host) -> None:
    with (host.helper_dir / "upgrade.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(errors.ConflictError, match="another installation, upgrade"):
            attempt(host)
    judge_old(host)


def test_links_of_systemctl_enable_do_not_keep_the_old_units(host: upgraded.Host) -> None:
    """It makes them past `current`, straight to one version's units."""
    pin = host.root / "etc/systemd/system/bangerd.service"
    pin.symlink_to("../../../usr/local/lib/banger/units/bangerd.service")
    attempt(host)
    assert not pin.is_symlink()
    judge_new(host)


def test_a_unit_that_the_new_version_has_not_ends(host: upgraded.Host) -> None:
    """Of a version before; what is no link of ours stays, though it leads nowhere."""
    (host.releases.current() / "units/banger-former.service").write_text("[Service]\n")
    link = host.at(UNIT_DIR) / "banger-former.service"
    host.releases.lead(link, host.releases.top / "current/units/banger-former.service")
    wanted = host.root / "etc/systemd/system/multi-user.target.wants/banger-former.service"
    host.releases.lead(wanted, link)
    foreign = host.at(UNIT_DIR) / "foreign.service"
    foreign.symlink_to("/nowhere")
    host.started.add(link.name)
    attempt(host)
    judge_new(host)
    assert not link.is_symlink()
    assert not wanted.is_symlink()
    assert link.name not in host.started
    assert foreign.is_symlink()


def test_what_goes_into_the_place_of_the_version_before_has_its_own_units_alone(host: upgraded.Host) -> None:
    former = host.releases.current() / "units/banger-former.service"
    former.write_text("[Service]\n")
    own_units.lay(host.releases, host.releases.current(), upgraded.OWNER, unit_sources())
    assert not former.exists()


def test_only_the_version_before_is_kept(host: upgraded.Host) -> None:
    old = host.releases.place("1.0.0")
    old.mkdir()
    said = attempt(host)
    assert said[-1] == f"deleted {old}"
    assert sorted(path.name for path in host.releases.top.iterdir()) == [NEW, "current", "previous"]


@pytest.mark.parametrize("fault", ["", "answer"])
def test_cut_off_after_the_switch_the_same_command_finishes_it(host: upgraded.Host, fault: str) -> None:
    made = host.releases.place(NEW)
    host.make_environment(made, [host.root / NEW / f"banger-{NEW}-py3-none-any.whl"])
    host.lay_units(made)
    (host.helper_dir / "upgrading").write_text(NEW)
    host.releases.switch(made)
    host.started.add(upgraded.LATER)
    assert (host.installed(), host.running) == ({NEW}, OLD)
    host.faults |= {fault} - {""}
    if fault:
        with pytest.raises(errors.UnavailableError):
            attempt(host)
        assert (host.installed(), host.running) == ({OLD}, OLD)
        assert host.db.read_text() == f"{upgraded.SCHEMAS[OLD]} web"
        assert not (host.at(UNIT_DIR) / upgraded.LATER).is_symlink()
        assert upgraded.LATER not in host.started
    else:
        assert attempt(host)[0] == f"an upgrade to banger {NEW} was cut off; finishing it"
        judge_new(host)


@pytest.mark.timeout(300)
def test_killed_before_any_change_it_is_one_version_wholly(template: Path, tmp_path: Path) -> None:
    counted = tmp_path / "events"
    assert _killed_at(template, tmp_path / "whole", -1, counted) == 0
    events = counted.read_text().splitlines()
    assert {event for event in events if event.startswith("systemctl restart")}
    outcomes = set()
    for at, event in enumerate(events):
        root = tmp_path / "host"
        assert _killed_at(template, root, at, counted) == KILLED, event
        host = upgraded.Host(root)
        (version,) = host.installed()
        outcomes.add(version)
        # What runs is whole too, and a reboot finds one version with its rows.
        assert host.running in (OLD, NEW, ""), event
        host.boot()
        assert host.running == version, event
        assert host.db.read_text() == f"{upgraded.SCHEMAS[version]} web", event
        # And the same command, given again, gets it done.
        attempt(host)
        judge_new(host)
        shutil.rmtree(root)
    assert outcomes == {OLD, NEW}
    print(f"{len(events)} kills")


@pytest.mark.timeout(300)
def test_killed_on_the_way_back_it_is_one_version_wholly(template: Path, tmp_path: Path) -> None:
    counted = tmp_path / "events"
    assert _killed_at(template, tmp_path / "whole", -1, counted, "answer") == 0
    events = counted.read_text().splitlines()
    first = next(at for at, event in enumerate(events) if event.startswith("systemctl restart"))
    outcomes = set()
    for at, event in enumerate(events[first:], start=first):
        root = tmp_path / "host"
        assert _killed_at(template, root, at, counted, "answer") == KILLED
        host = upgraded.Host(root)
        (version,) = host.installed()
        outcomes.add(version)
        host.boot()
        assert host.running == version, event
        if version == NEW:
            # It is broken still: the same command, given again, brings the old one back.
            host.faults.add("answer")
            host.systemctl("stop", "bangerd.service")
            with pytest.raises(errors.BangerError):
                attempt(host)
        assert host.installed() == {OLD}, event
        assert host.running == OLD, event
        assert host.db.read_text() == f"{upgraded.SCHEMAS[OLD]} web", event
        shutil.rmtree(root)
    assert outcomes == {OLD, NEW}


def _killed_at(template: Path, root: Path, at: int, counted: Path, fault: str = "") -> int:
    """A process that upgrades a copy of the host and dies before its change number `at`; how it ended."""
    shutil.copytree(template, root, symlinks=True)
    child = os.fork()
    if child == 0:
        os._exit(_upgrade(root, at, counted, fault))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _upgrade(root: Path, at: int, counted: Path, fault: str) -> int:
    """In the child."""
    events: list[str] = []

    def happens(name: str) -> None:
        if len(events) == at:
            os._exit(KILLED)
        events.append(name)

    def heard(name: str, arguments: tuple[object, ...]) -> None:
        if name in CHANGES and str(root) in str(arguments[:2]):
            happens(f"{name} {arguments[0]!s}")

    sys.addaudithook(heard)
    host = upgraded.Host(root, happens)
    host.faults |= {fault} - {""}
    try:
        attempt(host)
    except errors.BangerError:
        if not fault:
            raise
    finally:
        counted.write_text("\n".join(events))
    return 0
