# SPDX-License-Identifier: MIT
"""A repository of the host as it is found: where it is, what kind it is, and what is refused of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from banger.contract import errors
from banger.workspace import git as gits

_SENT_REFS: Final = ("refs/heads", "refs/tags", "refs/remotes")
_KEYS: Final = (
    *("core.fileMode", "core.symlinks", "core.ignoreCase", "core.trustctime", "core.checkStat"),
    *("core.autocrlf", "core.eol", "user.name", "user.email"),
)
_REMOTES: Final = r"^(remote\..*\.(url|fetch)|branch\..*\.(remote|merge))$"
_USER_OF_URL: Final = re.compile(r"^((?:\w+::)?(?:https?|ftps?)://)[^/]*@", re.IGNORECASE)
_KEPT_IN_GUEST: Final = ("core.autocrlf", "core.eol", "core.fileMode", "user.name", "user.email")


@dataclass(frozen=True, slots=True)
class Repository:
    """`top` is the working tree, `git_dir` its own git directory, `common_dir` the one with the objects."""

    top: Path
    git_dir: Path
    common_dir: Path
    object_format: str
    config: dict[str, str] = field(default_factory=dict)
    """Of the keys that decide what a file's content means, and who commits."""
    remotes: dict[str, str] = field(default_factory=dict)
    """Keys of remotes, and of which branch follows which of theirs."""

    @property
    def git(self) -> gits.Git:
        """For questions about refs, paths and keys only."""
        return gits.Git(self.top, {"GIT_DIR": str(self.git_dir), "GIT_WORK_TREE": str(self.top)})

    @property
    def objects(self) -> Path:
        return self.common_dir / "objects"

    @property
    def guest_config(self) -> dict[str, str]:
        """Never what may hold a secret: a remote's address loses its user and password."""
        kept = {key: self.config[key] for key in _KEPT_IN_GUEST if key in self.config}
        return kept | {key: _USER_OF_URL.sub(r"\1", value) for key, value in self.remotes.items()}

    def head(self) -> tuple[str, str]:
        """The commit (empty before the first one) and the branch (empty when detached)."""
        return (
            self.git.text("rev-parse", "-q", "--verify", "HEAD^{commit}", ok=(0, 1, 128)),
            self.git.text("symbolic-ref", "-q", "HEAD", ok=(0, 1, 128)),
        )

    def commit(self, name: str) -> str:
        """The commit of a name. Raises NotFoundError."""
        if name.startswith("-"):
            raise errors.BadRequestError(f"{name!r} is not a revision")
        found = self.git.text("rev-parse", "-q", "--verify", f"{name}^{{commit}}", ok=(0, 1, 128))
        if not found:
            raise errors.NotFoundError(f"{self.top} has no commit {name!r}")
        return found

    def gitlink(self, commit: str, path: str) -> str:
        """The commit of another repository that a commit has at a path; empty for none."""
        listed = self.git.records("ls-tree", "-z", commit, "--", path) if commit else []
        words = listed[0].split(b"\t")[0].split(b" ") if listed else []
        return words[2].decode() if words[:1] == [b"160000"] else ""

    def holds(self, commit: str) -> bool:
        """A branch, a tag or what a remote had leads to it: it is not on its way to be forgotten."""
        return bool(self.git.text("for-each-ref", "--count=1", "--contains", commit, *_SENT_REFS))

    def refs(self) -> dict[str, str]:
        """Branches, tags and what remotes had; not stashes, notes and other private refs."""
        return {name: object_id for object_id, name, symref in self._listed_refs() if not symref}

    def symbolic_refs(self) -> dict[str, str]:
        """Those that name another, such as refs/remotes/origin/HEAD."""
        return {name: symref for _, name, symref in self._listed_refs() if symref}

    def _listed_refs(self) -> Iterator[tuple[str, str, str]]:
        listed = self.git("for-each-ref", "--format=%(objectname) %(refname) %(symref)", *_SENT_REFS)
        for line in gits.lines(listed):
            object_id, name, symref = line.split(" ", 2)
            yield object_id, name, symref

    def shallow(self) -> bytes:
        path = self.common_dir / "shallow"
        return path.read_bytes() if path.is_file() else b""

    def excludes_file(self) -> str:
        """The user's own list of what is never shown, such as ~/.config/git/ignore."""
        found = self.git.text("config", "--type=path", "--get", "core.excludesFile", ok=(0, 1))
        home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        return found or os.path.join(home, "git", "ignore")


def find(path: Path) -> Repository:
    """The repository that `path` is in. Raises BadRequestError when there is none that has files."""
    gits.require()
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise errors.BadRequestError(f"{path} {what}", hint="name the directory of a git repository")
    here = gits.Git(path.resolve())
    git_dir = here.text("rev-parse", "--absolute-git-dir", ok=(0, 128))
    if not git_dir:
        hint = "name a git repository, or make it one: `git init`"
        raise errors.BadRequestError(f"{path} is not in a git repository", hint=hint)
    top = here.text("rev-parse", "--show-toplevel", ok=(0, 128))
    if not top:
        hint = "clone it first, and name the clone"
        raise errors.BadRequestError(f"{git_dir} is a bare repository: it has no files", hint=hint)
    _refuse_files_elsewhere(Path(top), git_dir)
    _refuse_anothers(Path(top), path.resolve())
    common = here.text("rev-parse", "--git-common-dir")
    return Repository(
        top=Path(top),
        git_dir=Path(git_dir),
        common_dir=(path.resolve() / common).resolve(),
        object_format=here.text("rev-parse", "--show-object-format"),
        config=_config(here),
        remotes=dict(_values(here, _REMOTES)),
    )


def _refuse_files_elsewhere(top: Path, git_dir: str) -> None:
    """A repository that somebody packed up may claim the user's home, and with it every file there."""
    there = gits.Git(top).text("rev-parse", "--absolute-git-dir", ok=(0, 128))
    if there != git_dir or not (top / ".git").exists():
        raise errors.BadRequestError(
            f"the configuration of {git_dir} says that its files are in {top}",
            hint="name a clone of it; or, where they are not: "
            f"git config --file {git_dir}/config --unset core.worktree",
        )


def _refuse_anothers(top: Path, path: Path) -> None:
    """What another user put above the user's own directory says which files are sent, and with what."""
    if top != path and (top / ".git").lstat().st_uid not in {os.geteuid(), path.stat().st_uid}:
        raise errors.BadRequestError(
            f"{path} is in the repository {top}, which belongs to another user",
            hint=f"name that one, if it is meant; else make one here: `git init {path}`",
        )


def inside(outer: Repository, path: str) -> Repository | None:
    """The repository of its own that lies at a path inside another, if there is one.

    A guest names the path: raises ProtocolError for one that is not below, and no link is followed.
    """
    parts = path.split("/")
    if not {"", ".", "..", ".git"}.isdisjoint(parts):
        raise errors.ProtocolError(f"the guest named {path!r} as a repository inside its own")
    top = outer.top.joinpath(*parts)
    if not (top / ".git").exists() or top.resolve() != top:
        return None
    found = find(top)
    return found if found.top == top else None


def _config(git: gits.Git) -> dict[str, str]:
    """The last value of each key wins; keys come back in lower case."""
    names = {key.lower(): key for key in _KEYS}
    pattern = "^(" + "|".join(key.lower().replace(".", "\\.") for key in _KEYS) + ")$"
    return {names[key]: value or "true" for key, value in _values(git, pattern)}


def _values(git: gits.Git, pattern: str) -> Iterator[tuple[str, str]]:
    result = git.result("config", "-z", "--get-regexp", pattern, ok=(0, 1))
    for record in result.stdout.split(b"\0")[:-1]:
        key, _, value = record.partition(b"\n")
        yield os.fsdecode(key), os.fsdecode(value)
