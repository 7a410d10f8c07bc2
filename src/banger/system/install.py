# SPDX-License-Identifier: MIT
"""`banger system install`: a pipeline like any other; a failure takes back what was made."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

import banger
from banger import pinned, run, steps
from banger.contract import errors, privileged, sizes
from banger.net import addresses
from banger.system import (
    alone,
    asking,
    choices,
    config_file,
    environment,
    host,
    machine,
    manifest,
    own_units,
    ownership,
    releases,
    runtime,
    settings,
    versions,
)

PROGRAMS: Final = ("firecracker", "jailer")
MODULES: Final = ("loop", "dm_snapshot", "tun", "bridge", "kvm")
_BEFORE: Final = ".before"
_CHECK_S: Final = 60.0
_TOO_NEW: Final = 2
"""What `bangerd --check-migrations` says of rows of a newer program."""
_SIGNERS: Final = """\
# Who may sign releases for `banger system upgrade`, as ssh-keygen(1) says under ALLOWED SIGNERS:
# NAME namespaces="banger-release" ssh-ed25519 KEY
"""


class Install:
    """One installation. `plan` is data; what each step made is remembered for its undo and the manifest."""

    def __init__(self, chosen: choices.Choices, say: Callable[[str], None]) -> None:
        self._settled = settings.read()
        self._kept = None if self._settled is not None else settings.read(host.KEPT_TOML)
        self._choices = choices.completed(chosen, self._settled or self._kept)
        self._say = say
        self._owner: pwd.struct_passwd | None = None
        self._files: list[Path] = []
        self._replaced: dict[Path, str] = {}
        self._aside: list[Path] = []
        self._has_old_bridge = False
        self._held = contextlib.ExitStack()
        self._stays = False
        """The rows could not go back: this version stays, since the old one cannot read them."""
        self._directories: list[Path] = []
        self._shared: list[Path] = []
        self._before = manifest.read()
        self._releases = releases.Releases()
        self._old = self._releases.installed()
        self._older = self._releases.previous()

    def plan(self) -> list[steps.Step]:
        step = steps.Step
        return [
            step("check", self._check, detail="checking this host"),
            step("own", self._check_own, detail="looking at the code that root would execute"),
            step("directories", self._make_directories, self._take_back, detail="making directories"),
            step(
                "runtime",
                self._install_runtime,
                self._put_back,
                detail="installing Firecracker and its jailer",
            ),
            step("settings", self._write_settings, detail="writing /etc/banger"),
            step("signers", self._write_signers, detail="writing who may sign releases"),
            step("modules", self._load_modules, detail="loading kernel modules"),
            step("units", self._write_units, detail="writing the units"),
            step("links", self._link, self._unlink, detail="linking commands and units"),
            step("back", self._nothing, self._start_old, detail="looking what was installed before"),
            step("switch", self._switch, self._switch_back, detail="making this version the installed one"),
            step("trust", self._check_all, detail="looking at all that root executes"),
            step("manifest", self._write_manifest, detail="recording what was made"),
            step("services", self._start, self._stop, detail="starting the services"),
            step("answer", self._answer, detail="waiting until both answer"),
        ]

    async def run(self) -> str:
        """For whom it is installed."""
        os.umask(0o022)
        with self._held, alone.cancelled_by_signals():
            await self._drive()
        return self._choices.owner

    async def _drive(self) -> None:
        try:
            await steps.run(self.plan(), machine.Said(self._say))
        except BaseException as error:
            if self._stays:
                error.add_note(f"banger {banger.__version__} stays installed: its rows cannot go back")
            raise

    async def _check(self) -> None:
        self._owner = host.check(self._choices.owner)
        await run.in_thread(environment.require_readable, Path(sys.prefix))  # before the owner runs it
        if self._old is not None:
            versions.refuse_older(banger.__version__, environment.version(self._old) or banger.__version__)
        _refuse_newer_rows(self._owner)
        network = choices.parse_network(self._choices.network)
        network6 = choices.parse_network6(self._choices.network6)
        choices.refuse_small(network, self._settled or self._kept)
        addresses.check(network, [*addresses.routes(), *addresses.policy_routes()])
        addresses.check6(network6, addresses.routes6())
        self._check_stays(str(network), str(network6))

    def _check_stays(self, network: str, network6: str) -> None:
        """Raises ConflictError for a change that what is there would not survive."""
        old = self._settled or self._kept
        if old is None:
            return
        now = old.owner_now()
        if now and self._choices.owner not in (now, old.owner_name):
            raise errors.ConflictError(
                f"banger is installed for {now}, whose VMs and images are here",
                hint=f"go on with --owner {now}, or first: sudo banger system uninstall --purge",
            )
        if self._settled is not None and (network, network6) != (old.network, old.network6):
            world = asking.required(privileged.ListWorld())
            self._has_old_bridge = world.bridge
            running = [vm for vm in world.vms if vm.vmm_pid]
            if running:
                raise errors.ConflictError(
                    f"{old.network} and {old.network6} are in use, by {sizes.counted(len(running), 'VM')}",
                    hint="stop them first: banger vm stop NAME",
                )

    async def _check_own(self) -> None:
        await run.in_thread(ownership.require, Path(sys.prefix))

    async def _make_directories(self) -> None:
        owner = self._found_owner()
        self._directory(host.HELPER, 0, 0o711)
        try:
            self._held.enter_context(alone.on_host(host.HELPER))
        except errors.ConflictError:
            self._directories.clear()  # another's by now, whoever made it
            raise
        self._directory(host.ETC, 0, 0o755)
        self._directory(host.RUNTIME, 0, 0o755)
        self._directory(host.RELEASES, 0, 0o755)
        self._directory(host.STATE, owner.pw_uid, 0o700)
        self._directory(host.CACHE, owner.pw_uid, 0o700)

    async def _install_runtime(self) -> None:
        pins = {file.name: file.sha256 for file in runtime.catalog()}
        own = self._choices.programs
        before = set(host.RUNTIME.iterdir())
        self._aside = [_set_aside(path) for path in before if path.name in (*PROGRAMS, runtime.RECORD)]
        verified = {n: p for n, p in own.items() if pinned.sha256_of_path(p) == pins.get(n)}
        user = {n: p for n, p in own.items() if n not in verified}
        kept = set() if self._choices.pinned else runtime.own_files(host.RUNTIME, but=own)
        if set(own) | kept < set(PROGRAMS):
            here = [host.RUNTIME] if before else []
            fetched = await run.in_thread(
                runtime.pull, host.HELPER / "downloads", local_dirs=here, on_line=self._say
            )
            new = {name: file.path for name, file in fetched.items() if name not in {*user, *kept}}
            verified = new | verified
        await run.in_thread(runtime.install_runtime, host.RUNTIME, verified, user_files=user)
        shutil.rmtree(host.HELPER / "downloads", ignore_errors=True)
        there = {*before, *self._aside}
        self._files += [path for path in host.RUNTIME.iterdir() if path.is_file() and path not in there]

    async def _write_settings(self) -> None:
        if self._has_old_bridge:
            asking.required(privileged.DeleteBridge())  # the next VM has it made, with the new addresses
        owner = self._found_owner()
        installed = runtime.read_record(host.RUNTIME)
        decided: dict[str, str | int] = {
            "owner_uid": owner.pw_uid,
            "owner_gid": owner.pw_gid,
            "owner_name": owner.pw_name,
            "network": self._choices.network,
            "network6": str(choices.parse_network6(self._choices.network6)),
            "state_dir": str(host.STATE),
            "helper_dir": str(host.HELPER),
            "firecracker_sha256": installed["firecracker"].sha256,
            "jailer_sha256": installed["jailer"].sha256,
        }
        # Besides, what root itself has written there: a bridge, other uids.
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in (settings.written() | decided).items()]
        self._write(host.INSTALL_TOML, "".join(lines))
        if not host.CONFIG_TOML.exists():
            self._write(host.CONFIG_TOML, config_file.text())

    async def _link(self) -> None:
        """All that leads into what is installed; it leads somewhere once `current` does."""
        for link, target in self._releases.links().items():
            if link.is_symlink() and link.readlink() == target:
                continue
            if link.exists() or link.is_symlink():
                raise errors.AlreadyExistsError(f"{link} is there and not ours", hint="move it away first")
            self._shared_directory(link.parent)
            self._releases.lead(link, target)
            self._files.append(link)

    async def _unlink(self) -> None:
        """Of a first installation, so that systemd knows nothing of it any more; others' go in the end."""
        if self._old is None:
            for link in self._releases.links().keys() & set(self._files):
                link.unlink(missing_ok=True)
            host.forget_units()

    async def _write_signers(self) -> None:
        """Who may sign releases. Once there it is changed by root's own hand, and by no upgrade."""
        given = self._choices.signers
        if given is not None:
            self._write(host.SIGNERS, given.read_text())
        elif not host.SIGNERS.exists():
            self._write(host.SIGNERS, _SIGNERS)

    async def _load_modules(self) -> None:
        self._write(host.MODULES, "\n".join(MODULES) + "\n")
        for name in MODULES:
            # A kernel with the feature built in has no module to load; doctor looks at the feature.
            with contextlib.suppress(errors.BangerError):
                run.run(["modprobe", "-q", name], deadline_s=30)

    async def _write_units(self) -> None:
        prefix = Path(sys.prefix)
        directory = prefix / host.OWN_UNITS
        if not directory.exists():
            self._directories.append(directory)
        self._releases.write_units(prefix, self._found_owner().pw_name, host.unit_sources())

    async def _switch(self) -> None:
        for pin in self._releases.pins():
            pin.unlink()
        self._releases.switch(Path(sys.prefix))
        if self._old is None:
            self._files.append(self._releases.top / releases.CURRENT)

    async def _switch_back(self) -> None:
        if self._old is not None and not self._stays:
            self._releases.switch_back(self._old, self._older)

    async def _write_manifest(self) -> None:
        files = {*self._before.files, *map(str, self._files)}
        directories = {*self._before.directories, *map(str, self._directories)}
        shared = {*self._before.shared, *map(str, self._shared)}
        made = manifest.Manifest(tuple(sorted(files)), tuple(sorted(directories)), tuple(sorted(shared)))
        _publish(manifest.PATH, msgspec.json.format(msgspec.json.encode(made)).decode() + "\n")

    async def _start(self) -> None:
        host.systemctl("daemon-reload")
        host.systemctl("start", "banger-vms.service", "bangerd-root.socket", "bangerd-build.socket")
        # A stopped helper starts with the next request, in its new version; VMs do not notice.
        host.systemctl("stop", "bangerd-root.service")
        host.systemctl("restart", "bangerd.service")
        host.systemctl("start", host.GUESTS)

    async def _stop(self) -> None:
        host.systemctl("stop", "bangerd.service", "bangerd-root.service")
        if self._old is None:
            host.systemctl("disable", "-q", "--now", *host.ENABLED)
            host.systemctl("stop", "banger-vms.service", host.SLICE)
        elif self._old != Path(sys.prefix):
            try:
                await run.in_thread(machine.Machine().bangerd, self._old, "--undo-migrations")
            except errors.BangerError:
                self._stays = True
                raise

    async def _answer(self) -> None:
        await machine.wait_answer(banger.__version__)
        # Of an upgrade that was cut off: a later one would take it for its own, and go back to old rows.
        (host.HELPER / machine.UPGRADING).unlink(missing_ok=True)
        with contextlib.suppress(errors.BangerError):  # what stays goes with the next installation
            await run.in_thread(machine.Machine().bangerd, Path(sys.prefix), "--settle-migrations")
        with contextlib.suppress(OSError, errors.BangerError):  # the same
            own_units.end_stale(self._releases, host.systemctl)
        for aside in self._aside:
            aside.unlink(missing_ok=True)
        host.KEPT_TOML.unlink(missing_ok=True)

    async def _nothing(self) -> None:
        """What is acquired here is the duty to start again what was."""

    async def _start_old(self) -> None:
        await self._put_back()
        if self._old is not None:
            await self._start()

    async def _check_all(self) -> None:
        units = [host.UNIT_DIR / name for name in host.UNITS]
        await run.in_thread(
            ownership.require, Path(sys.prefix), [*units, host.ETC, host.MODULES, host.RUNTIME]
        )

    def _found_owner(self) -> pwd.struct_passwd:
        assert self._owner is not None  # noqa: S101 - the first step finds it or ends the pipeline
        return self._owner

    def _directory(self, path: Path, uid: int, mode: int) -> None:
        if not path.is_dir():
            path.mkdir(mode=mode, exist_ok=True)
            self._directories.append(path)
        elif uid and path.stat().st_uid not in (0, uid):
            _hand_over(path, uid, self._found_owner().pw_gid)
        os.chown(path, uid, self._found_owner().pw_gid if uid else 0, follow_symlinks=False)
        path.chmod(mode)

    def _shared_directory(self, path: Path) -> None:
        """Of the host's, with all above it; what is made here is remembered."""
        missing = [each for each in (path, *path.parents) if not each.is_dir()]
        for each in reversed(missing):
            each.mkdir()
            each.chmod(0o755)
            self._shared.append(each)

    def _write(self, path: Path, text: str) -> None:
        existed = path.exists()
        if existed:
            self._replaced.setdefault(path, path.read_text())
        _publish(path, text)
        # What was there before stays ours only if an earlier installation's manifest says so.
        if not existed:
            self._files.append(path)

    async def _put_back(self) -> None:
        """Settings and programs go together: no VM starts with a program that they do not name."""
        for path, text in self._replaced.items():
            _publish(path, text)
        for aside in self._aside:
            with contextlib.suppress(FileNotFoundError):
                aside.rename(aside.with_suffix(""))

    async def _take_back(self) -> None:
        """What this run made; what an earlier installation made stays, or comes back."""
        await self._put_back()
        if self._stays:
            await self._write_manifest()
            return
        for path in self._files:
            path.unlink(missing_ok=True)
        for path in reversed(self._directories):
            shutil.rmtree(path, ignore_errors=True)
        manifest.remove_empty(self._shared)


def _hand_over(top: Path, uid: int, gid: int) -> None:
    """All in it that belongs to whose it is, through no link: who owned it is gone, or has another uid.

    What is looked at is what is given away: a process of that uid may go on, and put another file there.
    """
    before = top.stat().st_uid
    for _, directories, files, place in os.fwalk(top, topdown=False):
        for name in (*directories, *files):
            found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
            try:
                if os.fstat(found).st_uid == before:
                    os.chown(f"/proc/self/fd/{found}", uid, gid)
            finally:
                os.close(found)


def _set_aside(path: Path) -> Path:
    """Another name for what is there now; a new file of its name leaves that as it is."""
    aside = path.with_name(f"{path.name}{_BEFORE}")
    aside.unlink(missing_ok=True)
    aside.hardlink_to(path)
    return aside


def _publish(path: Path, text: str) -> None:
    staged = path.with_name(f".{path.name}.new")
    staged.write_text(text)
    staged.chmod(0o644)
    pinned.publish(staged, path)


def _refuse_newer_rows(owner: pwd.struct_passwd) -> None:
    """Raises ConflictError when a newer banger wrote this host's database: this one could not read it."""
    if not (host.STATE / "banger.db").exists():
        return
    asked = [str(Path(sys.prefix) / "bin/bangerd"), "--check-migrations", f"--state-dir={host.STATE}"]
    whose = host.STATE.stat().st_uid  # an owner's that is gone, until they are handed over
    argv = host.as_user(owner, asked) if whose in (0, owner.pw_uid) else host.as_uid(whose, asked)
    if run.run(argv, deadline_s=_CHECK_S, ok=(0, 1, 2)).status == _TOO_NEW:
        raise errors.ConflictError(
            f"the database in {host.STATE} was written by a newer banger than {banger.__version__}",
            hint="install that version or a newer one; or, where its installation failed: "
            f"sudo systemctl stop bangerd && sudo -u {owner.pw_name} bangerd --undo-migrations",
        )
