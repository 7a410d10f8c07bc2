# SPDX-License-Identifier: MIT
"""A virtual environment from verified wheels, without pip: no index, no build, nothing of theirs is run.

The wheels banger needs are plain: files for `site-packages`, and for banger itself the commands. What is
loaded at start is compiled now, since nobody but root can write there later.
"""

from __future__ import annotations

import configparser
import filecmp
import importlib.util
import os
import platform
import shlex
import shutil
import stat
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Final

from banger import run
from banger.contract import errors

_MAKE_S: Final = 120.0
_COMPILE_S: Final = 600.0
_LOAD: Final = "import banger.cli.main, banger.owner.composition, banger.helper.main"
_COMMAND: Final = """\
#!{python} -I
import sys
from {module} import {function}
sys.exit({function}())
"""


def chosen(names: Iterable[str], minor: int = sys.version_info.minor) -> list[str]:
    """Of each distribution the first wheel that this Python and this machine can use.

    Raises BadRequestError when a distribution has none.
    """
    found: dict[str, str] = {}
    for name in names:
        distribution = name.split("-")[0].lower()
        if not found.get(distribution):
            found[distribution] = name if _fits(name, minor) else ""
    lacking = [distribution for distribution, name in found.items() if not name]
    if lacking:
        raise errors.BadRequestError(
            f"this release has no {', '.join(lacking)} for Python 3.{minor} on {platform.machine()}",
            hint="fetch the release for this machine",
        )
    return list(found.values())


def _fits(name: str, minor: int) -> bool:
    python, abi, machine = name.removesuffix(".whl").split("-")[-3:]
    pythons = {"py3", f"py3{minor}", f"cp3{minor}"}
    if abi == "abi3":
        pythons |= {f"cp3{older}" for older in range(2, minor)}
    machines = [tag for tag in machine.split(".") if "linux" in tag and "musl" not in tag]
    fitting = machine == "any" or any(tag.endswith(f"_{platform.machine()}") for tag in machines)
    return fitting and not pythons.isdisjoint(python.split("."))


def make(prefix: Path, wheels: Iterable[Path], python: Path, like: Path | None = None) -> None:
    """At `prefix`, which must not be there, from the interpreter that `python` is of, which is ours.

    What is the same in `like`, another environment of root's, is not compiled again.
    """
    run.run([str(python), "-I", "-m", "venv", "--without-pip", str(prefix)], deadline_s=_MAKE_S)
    site = packages(prefix)
    for wheel in wheels:
        _unpack(wheel, site)
    own = str(prefix / "bin/python")
    for entry in site.glob("banger-*.dist-info/entry_points.txt"):
        _write_commands(entry.read_text(), prefix / "bin", own)
    if like is not None:
        _take_compiled(packages(like), site)
    # Only what is loaded: of what the rest holds, most is never used, and compiling it takes a minute.
    run.run([own, "-I", "-m", "compileall", "-q", "-j0", str(site / "banger")], deadline_s=_COMPILE_S)
    run.run([own, "-I", "-c", _LOAD], deadline_s=_COMPILE_S)


def require_readable(prefix: Path) -> None:
    """Raises BadRequestError for the first thing that root alone could read: the daemon, builds and every
    user run what is in `prefix`.
    """
    for above in reversed(prefix.parents):
        if not above.stat().st_mode & stat.S_IXOTH:
            raise errors.BadRequestError(
                f"others than root cannot reach {prefix}: {above} is closed to them",
                hint=f"sudo chmod go+x {shlex.quote(str(above))}, or install banger into another place",
            )
    for directory, subdirectories, files in os.walk(prefix):
        for path in (directory, *(os.path.join(directory, name) for name in files)):
            if _is_closed(os.lstat(path).st_mode):
                raise errors.BadRequestError(
                    f"others than root cannot read {path}, and banger's daemon does not run as root",
                    hint="what is made under a umask such as 077 is so: "
                    f"sudo chmod -R go+rX {shlex.quote(str(prefix))}",
                )
        subdirectories.sort()


def _is_closed(mode: int) -> bool:
    """To others; who may not execute a file that its owner executes cannot use it either."""
    wanted = stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0)
    return not stat.S_ISLNK(mode) and mode & wanted != wanted


def packages(prefix: Path) -> Path:
    """Its `site-packages`."""
    found = sorted(prefix.glob("lib/python3*/site-packages"))
    if len(found) != 1:
        raise errors.OperationFailedError(f"{prefix} is no virtual environment")
    return found[0]


def version(prefix: Path) -> str:
    """Of the banger in it, found without running anything; empty when it has none."""
    found = sorted(prefix.glob("lib/python3*/site-packages/banger-*.dist-info"))
    return found[-1].name.removesuffix(".dist-info").removeprefix("banger-") if found else ""


def _take_compiled(old: Path, new: Path) -> None:
    """Python believes what was compiled by the time and size of its source."""
    for compiled in old.glob("**/__pycache__/*.pyc"):
        try:
            source = Path(importlib.util.source_from_cache(str(compiled)))
            target = new / source.relative_to(old)
            if not filecmp.cmp(source, target, shallow=False):
                continue
        except (ValueError, FileNotFoundError):
            continue
        found = source.stat()
        os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))
        place = target.parent / compiled.parent.name
        place.mkdir(exist_ok=True)
        shutil.copyfile(compiled, place / compiled.name)


def _unpack(wheel: Path, site: Path) -> None:
    """Thousands of files: each directory is made once."""
    made: set[PurePosixPath] = set()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                path = _checked(member, wheel.name)
                directory = path if member.is_dir() else path.parent
                if directory not in made:
                    (site / directory).mkdir(parents=True, exist_ok=True)
                    made.add(directory)
                if not member.is_dir():
                    executable = bool(member.external_attr >> 16 & 0o100)
                    _write(os.path.join(site, path), archive.read(member), 0o755 if executable else 0o644)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise errors.BadRequestError(f"{wheel.name} cannot be unpacked: {error}") from error


def _checked(member: zipfile.ZipInfo, wheel: str) -> PurePosixPath:
    """A plain file of a package, below the directory it is unpacked into."""
    path, kind = PurePosixPath(member.filename), stat.S_IFMT(member.external_attr >> 16)
    odd = path.is_absolute() or ".." in path.parts or "\\" in member.filename
    if odd or path.parts[0].endswith(".data") or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise errors.BadRequestError(f"{wheel} holds {member.filename!r}, no plain file of a package")
    return path


def _write(path: str, data: bytes, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, mode), "wb") as file:
        file.write(data)


def _write_commands(entry_points: str, directory: Path, python: str) -> None:
    found = configparser.ConfigParser(delimiters=("=",))
    found.read_string(entry_points)
    for name, target in found.items("console_scripts"):
        module, _, function = target.partition(":")
        path = directory / name
        path.write_text(_COMMAND.format(python=python, module=module, function=function))
        path.chmod(0o755)
