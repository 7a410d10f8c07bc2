# SPDX-License-Identifier: MIT
"""Lands a guest's work as a branch of the host's repository. Whatever a guest sends may be hostile.

Its pack is unpacked and checked in a scratch git directory; only a whole, sound history is then fetched, as
any remote's would be, into a new branch. Working tree, index, and the branch that is checked out are never
touched.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from banger import run
from banger.contract import errors
from banger.workspace import git as gits
from banger.workspace import repository as repositories
from banger.workspace import snapshot as snapshots

_INCOMING: Final = "refs/heads/incoming"


@dataclass(frozen=True, slots=True)
class Landed:
    """A branch with the guest's work."""

    branch: str
    commit: str
    commits: int
    """How many it is ahead of the commit that the workspace was made from."""


def branch_name(repository: repositories.Repository, name: str) -> str:
    """Raises BadRequestError for what cannot name a branch."""
    if name.startswith("-") or not repository.git.text("check-ref-format", "--branch", name, ok=(0, 1, 128)):
        raise errors.BadRequestError(f"{name!r} cannot be the name of a branch")
    return name


def check_base(repository: repositories.Repository, base: str) -> None:
    """Raises ConflictError when this is not the repository that the work began from."""
    if base and not gits.present(repository.git, [base]):
        raise errors.ConflictError(
            f"{repository.top} does not have commit {base[:12]}, from which the work in the guest began",
            hint="name the repository that the workspace was made from",
        )


def land(
    scratch: snapshots.Scratch, pieces: Iterable[bytes], *, base: str, head: str, branch: str, force: bool
) -> Landed:
    """Raises ConflictError when the branch is checked out, or holds what the guest's work does not."""
    repository = scratch.repository
    scratch.take_in(pieces)
    found = scratch.git.text("rev-parse", "-q", "--verify", f"{head}^{{commit}}", ok=(0, 1, 128))
    if found != head:
        raise errors.ProtocolError("the guest did not send the commit that it promised")
    _check_sound(scratch, head, base)
    before = _check_branch(repository, branch, head=head, scratch=scratch, force=force)
    scratch.git("update-ref", _INCOMING, head)
    _fetch(scratch, repository)
    _set_branch(repository, branch, head, before)
    between = [head, f"^{base}"] if base else [head]
    count = int(scratch.git.text("rev-list", "--count", *between))
    return Landed(branch, head, count)


def _check_sound(scratch: snapshots.Scratch, head: str, base: str) -> None:
    """Every object of the new history is there, and none is what git would refuse from a stranger."""
    asked = [head, *([f"^{base}"] if base else [])]
    result = scratch.git.result("rev-list", "--objects", "--quiet", *asked, ok=(0, 1, 128))
    if result.status:
        raise errors.ProtocolError(
            "the guest's history is incomplete", stderr=result.stderr.decode(errors="replace")
        )


def _check_branch(
    repository: repositories.Repository, branch: str, *, head: str, scratch: snapshots.Scratch, force: bool
) -> str:
    """The commit that the branch is at; empty for a new one."""
    ref = f"refs/heads/{branch}"
    listed = repository.git("worktree", "list", "--porcelain")
    if f"branch {ref}" in gits.lines(listed) or repository.head()[1] == ref:
        raise errors.ConflictError(
            f"branch {branch} is checked out in {repository.top}",
            hint="choose another name with --branch, then merge it",
        )
    before = repository.git.text("rev-parse", "-q", "--verify", f"{ref}^{{commit}}", ok=(0, 1, 128))
    if not before or force:
        return before
    if scratch.git.result("merge-base", "--is-ancestor", before, head, ok=(0, 1, 128)).status:
        raise errors.ConflictError(
            f"branch {branch} has commits that the guest's work is not built on",
            hint="choose another name with --branch, or replace it with --force",
        )
    return before


def _fetch(scratch: snapshots.Scratch, repository: repositories.Repository) -> None:
    """Only the objects. The repository's own configuration is read, and may say what another path is."""
    source = str(scratch.directory)
    git = gits.Git(
        repository.top,
        {
            "GIT_DIR": str(repository.git_dir),
            "GIT_WORK_TREE": str(repository.top),
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_ALLOW_PROTOCOL": "file",
            # The longest match counts: this path is none but itself.
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.{source}.insteadOf",
            "GIT_CONFIG_VALUE_0": source,
        },
        *("-c", "transfer.fsckObjects=true"),
        *("-c", "fetch.recurseSubmodules=false"),
        *("-c", "fetch.prune=false"),
        *("-c", "fetch.writeCommitGraph=false"),
        # Larger files pass through, and are never held.
        *("-c", "core.bigFileThreshold=32m"),
        # Stays a pack, in any git: object by object it would be as large as whoever made it says.
        *("-c", "fetch.unpackLimit=1"),
    ).held_to(scratch.largest_file())
    options = ("--no-tags", "--no-write-fetch-head", "--no-recurse-submodules", "--quiet")
    try:
        git("fetch", *options, source, _INCOMING)
    except errors.OperationFailedError as error:
        raise gits.explained(error, f"the guest's work was not let into {repository.top}") from error


def _set_branch(repository: repositories.Repository, branch: str, head: str, before: str) -> None:
    """Exactly this commit, wherever the objects came from, and from exactly the one that was looked at.

    A name that stands for another branch, such as the one that is checked out, becomes a branch of its own.
    """
    reason = ("-m", "banger: a guest's work")
    try:
        repository.git(
            "update-ref", "--no-deref", *reason, f"refs/heads/{branch}", head, before or "0" * len(head)
        )
    except errors.OperationFailedError as error:
        raise gits.explained(error, f"branch {branch} of {repository.top} was not set") from error


def write_file(path: Path, pieces: Iterable[bytes]) -> int:
    """A new file appears whole or not at all; one that is there is replaced.

    Raises OperationFailedError where there can be none.
    """
    if path.is_dir():
        raise errors.BadRequestError(f"{path} is a directory", hint="name a file in it")
    count = 0
    staged = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with staged.open("xb") as file:
            for piece in pieces:
                run.check_cancelled()
                file.write(piece)
                count += len(piece)
        staged.replace(path)
    except OSError as error:
        if error.filename is None or errors.exhausted(error) is not None:
            raise
        raise errors.OperationFailedError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            staged.unlink()
    return count
