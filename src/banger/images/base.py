# SPDX-License-Identifier: MIT
"""The root file system that mmdebstrap makes of packages, as a tar.

The packages come from the distribution's signed archive. mmdebstrap runs as whoever we are: as root, or
else with fakechroot, which needs neither privileges nor user namespaces. What it runs are the packages' own
scripts: where banger is installed only the builder calls `make`, and the daemon asks the builder.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

from banger import run
from banger.contract import building, errors, sizes

DEADLINE_S: Final = 1800.0
_LEAST_ROOM_BYTES: Final = 256 << 20
"""The archive's lists take a third of it, whatever the recipe."""
# fakeroot tries the real chown first; in a user namespace (PrivateUsers=) that fails as it does not expect.
_FAKEROOT: Final = {"FAKEROOTDONTTRYCHOWN": "1"}

Mode = Literal["root", "fakechroot"]
OnLine = Callable[[str], None]
Make = Callable[[building.Base, Path, OnLine | None], None]
"""Makes that tar there, and says how far it is."""


def make(wanted: building.Base, target: Path, on_line: OnLine | None) -> None:
    """A `Make` in this process. It works where the target lies, and nothing that works there stays running.

    Raises MissingToolError, NoSpaceError, DeadlineError, or OperationFailedError with what mmdebstrap said.
    """
    from banger import debian, workers

    require_room(target.parent)
    _require_programs()
    logins = target.with_name("auth.conf")
    sources = debian.without_logins(debian.sources(wanted.suite, mirror=wanted.mirror), logins)
    scratch = str(target.parent)
    try:
        run.run(
            [*_command(wanted), *_login(logins), wanted.suite, str(target), *sources],
            deadline_s=DEADLINE_S,
            env=run.environment(*debian.APT_ENVIRONMENT, TMPDIR=scratch, HOME=scratch, **_FAKEROOT),
            on_line=on_line,
        )
    finally:
        workers.end(target.parent)


def require_room(directory: Path) -> None:
    """Where a disk fills up while apt updates its lists, apt may say nothing and wait for ever."""
    free = shutil.disk_usage(directory).free
    if free < _LEAST_ROOM_BYTES:
        raise errors.NoSpaceError(
            f"to build an image takes {_LEAST_ROOM_BYTES >> 20} MiB at the least, and {directory} has "
            f"{sizes.text_of_bytes(free)} left",
            hint="free some space; `banger image cache prune` removes what no pull needs",
        )


def mode() -> Mode:
    """How this process can make a root file system; fakechroot needs no privilege at all."""
    return "root" if os.geteuid() == 0 else "fakechroot"


def _require_programs() -> None:
    """Raises MissingToolError that names all that is missing: each is in a package of its own name."""
    needed = ("mmdebstrap", "fakechroot", "fakeroot") if mode() == "fakechroot" else ("mmdebstrap",)
    missing = [tool for tool in needed if not _has(tool)]
    if missing:
        raise errors.MissingToolError(
            f"to build an image takes what this host does not have: {', '.join(missing)}",
            hint=f"`sudo apt install {' '.join(missing)}`",
            tool=missing[0],
        )


def _command(wanted: building.Base) -> list[str]:
    from banger import debian

    paths = [f"--dpkgopt=path-exclude={path}" for path in wanted.exclude_paths]
    paths += [f"--dpkgopt=path-include={path}" for path in wanted.include_paths]
    how = mode()
    program = ["mmdebstrap", f"--mode={how}"]
    if how == "fakechroot" and wanted.variant == "extract":
        # Nothing of such a system runs while it is made, and fakechroot would run its tar, which it lacks.
        program = ["fakeroot", "mmdebstrap", "--mode=chrootless"]
    return [
        *program,
        f"--variant={wanted.variant}",
        f"--architectures={debian.ARCHITECTURES[wanted.arch]}",
        "--format=tar",
        f"--include={','.join(wanted.packages)}",
        *paths,
    ]


def _login(logins: Path) -> list[str]:
    """Has apt read that file where it is: in the image it would have to be taken away again."""
    if not logins.exists():
        return []
    said = f'Dir::Etc::netrc "{logins}";'
    return [f"""--setup-hook=echo {shlex.quote(said)} >> "$MMDEBSTRAP_APT_CONFIG\""""]


def _has(tool: str) -> bool:
    try:
        run.require(tool)
    except errors.MissingToolError:
        return False
    return True
