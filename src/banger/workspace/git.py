# SPDX-License-Identifier: MIT
"""git on the host, deaf to whatever a repository would have it run. Used by the user's own process.

A repository may come from anybody: its configuration names hooks, monitors, filters and transports. So work
is done in a scratch git directory with a configuration of ours, which only borrows the repository's objects
and index; the repository itself is only asked for what makes git run nothing (refs, paths, single keys).
"""

from __future__ import annotations

import contextlib
import copy
import os
import resource
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Final

from banger import run
from banger.contract import errors

DEADLINE_S: Final = 1800.0
"""For a program that reads a whole history, on a slow disk."""
MAX_MEMORY_BYTES: Final = 2 << 30
"""What git may take of its own for a stranger's objects, which unpack to whatever they say. Mapped files are
not in it. The largest that git packs as a difference, in a guest of ours too, are 512 MiB, two at a time."""
_DEAF: Final = (
    *("-c", "core.fsmonitor=false"),
    *("-c", "core.hooksPath=/dev/null"),
    *("-c", "core.untrackedCache=false"),
    *("-c", "core.alternateRefsCommand=true"),
    *("-c", "safe.directory=*"),
    *("-c", "gc.auto=0"),
    *("-c", "maintenance.auto=false"),
)
_ENVIRONMENT: Final = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_NO_LAZY_FETCH": "1",
    # Over every protocol.* key of the repository's: nothing is fetched, also not a missing object.
    "GIT_ALLOW_PROTOCOL": "",
    "GIT_LITERAL_PATHSPECS": "1",
    "GIT_PAGER": "cat",
}


class Git:
    """git with one set of `GIT_…` variables; everything it is given is an argument list."""

    def __init__(self, cwd: Path, variables: Mapping[str, str] | None = None, *options: str) -> None:
        self._cwd = cwd
        self._env = run.environment("HOME", "XDG_CONFIG_HOME", **{**_ENVIRONMENT, **(variables or {})})
        self._options = (*_DEAF, *options)
        self._limits: tuple[str, ...] = ()

    def held_to(self, file_bytes: int) -> Git:
        """The same for a stranger's objects: to MAX_MEMORY_BYTES, and to no larger files than this."""
        held = copy.copy(self)
        memory = _allowed(resource.RLIMIT_DATA, MAX_MEMORY_BYTES)
        file = _allowed(resource.RLIMIT_FSIZE, file_bytes)
        held._limits = ("prlimit", f"--data={memory}", f"--fsize={file}", "--core=0", "--")
        # Each thread has memory of its own: all of a large host's would not fit.
        held._options = (*self._options, "-c", "pack.threads=2", "-c", "pack.windowMemory=256m")
        return held

    def __call__(self, *arguments: str, stdin: bytes = b"", ok: Collection[int] = (0,)) -> bytes:
        return self.result(*arguments, stdin=stdin, ok=ok).stdout

    def result(self, *arguments: str, stdin: bytes = b"", ok: Collection[int] = (0,)) -> run.Result:
        return run.run(
            self._argv(arguments), deadline_s=DEADLINE_S, stdin=stdin, ok=ok, env=self._env, cwd=self._cwd
        )

    def text(self, *arguments: str, ok: Collection[int] = (0,)) -> str:
        """One line, without its end; empty when git ended with another status of `ok`."""
        result = self.result(*arguments, ok=ok)
        return os.fsdecode(result.stdout.removesuffix(b"\n")) if result.status == 0 else ""

    def records(self, *arguments: str, stdin: bytes = b"") -> list[bytes]:
        """What is separated by NULs."""
        return self(*arguments, stdin=stdin).split(b"\0")[:-1]

    @contextlib.contextmanager
    def piped(self, *arguments: str, stdin: bytes = b"") -> Iterator[IO[bytes]]:
        with run.piped(
            self._argv(arguments), deadline_s=DEADLINE_S, stdin=stdin, env=self._env, cwd=self._cwd
        ) as out:
            yield out

    def _argv(self, arguments: Sequence[str]) -> list[str]:
        return [*self._limits, "git", *self._options, *arguments]


def _allowed(kind: int, wanted: int) -> int:
    """A limit may only be made lower."""
    _, highest = resource.getrlimit(kind)
    return wanted if highest == resource.RLIM_INFINITY else min(wanted, highest)


def require() -> None:
    """Raises MissingToolError when this host has no git, or no means to bound it."""
    run.require("git")
    run.require("prlimit", "util-linux")


def lines(data: bytes) -> list[str]:
    return [os.fsdecode(line) for line in data.splitlines()]


def present(git: Git, ids: Collection[str]) -> set[str]:
    """Those of the objects that this repository has."""
    if not ids:
        return set()
    asked = "".join(f"{each}\n" for each in ids).encode()
    found = git("cat-file", "--batch-check=%(objectname)", stdin=asked)
    return {line for line in lines(found) if " " not in line}


def explained(error: errors.BangerError, what: str) -> errors.BangerError:
    """A failure of git's, told as a failure of what the user asked for."""
    said = [line.removeprefix("fatal: ") for line in error.fields.get("stderr", "").splitlines()]
    told = errors.OperationFailedError(f"{what}: {said[-1] if said else error.message}")
    if any(line.startswith("Out of memory") for line in said):
        told.hint = f"an object there is larger than git may unpack here, {MAX_MEMORY_BYTES >> 30} GiB"
    told.fields = dict(error.fields)
    return told
