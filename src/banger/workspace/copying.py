# SPDX-License-Identifier: MIT
"""A repository with its submodules, as plain files: for guests without git, and for what has submodules.

The files that git tracks in each of them (and, when asked, those it does not), and the git directory itself
without its hooks. Ignored files stay here. A linked working tree arrives as one of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from banger import archive
from banger.contract import errors, transfers
from banger.workspace import repository as repositories
from banger.workspace import sending
from banger.workspace import snapshot as snapshots

_GITLINK: Final = b"160000"
_HOOKS: Final = "hooks"
_NOT_COPIED: Final = frozenset({"fsmonitor--daemon.ipc", "fsmonitor--daemon"})
_OF_GIT_DIRECTORY: Final = frozenset({"HEAD", "objects", "refs"})
"""Where these lie, `hooks` are hooks; elsewhere it is the name of a branch, or of a submodule."""
_SHARED: Final = frozenset(
    {
        *("branches", "common", "config", "description", "info", "lfs", "logs", "objects", "packed-refs"),
        *("refs", "reftable", "remotes", "rr-cache", "shallow", "svn"),
    }
)
"""What linked working trees take from the main one's git directory, as gitrepository-layout(5) has it."""
_LINKS: Final = frozenset({"commondir", "gitdir", "locked"})
"""What is in a linked one's because of where it lies."""


@dataclass(frozen=True, slots=True)
class Copy:
    """What a full copy holds. `files` are names below `top`, without those of git directories."""

    repository: repositories.Repository
    head: str
    branch: str
    files: tuple[bytes, ...]
    digest: str
    """Of the files' names, modes, sizes and times, as they were when it was taken."""
    notes: tuple[str, ...] = ()

    def members(self) -> Iterator[tuple[str, str]]:
        top = str(self.repository.top)
        made: set[str] = set()
        for name in map(os.fsdecode, self.files):
            for parent in _parents(name, made):
                yield parent, os.path.join(top, parent)
            yield name, os.path.join(top, name)
        common, own = self.repository.common_dir, self.repository.git_dir
        yield ".git", str(common)
        if own == common:
            yield from _entries(common, ".git")
        else:
            yield from _entries(common, ".git", lambda name: name in _SHARED)
            yield from _entries(own, ".git", lambda name: name not in _LINKS)


def take(repository: repositories.Repository, *, include_untracked: bool) -> Copy:
    """Reads which files there are; their content is read when it is sent.

    Raises BadRequestError for a repository whose git directory cannot become a part of the copy.
    """
    if _is_tied(repository):
        raise errors.BadRequestError(
            f"the git directory of {repository.top}, {repository.common_dir}, is bare or of another tree: "
            "it would be of no use in a copy",
            hint="leave out --mode full-copy, or name a clone",
        )
    _refuse_borrowed(repository)
    head, branch = repository.head()
    files, notes = _files(repository, include_untracked=include_untracked)
    named = tuple(sorted(files))
    return Copy(repository, head, branch, named, _digest(repository.top, named), notes)


def _digest(top: Path, files: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for name in files:
        with contextlib.suppress(FileNotFoundError):
            about = os.lstat(os.path.join(os.fsencode(top), name))
            found.update(b"%s\0%o %d %d\0" % (name, about.st_mode, about.st_size, about.st_mtime_ns))
    return found.hexdigest()


def send(
    exchange: sending.Exchange, copy: Copy, choice: sending.Choice, report: sending.Report
) -> sending.Sent:
    exchange.tell(
        transfers.PrepareRequest(path=choice.path, discard=choice.discard, full_copy=True, notices=True)
    )
    sending.state_of_guest(exchange, report)
    exchange.tell(
        transfers.PreparePlan(
            source=os.fsencode(copy.repository.top).decode(errors="replace"),
            head=copy.head or None,
            branch=copy.branch or None,
            worktree=copy.digest,
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
    _refuse_borrowed(found)
    files, notes = _files(found, include_untracked=include_untracked)
    if not found.git_dir.is_relative_to(parent.top):
        raise errors.BadRequestError(
            f"submodule {os.fsdecode(path)} of {parent.top} keeps its git directory elsewhere, "
            f"in {found.git_dir}: a copy would have none",
            hint="name the main working tree, or a clone",
        )
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


def _is_tied(repository: repositories.Repository) -> bool:
    """Its configuration says where the files are, as a submodule's does, or that there are none."""
    said = ("config", "--file", str(repository.common_dir / "config"))
    bare = repository.git.text(*said, "--type=bool", "core.bare", ok=(0, 1))
    return bare == "true" or bool(repository.git.text(*said, "core.worktree", ok=(0, 1)))


def _refuse_borrowed(repository: repositories.Repository) -> None:
    """What it borrows may be all of another's, of which git alone knows what is its own too."""
    alternates = repository.objects / "info" / "alternates"
    if alternates.is_file() and alternates.read_bytes().strip():
        raise errors.BadRequestError(
            f"{repository.top} borrows objects of another repository: a copy would lack them",
            hint=f"`git -C {repository.top} repack -a -d`, then delete {alternates}",
        )


def _entries(
    directory: Path, name: str, wanted: Callable[[str], bool] = lambda _: True
) -> Iterator[tuple[str, str]]:
    """Of a git directory: no hooks, which would run in the guest unseen, and nothing of a git that runs."""
    with contextlib.suppress(FileNotFoundError):
        entries = sorted(os.scandir(directory), key=lambda each: each.name)
        left = {*_NOT_COPIED}
        if {entry.name for entry in entries} >= _OF_GIT_DIRECTORY:
            left.add(_HOOKS)
        for entry in entries:
            if entry.name in left or entry.name.endswith(".lock") or not wanted(entry.name):
                continue
            below = f"{name}/{entry.name}"
            yield below, entry.path
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(Path(entry.path), below)
