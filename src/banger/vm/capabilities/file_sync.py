# SPDX-License-Identifier: MIT
"""Files of the owner's home that the configuration names, copied into the guest's `/root` at every start.

Such as `~/.gitconfig` or a tool's settings. What cannot be copied is refused before anything is made. The
guest's copy is replaced each time, and nothing ever comes back.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from banger import archive
from banger.contract import errors, guest
from banger.vm import capabilities

MAX_BYTES: Final = 64 << 20
MAX_FILES: Final = 10_000


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or directory below the owner's home, and where it goes below the guest's."""

    source: str
    target: str


class FileSync:
    """Meets `capabilities.Capability`."""

    name = "file_sync"

    def __init__(self, home: Path, entries: Sequence[Entry], *, guest_home: str = "/root") -> None:
        self._home = home
        self._guest_home = guest_home
        self._entries = tuple(entries)

    async def check(self, context: capabilities.Context) -> None:
        """Raises BadRequestError for what cannot be copied."""
        await asyncio.to_thread(lambda: list(self._members()))

    async def uncheck(self, context: capabilities.Context) -> None:
        """Looking took nothing."""

    async def prepare(self, context: capabilities.Context) -> None:
        """The guest takes the files itself, once it runs."""

    async def after_start(self, context: capabilities.Context) -> None:
        members = await asyncio.to_thread(lambda: list(self._members()))
        spec = guest.PutSpec(self._guest_home, uid=0, gid=0)
        await context.host.agent(context.vm.id).put(spec, _in_pieces(archive.packed(members)))

    async def clean_up(self, context: capabilities.Context) -> None:
        """Nothing of it is on the host."""

    def _members(self) -> Iterator[tuple[str, str]]:
        """Names in the archive, and paths here; parents first, each once."""
        made: set[str] = set()
        count, size = 0, 0
        for entry in self._entries:
            source = self._checked(entry)
            for parent in _parents(entry.target):
                if parent not in made:
                    made.add(parent)
                    yield parent, str(self._parent_like(parent))
            for name, path in archive.walk(source, entry.target):
                count, size = count + 1, size + os.lstat(path).st_size
                if size > MAX_BYTES or count > MAX_FILES:
                    raise _refused(entry, f"it is more than {MAX_BYTES >> 20} MiB or {MAX_FILES} files")
                yield name, path

    def _checked(self, entry: Entry) -> Path:
        """Links in the way are followed as long as they stay in the home, where dotfiles often are links."""
        path = self._home / entry.source
        try:
            found = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise _refused(entry, _reason(error)) from error
        if not found.is_relative_to(self._home.resolve()) or found == self._home.resolve():
            raise _refused(entry, "it leads out of the home directory, or is all of it")
        if not os.access(found, os.R_OK):
            raise _refused(entry, "it cannot be read")
        if not (found.is_file() or found.is_dir()):
            raise _refused(entry, "it is neither a file nor a directory")
        return found

    def _parent_like(self, parent: str) -> Path:
        """A directory of the home lends its mode to the one of the same name in the guest."""
        path = self._home / parent
        return path if path.is_dir() else self._home


def _parents(target: str) -> Iterator[str]:
    parts = target.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        yield "/".join(parts[:depth])


def _reason(error: OSError | RuntimeError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "its links go in circles"


def _refused(entry: Entry, why: str) -> errors.BadRequestError:
    return errors.BadRequestError(
        f"file_sync: ~/{entry.source} cannot go into the VM: {why[0].lower()}{why[1:]}",
        hint="correct file_sync in config.toml, or the file, then start the VM again",
    )


async def _in_pieces(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Reads in a thread, a piece at a time: a home may be on a slow file system."""
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece
