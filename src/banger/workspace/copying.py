# SPDX-License-Identifier: MIT
"""A repository with its submodules, as plain files: for guests without git, and for what has submodules.

The files that git tracks in each of them (and, when asked, those it does not), and the git directory itself
without its hooks. Ignored files stay here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from banger import archive
from banger.contract import errors, transfers
from banger.workspace import repository as repositories
from banger.workspace import sending
from banger.workspace import snapshot as snapshots

_GITLINK: Final = b"160000"
_NOT_COPIED: Final = frozenset({"hooks", "fsmonitor--daemon.ipc", "fsmonitor--daemon"})


@dataclass(frozen=True, slots=True)
class Copy:
    """What a full copy holds. `files` are names below `top`, without those of git directories."""

    repository: repositories.Repository
    head: str
    branch: str
    files: tuple[bytes, ...]
    notes: tuple[str, ...] = ()

    def members(self) -> Iterator[tuple[str, str]]:
        top = str(self.repository.top)
        made: set[str] = set()
        for name in map(os.fsdecode, self.files):
            for parent in _parents(name, made):
                yield parent, os.path.join(top, parent)
            yield name, os.path.join(top, name)
        if self.repository.git_dir == self.repository.top / ".git":
            yield from _git_directory(self.repository.git_dir, ".git")


def take(repository: repositories.Repository, *, include_untracked: bool) -> Copy:
    """Reads which files there are; their content is read when it is sent."""
    head, branch = repository.head()
    files, notes = _files(repository, include_untracked=include_untracked)
    if repository.git_dir != repository.top / ".git":
        notes = (*notes, f"{repository.top} is a linked working tree: its history stays here")
    return Copy(repository, head, branch, tuple(sorted(files)), notes)


def send(
    exchange: sending.Exchange, copy: Copy, choice: sending.Choice, report: sending.Report
) -> sending.Sent:
    exchange.tell(transfers.PrepareRequest(path=choice.path, discard=choice.discard, full_copy=True))
    exchange.hear(transfers.WorkspaceState)
    exchange.tell(
        transfers.PreparePlan(
            source=os.fsencode(copy.repository.top).decode(errors="replace"),
            head=copy.head or None,
            branch=copy.branch or None,
            read_only=choice.read_only,
            options=(*choice.options, "full_copy"),
        )
    )
    total = archive.content_bytes(copy.members())
    count = exchange.send(archive.packed(copy.members(), lambda sent: report("sending files", sent, total)))
    made = exchange.hear(transfers.Prepared).workspace
    if made is None:
        raise errors.ProtocolError("bangerd did not say what it prepared")
    return sending.Sent(made, count, is_update=False)


def _files(
    repository: repositories.Repository, *, include_untracked: bool
) -> tuple[list[bytes], tuple[str, ...]]:
    with snapshots.scratch(repository) as scratch:
        entries = scratch.entries()
        untracked = scratch.untracked() if include_untracked else []
    found = [entry.path for entry in entries if entry.mode != _GITLINK and scratch.exists(entry.path)]
    found += [path for path in untracked if not path.endswith(b"/")]
    notes: tuple[str, ...] = ()
    for entry in entries:
        if entry.mode == _GITLINK:
            below, more = _submodule(repository, entry.path, include_untracked=include_untracked)
            found += below
            notes += more
    return list(dict.fromkeys(found)), notes


def _submodule(
    parent: repositories.Repository, path: bytes, *, include_untracked: bool
) -> tuple[list[bytes], tuple[str, ...]]:
    top = parent.top / os.fsdecode(path)
    if not (top / ".git").exists() or top.is_symlink():
        return [], (f"submodule {os.fsdecode(path)} has not been fetched here",)
    found = repositories.find(top)
    if found.top != top:
        return [], (f"submodule {os.fsdecode(path)} is not a repository",)
    files, notes = _files(found, include_untracked=include_untracked)
    inside = [b".git", *files] if (top / ".git").is_file() else files
    return [path + b"/" + name for name in inside], notes


def _parents(name: str, made: set[str]) -> Iterable[str]:
    """Directories above a file that the archive has not named yet, the outermost first."""
    parts = name.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        parent = "/".join(parts[:depth])
        if parent not in made:
            made.add(parent)
            yield parent


def _git_directory(directory: Path, name: str) -> Iterator[tuple[str, str]]:
    """Without hooks, which would run in the guest unseen, and without what only lives while git runs."""
    yield name, str(directory)
    with contextlib.suppress(FileNotFoundError):
        for entry in sorted(os.scandir(directory), key=lambda each: each.name):
            if entry.name in _NOT_COPIED or entry.name.endswith(".lock"):
                continue
            below = f"{name}/{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from _git_directory(Path(entry.path), below)
            else:
                yield below, entry.path
