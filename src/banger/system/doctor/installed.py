# SPDX-License-Identifier: MIT
"""Probes of what an installation put in place: settings, runtime files, units, owners and modes."""

from __future__ import annotations

import itertools
import pwd
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from banger.contract import errors, names
from banger.system import host, ownership, releases, runtime
from banger.system import settings as installation
from banger.system.doctor import report
from banger.system.doctor import scene as scenes

_AGAIN: Final = "sudo banger system install"
_UNIT_DIRS: Final = (Path("/etc/systemd/system"), Path("/run/systemd/system"), host.UNIT_DIR)
"""Where systemd looks, the first first; ours are in the last."""
_SHOWN: Final = 3
_MOST: Final = 100


def settings(scene: scenes.Scene) -> report.Finding:
    """install.toml is there, and its owner is a user of this host."""
    try:
        found = installation.read(scene.at(host.INSTALL_TOML))
    except errors.BadRequestError as error:
        return report.failed(error.message, installation.MEND)
    if found is None:
        return report.failed("banger is not installed on this host", _AGAIN)
    try:
        account = pwd.getpwuid(found.owner_uid)
    except KeyError:
        return report.failed(
            f"its owner, uid {found.owner_uid}, is no user of this host", f"{_AGAIN} --owner USER"
        )
    if account.pw_name != found.owner_name:
        return report.failed(
            f"uid {found.owner_uid} is {account.pw_name} now, and was {found.owner_name} at installation",
            f"{_AGAIN} --owner USER",
        )
    return report.passed(f"for {found.owner_name}, from {scene.prefix()}")


def uids(scene: scenes.Scene) -> report.Finding:
    """The uids of VMs and those of builds belong to nobody else, and not to each other."""
    given = scene.settings()
    vms = range(given.uid_base + 1, given.uid_base + given.uid_count + 1)
    whose = {"VMs": vms, "builds": names.BUILD_UIDS}
    said = " and ".join(f"{own.start} to {own.stop - 1} ({who})" for who, own in whose.items())
    if _meet(vms, names.BUILD_UIDS):
        return report.failed(
            f"VMs have uids of builds, {said}: no image is built",
            f"when no VM runs, take uid_base out of {host.INSTALL_TOML}, and restart banger",
        )
    taken = list(dict.fromkeys(each for own in whose.values() for each in _taken(scene, own)))
    if taken:
        return report.failed(
            f"banger has the uids {said}, and so has {_some(taken)}",
            "give these other ids: usermod, groupmod, /etc/subuid, /etc/subgid",
        )
    return report.passed(f"{said} belong to them alone")


def _meet(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


def _taken(scene: scenes.Scene, own: range) -> Iterator[str]:
    yield from (f"user {name}" for name, uid in _accounts(scene, "/etc/passwd") if uid in own)
    yield from (f"group {name}" for name, gid in _accounts(scene, "/etc/group") if gid in own)
    yield from (f"{name} in {path}" for path, name in _subordinates(scene, own))


def _accounts(scene: scenes.Scene, path: str) -> Iterator[tuple[str, int]]:
    for line in (scene.text_or_none(path) or "").splitlines():
        fields = line.split(":")
        if len(fields) > 2 and fields[2].isdecimal():
            yield fields[0], int(fields[2])


def _subordinates(scene: scenes.Scene, own: range) -> Iterator[tuple[str, str]]:
    for path in ("/etc/subuid", "/etc/subgid"):
        for line in (scene.text_or_none(path) or "").splitlines():
            name, start, count = (*line.split(":"), "", "")[:3]
            if start.isdecimal() and count.isdecimal():
                theirs = range(int(start), int(start) + int(count))
                if _meet(theirs, own):
                    yield path, name


@dataclass(frozen=True, slots=True)
class RuntimeFile:
    """Firecracker or its jailer: there, root's alone, what was recorded, new enough."""

    name: str

    def __call__(self, scene: scenes.Scene) -> report.Finding:
        given = scene.settings()
        directory = scene.at(f"{given.helper_dir}/runtime")
        path = directory / self.name
        if not path.exists():
            return report.failed(f"{scene.shown(path)} is not installed", _AGAIN)
        # Before it is run: whoever else could write it would run as the user who asks.
        if unsafe := list(_shown(scene, _eye(scene).complaints([path]))):
            return _unsafe(unsafe)
        found = next(each for each in runtime.status(directory) if each.name == self.name)
        recorded = given.firecracker_sha256 if self.name == "firecracker" else given.jailer_sha256
        if found.sha256 != recorded:
            return report.failed(
                f"{scene.shown(path)} is not what the installation recorded: its sha256 is {found.sha256}",
                _AGAIN,
            )
        if found.problem:
            return report.failed(found.problem, _AGAIN)
        other = runtime.read_record(directory).get("firecracker")
        if other is not None and other.version != found.version:
            return report.warned(f"{found.version}, and Firecracker is {other.version}", _AGAIN)
        own = "" if found.source == "catalog" else ", a file that was supplied"
        return report.passed(f"{found.version}{own}")


@dataclass(frozen=True, slots=True)
class RootOwned:
    """Files that root executes, imports or believes: root's alone, down from the root directory."""

    what: str

    def __call__(self, scene: scenes.Scene) -> report.Finding:
        scene.settings()
        tops = [path for path in self._tops(scene) if path.exists() or path.is_symlink()]
        if not tops:
            return report.failed(f"none of root's {self.what} is there", _AGAIN)
        complaints = self._complaints(scene, tops)
        found = list(dict.fromkeys(itertools.islice(_shown(scene, complaints), _MOST)))
        if not found:
            return report.passed(", ".join(sorted({scene.shown(path) for path in tops})[:_SHOWN]))
        return _unsafe(found)

    def _tops(self, scene: scenes.Scene) -> list[Path]:
        match self.what:
            case "code":
                return [scene.at(scene.prefix()), scene.at(host.RELEASES / releases.CURRENT)]
            case "interpreter":
                return _interpreter(scene)
            case "programs":
                return ownership.programs(scene.root)
            case "settings":
                return [scene.at(host.ETC), scene.at(host.MODULES)]
            case "runtime":
                return [scene.at(host.RUNTIME)]
            case _:
                units = [directory / name for directory in _UNIT_DIRS for name in host.UNITS]
                return [*map(scene.at, units), *_drop_ins(scene)]

    def _complaints(self, scene: scenes.Scene, tops: list[Path]) -> Iterator[ownership.Complaint]:
        eye = _eye(scene)
        yield from eye.complaints(tops)
        if self.what == "programs":
            yield from eye.searched(ownership.directories(scene.root))


def _interpreter(scene: scenes.Scene) -> list[Path]:
    """Asked by running it, and so only when it is root's alone, or the code would run as whoever asks."""
    prefix = scene.at(scene.prefix())
    if any(_eye(scene).complaints([prefix])):
        raise scenes.UnseenError("it would run code that others could change", "see the row root's code")
    return ownership.interpreter(prefix, scene.root)


def _eye(scene: scenes.Scene) -> ownership.Eye:
    return ownership.Eye(scene.root, scene.viewer.root_uid)


def _shown(scene: scenes.Scene, complaints: Iterable[ownership.Complaint]) -> Iterator[tuple[str, str]]:
    for path, why in complaints:
        yield scene.shown(path), why


def _unsafe(found: list[tuple[str, str]]) -> report.Finding:
    """The remedy is for the first; the next run names the next one."""
    path = shlex.quote(found[0][0])
    remedy = f"sudo chown -h root:root {path} && sudo chmod go-w {path}"
    return report.failed(_some([f"{each} {why}" for each, why in found]), remedy)


def commands(scene: scenes.Scene) -> report.Finding:
    """`banger` and `bangerd` in the search path are those installed, and root alone can change that."""
    scene.settings()
    for name in host.COMMANDS:
        link, target = scene.at(host.BIN / name), scene.prefix() / "bin" / name
        if not _leads(scene, link, scene.at(target)):
            return report.failed(
                f"{scene.shown(link)} does not lead to {target}", f"move away what is there, then {_AGAIN}"
            )
        if unsafe := list(_shown(scene, _eye(scene).complaints([link]))):
            return _unsafe(unsafe)
    return report.passed(", ".join(str(host.BIN / name) for name in host.COMMANDS))


def _leads(scene: scenes.Scene, link: Path, target: Path) -> bool:
    try:
        return link.is_symlink() and _eye(scene).resolve(link) == _eye(scene).resolve(target)
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Private:
    """A directory of the owner's (or root's) with the mode that it was made with."""

    path: str
    mode: int
    by_owner: bool = True

    def __call__(self, scene: scenes.Scene) -> report.Finding:
        given = scene.settings()
        uid = given.owner_uid if self.by_owner else scene.viewer.root_uid
        name = given.owner_name if self.by_owner else "root"
        return owned(scene, self.path, uid=uid, name=name, mode=self.mode)


def owned(
    scene: scenes.Scene, path: str, *, uid: int, name: str, mode: int, remedy: str = ""
) -> report.Finding:
    """This path belongs to this user and has just this mode: with less, who needs it cannot use it."""
    try:
        found = scene.at(path).stat()
    except FileNotFoundError:
        return report.failed(f"{path} does not exist", remedy or _AGAIN)
    if found.st_uid != uid:
        return report.failed(
            f"{path} belongs to uid {found.st_uid}, not to {name}", remedy or f"sudo chown {name} {path}"
        )
    if found.st_mode & 0o7777 != mode:
        return report.failed(
            f"{path} has mode {found.st_mode & 0o7777:04o}, not {mode:04o}",
            remedy or f"sudo chmod {mode:o} {path}",
        )
    return report.passed(f"{path}, {mode:04o}, of {name}")


def units(scene: scenes.Scene) -> report.Finding:
    """The installed units are the shipped ones, and nothing was put beside them."""
    given = scene.settings()
    changed: list[str] = []
    for name in host.UNITS:
        text = scene.text_or_none(host.UNIT_DIR / name)
        if text is None:
            return report.failed(f"{host.UNIT_DIR / name} does not exist", _AGAIN)
        if text != host.unit_text(host.unit_sources() / name, given.owner_name, scene.prefix()).rstrip("\n"):
            changed.append(str(host.UNIT_DIR / name))
    if changed:
        return report.failed(f"not as this version ships it: {_some(changed)}", _AGAIN)
    instead = [
        scene.shown(path)
        for directory in _UNIT_DIRS[:2]
        for path in (scene.at(directory) / name for name in host.UNITS)
        if path.exists() and not _leads(scene, path, scene.at(host.UNIT_DIR / path.name))
    ]
    if instead:
        return report.failed(f"instead of ours systemd reads {_some(instead)}", f"delete it, then {_AGAIN}")
    dropped = sorted(map(scene.shown, _drop_ins(scene)))
    if dropped:
        return report.warned(
            f"changed by {_some(dropped)}",
            "if that is not meant: delete the file, sudo systemctl daemon-reload",
        )
    return report.passed(f"{len(host.UNITS)} units as shipped")


def _drop_ins(scene: scenes.Scene) -> list[Path]:
    return [
        path
        for directory in _UNIT_DIRS
        for name in (*host.UNITS, host.SLICE)
        for path in scene.at(directory).glob(f"{name}.d/*.conf")
    ]


def _some(texts: list[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return f"{', '.join(texts[:_SHOWN])}{more}"
