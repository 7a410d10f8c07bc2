# SPDX-License-Identifier: MIT
"""Is what root executes, imports and believes root's alone? Asked by install, upgrade and doctor.

Each path is followed as the kernel follows it: every name on the way is looked at, those of links' targets
too, for whoever may rename one of them decides what root finds. Within a tree everything is looked at, and a
link may lead out of it to a file only. An access list that lets others write shows in the group's bits.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from banger import run
from banger.contract import errors
from banger.system import host

PROGRAMS: Final = (
    "choom",
    "debugfs",
    "e2fsck",
    "ip6tables-legacy",
    "iptables-legacy",
    "prlimit",
    "resize2fs",
    "resolvectl",
    "setpriv",
    "sh",
    "sleep",
)
"""Of the host, that the helper or a unit of root's starts: a test compares them with the helper's code."""
SEARCHED: Final = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")
"""Where the helper looks for them, in this order."""
_LOADER: Final = ("/etc/ld.so.preload", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d")
_MOST_LINKS: Final = 40
_LOADING_S: Final = 60.0
_VERSION: Final = re.compile(r"^version(?:_info)? *= *(\d+\.\d+)", re.MULTILINE)
_HOME: Final = re.compile(r"^home *= *(/.+?) *$", re.MULTILINE)
_LOADED: Final = """
import ctypes, importlib, json
importlib.import_module("banger.helper.main")
try:
    ctypes.CDLL("libnftables.so.1")
except OSError:
    pass
with open("/proc/self/maps") as maps:
    names = {line.split(None, 5)[5].rstrip("\\n") for line in maps if line.count("/")}
print(json.dumps(sorted(names)))
"""
Complaint = tuple[Path, str]


@dataclass(slots=True)
class Eye:
    """Looks at one host, which begins at `below` in a test; remembers what it found well."""

    below: Path = Path("/")
    root_uid: int = 0
    _well: set[Path] = field(default_factory=set)

    def complaints(self, tops: Iterable[Path]) -> Iterator[Complaint]:
        """What others than root could change, and why: all on the way to each path, and all that is in it.

        Raises FileNotFoundError when one of the paths is not there.
        """
        for top in tops:
            yield from self._on_the_way(top)
            real = self.resolve(top)
            if stat.S_ISDIR(real.lstat().st_mode):
                yield from self._inside(real)

    def searched(self, directories: Iterable[Path]) -> Iterator[Complaint]:
        """Who else could put something into a directory in which root looks for programs."""
        for directory in directories:
            yield from self._on_the_way(directory)
            if why := self._why(self.resolve(directory), passed=False):
                yield directory, why

    def resolve(self, path: Path) -> Path:
        """Where a path leads on this host."""
        *_, last = self._way(path)
        return last

    def _on_the_way(self, path: Path) -> Iterator[Complaint]:
        for each in (self.below, *self._way(path)):
            if each not in self._well:
                if why := self._why(each, passed=True):
                    yield each, why
                else:
                    self._well.add(each)

    def _inside(self, top: Path) -> Iterator[Complaint]:
        """Thousands of files: nothing is made of those that are well."""
        if why := self._why(top, passed=False):
            yield top, why
        waiting = [str(top)]
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISLNK(found.st_mode):
                        yield from self._link(Path(entry.path), top)
                    elif why := self._fault(found, passed=False):
                        yield Path(entry.path), why
                    if stat.S_ISDIR(found.st_mode):
                        waiting.append(entry.path)

    def _link(self, link: Path, top: Path) -> Iterator[Complaint]:
        try:
            target = self.resolve(link)
        except FileNotFoundError as error:
            # Whoever can make what it leads to decides what it is.
            parent = Path(error.filename).parent
            if why := self._why(parent, passed=False):
                yield link, f"is a link that leads nowhere, in {parent}, which {why}"
            return
        except OSError as error:
            yield link, f"is a link that leads nowhere: {error.strerror}"
            return
        if not target.is_relative_to(top) and not stat.S_ISREG(target.lstat().st_mode):
            yield link, f"is a link out of {top}, to {target}"
        yield from self._on_the_way(link)

    def _way(self, path: Path) -> Iterator[Path]:
        """Every name that the kernel looks up on the way to a path; the last is what it is."""
        at, links = self.below, 0
        rest = list(reversed(path.relative_to(self.below).parts))
        while rest:
            part = rest.pop()
            if part == "..":
                at = at.parent if at != self.below else at
                continue
            at = at / part
            yield at
            if stat.S_ISLNK(at.lstat().st_mode):
                links += 1
                if links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
                target = at.readlink()
                at = self.below if target.is_absolute() else at.parent
                rest.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
        if at == self.below:
            yield at

    def _why(self, path: Path, *, passed: bool) -> str:
        return self._fault(path.lstat(), passed=passed)

    def _fault(self, found: os.stat_result, *, passed: bool) -> str:
        """Why others could change this one name, a link itself and not its target; empty if not.

        In a sticky directory that is only passed, nobody can replace what belongs to root; but whoever can
        write into one that is searched adds to it.
        """
        if found.st_uid != self.root_uid:
            return "does not belong to root"
        if stat.S_ISLNK(found.st_mode):
            return ""
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            return "is neither a file nor a directory"
        if passed and stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX:
            return ""
        return "can be written by others than root" if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else ""


def interpreter(prefix: Path, below: Path = Path("/")) -> list[Path]:
    """What runs the code of a virtual environment: the program, its standard library, what it loads.

    Runs that program as whoever asks, so the environment must have been found well before. Raises
    BangerError when it is none, or does not run.
    """
    python = prefix / "bin/python"
    config = (prefix / "pyvenv.cfg").read_text()
    home, version = _HOME.search(config), _VERSION.search(config)
    if home is None or version is None:
        raise errors.OperationFailedError(f"{prefix / 'pyvenv.cfg'} does not say whose python it is")
    libraries = _at(below, home[1]).parent / "lib" / f"python{version[1]}"
    said = run.run([str(python), "-I", "-B", "-c", _LOADED], deadline_s=_LOADING_S).text
    mapped = [_at(below, name) for name in json.loads(said) if name.startswith("/")]
    loader = [path for path in (_at(below, name) for name in _LOADER) if path.exists()]
    return [python, libraries, *mapped, *loader]


def directories(below: Path = Path("/")) -> list[Path]:
    """Where programs are looked for."""
    return [path for path in (_at(below, name) for name in SEARCHED) if path.is_dir()]


def programs(below: Path = Path("/")) -> list[Path]:
    """Those that are here, each where it is found first."""
    found = []
    for name in PROGRAMS:
        there = (directory / name for directory in directories(below))
        found += [path for path in there if path.exists()][:1]
    return found


def _at(below: Path, path: str) -> Path:
    return below / path.lstrip("/")


def require(prefix: Path, others: Iterable[Path] = ()) -> None:
    """Raises BadRequestError for the first thing of root's that others could change.

    Of the code in `prefix`, of what runs it, of the host's programs, and of `others`.
    """
    eye = Eye()
    _refuse(eye.complaints([prefix]), f"install banger into a root-owned place, such as {host.PREFIX}")
    own = "give it to root alone: see `banger doctor`"
    _refuse(eye.complaints([*interpreter(prefix), *programs(), *others]), own)
    _refuse(eye.searched(directories()), own)


def _refuse(complaints: Iterable[Complaint], hint: str) -> None:
    for path, why in complaints:
        raise errors.BadRequestError(f"{path} {why}, and root would execute what is in it", hint=hint)
