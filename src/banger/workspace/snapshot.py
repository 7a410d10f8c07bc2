# SPDX-License-Identifier: MIT
"""The state of a repository as git objects: its history, its index, and its files exactly as they lie there.

Files become blobs byte for byte, without line-end conversion, filters or hooks, in a scratch git directory
that borrows the repository's objects. The repository itself is not written to.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from banger import archive
from banger.contract import errors
from banger.workspace import git as gits
from banger.workspace import repository as repositories
from banger.workspace import scratch_directory

_RAW: Final = "* -text -eol -crlf -filter -ident -working-tree-encoding\n"
_CONVERTING: Final = ("filter", "ident", "working-tree-encoding")
_COPIED_KEYS: Final = (
    *("core.fileMode", "core.symlinks", "core.ignoreCase"),
    *("core.trustctime", "core.checkStat"),
)
_GITLINK: Final = b"160000"
_NO_NAMES: Final = frozenset({b"", b".", b"..", b".git"})


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the index. `tag` is as `git ls-files -v` has it."""

    tag: bytes
    mode: bytes
    object_id: bytes
    stage: bytes
    path: bytes

    @property
    def is_skipped(self) -> bool:
        return self.tag in b"Ss"

    @property
    def is_trusted(self) -> bool:
        """Assumed unchanged: git would not look whether it is."""
        return self.tag.islower()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a workspace is made of. Ids are of objects that the scratch directory can read."""

    repository: repositories.Repository
    head: str
    """The commit; empty before the first one."""
    branch: str
    """Full name of the branch, such as refs/heads/main; empty when detached."""
    worktree: str
    """Tree of the files as they are."""
    index: str
    """Tree of what is staged, but for what is unmerged."""
    refs: dict[str, str]
    files: tuple[bytes, ...]
    unmerged: bytes = b""
    """Lines for `git update-index --index-info -z`."""
    intended: tuple[bytes, ...] = ()
    """Paths that are to be added, with nothing staged yet."""
    skipped: tuple[bytes, ...] = ()
    """Paths of a sparse checkout that are not there."""
    assumed: tuple[bytes, ...] = ()
    """Paths that git is told to take for unchanged."""
    notes: tuple[str, ...] = ()
    extra: tuple[str, ...] = field(default=())
    """Objects that only unmerged entries name."""

    @property
    def tips(self) -> list[str]:
        """Everything whose objects a workspace needs."""
        wanted = [self.head, *self.refs.values(), self.worktree, self.index, *self.extra]
        return [each for each in dict.fromkeys(wanted) if each]


class Scratch:
    """A git directory of our own over somebody's repository; `git` works on its files and a copied index."""

    def __init__(self, directory: Path, repository: repositories.Repository) -> None:
        self.repository = repository
        self.directory = directory
        self.git = gits.Git(
            repository.top, {"GIT_DIR": str(directory), "GIT_WORK_TREE": str(repository.top)}
        )
        self._taken_bytes = 0
        self._inside = {b"": True}
        """Directories that have been looked at: whether there is one, and no link above it."""

    def take(self, *, include_untracked: bool = False, start: str = "", branch: str = "") -> Snapshot:
        """Reads the repository. `start` is a commit to begin from instead, with none of the changes here;
        `branch` a new branch's short name.

        Raises BadRequestError for submodules, and for a clone that lacks a part of its history.
        """
        head, on = self.repository.head()
        self._refuse_partial(head)
        if branch:
            on = f"refs/heads/{branch}"
        if start:
            return self._take_commit(self.repository.commit(start), on if branch else "")
        entries = self.entries()
        _refuse_submodules(self.repository, entries)
        index, unmerged = self._staged(entries)
        intended = set(self.git.records("diff-files", "--name-only", "--diff-filter=A", "-z"))
        files, notes = self._worktree(entries, include_untracked=include_untracked)
        conflicted = [entry for entry in entries if entry.stage != b"0"]
        return Snapshot(
            repository=self.repository,
            head=head,
            branch=on,
            worktree=files[0],
            index=index,
            refs=self.repository.refs(),
            files=files[1],
            unmerged=unmerged,
            intended=tuple(path for path in files[1] if path in intended),
            skipped=tuple(
                entry.path for entry in entries if entry.is_skipped and not self.exists(entry.path)
            ),
            assumed=tuple(entry.path for entry in entries if entry.is_trusted and entry.stage == b"0"),
            notes=notes,
            extra=tuple(entry.object_id.decode() for entry in conflicted),
        )

    def _take_commit(self, commit: str, branch: str) -> Snapshot:
        tree = self.git.text("rev-parse", f"{commit}^{{tree}}")
        listed = self.git.records("ls-tree", "-r", "-z", "--full-tree", tree)
        for record in listed:
            if record.startswith(_GITLINK):
                _refuse_submodule(self.repository, record.partition(b"\t")[2])
        return Snapshot(
            repository=self.repository,
            head=commit,
            branch=branch,
            worktree=tree,
            index=tree,
            refs=self.repository.refs(),
            files=tuple(record.partition(b"\t")[2] for record in listed),
        )

    def _refuse_partial(self, head: str) -> None:
        """What it lacks is not fetched here, and the guest could not: it has no password of a remote."""
        if not any(self.repository.objects.glob("pack/*.promisor")):
            return
        tips = dict.fromkeys([head, *self.repository.refs().values()])
        asked = "".join(f"{tip}\n" for tip in tips if tip).encode()
        if self.git("rev-list", "--objects", "--quiet", "--missing=print", "--stdin", stdin=asked):
            raise errors.BadRequestError(
                f"{self.repository.top} is a partial clone: a part of its history is only at its remote",
                hint="`git fetch --refetch --no-filter` brings all of it; "
                "`--mode full-copy` sends it as it is",
            )

    def _copy_index(self) -> None:
        """With its time: git looks again at files that changed in the instant the index was written."""
        for source in (
            self.repository.git_dir / "index",
            *self.repository.git_dir.glob("sharedindex.*"),
        ):
            if source.is_file():
                shutil.copy2(source, self.directory / source.name)

    def entries(self) -> list[Entry]:
        """Of the repository's index, which is copied for that."""
        self._copy_index()
        return [_parse_entry(record) for record in self.git.records("ls-files", "-s", "-v", "-z")]

    def _staged(self, entries: list[Entry]) -> tuple[str, bytes]:
        """The index as a tree, and what a tree cannot hold."""
        conflicted = [entry for entry in entries if entry.stage != b"0"]
        if not conflicted:
            return self.git.text("write-tree"), b""
        copy = gits.Git(
            self.repository.top,
            {"GIT_DIR": str(self.directory), "GIT_INDEX_FILE": str(self.directory / "merged")},
        )
        shutil.copy2(self.directory / "index", self.directory / "merged")
        copy("update-index", "-z", "--index-info", stdin=_removals(conflicted))
        lines = (
            b"%s %s %s\t%s\0" % (entry.mode, entry.object_id, entry.stage, entry.path)
            for entry in conflicted
        )
        return copy.text("write-tree"), b"".join(lines)

    def _worktree(
        self, entries: list[Entry], *, include_untracked: bool
    ) -> tuple[tuple[str, tuple[bytes, ...]], tuple[str, ...]]:
        trusted = b"".join(entry.path + b"\0" for entry in entries if entry.is_trusted)
        if trusted:
            self.git("update-index", "--no-assume-unchanged", "-z", "--stdin", stdin=trusted)
        self._forget([entry for entry in entries if entry.stage == b"0"])
        skipped = [entry for entry in entries if entry.is_skipped]
        self.git("add", "--update", "--", str(self.repository.top))
        if skipped:
            self.git("update-index", "-z", "--index-info", stdin=_removals(skipped))
            there = b"".join(entry.path + b"\0" for entry in skipped if self.exists(entry.path))
            self.git("update-index", "--add", "-z", "--stdin", stdin=there)
        notes = self._add_untracked() if include_untracked else ()
        return (self.git.text("write-tree"), tuple(self.git.records("ls-files", "-z"))), notes

    def _forget(self, entries: list[Entry]) -> None:
        """Makes git read again what may differ from its blob though git calls it unchanged."""
        suspects = self._converted(entries) | self._of_other_size(entries)
        lines = (
            b"%s %s 0\t%s\0" % (entry.mode, entry.object_id, entry.path)
            for entry in entries
            if entry.path in suspects and not entry.is_skipped
        )
        data = b"".join(lines)
        if data:
            self.git("update-index", "-z", "--index-info", stdin=data)

    def _converted(self, entries: list[Entry]) -> set[bytes]:
        """Files that a filter makes, by their attributes; asking for those runs no filter."""
        paths = b"".join(entry.path + b"\0" for entry in entries)
        if not paths:
            return set()
        told = self.repository.git.records("check-attr", "-z", "--stdin", *_CONVERTING, stdin=paths)
        return {
            path
            for path, value in zip(told[::3], told[2::3], strict=True)
            if value not in {b"unspecified", b"unset"}
        }

    def _of_other_size(self, entries: list[Entry]) -> set[bytes]:
        regular = [entry for entry in entries if entry.mode.startswith(b"100")]
        asked = b"".join(entry.object_id + b"\n" for entry in regular)
        sizes = (
            self.git("cat-file", "--batch-check=%(objectsize)", stdin=asked).splitlines() if asked else []
        )
        top = os.fsencode(self.repository.top)
        found = set()
        for entry, size in zip(regular, sizes, strict=True):
            with contextlib.suppress(OSError):
                if str(os.lstat(os.path.join(top, entry.path)).st_size).encode() != size:
                    found.add(entry.path)
        return found

    def _add_untracked(self) -> tuple[str, ...]:
        listed = self.untracked()
        nested = [path for path in listed if path.endswith(b"/")]
        wanted = b"".join(path + b"\0" for path in listed if not path.endswith(b"/"))
        if wanted:
            self.git("update-index", "--add", "-z", "--stdin", stdin=wanted)
        return tuple(f"{os.fsdecode(path)} is a repository of its own and stays here" for path in nested)

    def untracked(self) -> list[bytes]:
        """Neither tracked nor ignored; a name that ends in a slash is a repository of its own."""
        return self.git.records("ls-files", "--others", "--exclude-standard", "-z")

    def exists(self, path: bytes) -> bool:
        """As a file or a link; not behind a link, where git looks for none and any file may lie.

        Nor by a path that git would let into no index: somebody else may have written this one.
        """
        if not _NO_NAMES.isdisjoint(path.split(b"/")):
            return False
        mode = self._mode(path)
        return (stat.S_ISREG(mode) or stat.S_ISLNK(mode)) and self._is_inside(path.rpartition(b"/")[0])

    def _is_inside(self, directory: bytes) -> bool:
        if directory not in self._inside:
            above = itertools.accumulate(directory.split(b"/"), lambda path, name: path + b"/" + name)
            self._inside[directory] = all(stat.S_ISDIR(self._mode(each)) for each in above)
        return self._inside[directory]

    def _mode(self, path: bytes) -> int:
        """0 for what is not there."""
        with contextlib.suppress(OSError):
            return os.lstat(os.path.join(os.fsencode(self.repository.top), path)).st_mode
        return 0

    # --- objects ---

    def objects_since(self, snapshot: Snapshot, known: Iterable[str]) -> list[str]:
        """Ids of what the snapshot needs beyond commits that the other side has, with what is in them.

        git leaves out the commits themselves. Their files, which are nearly all, it leaves out only of trees
        that it is told: those that new commits grew from, and that of the commit which both are at.
        """
        ours = gits.present(self.git, list(known))
        theirs = [*sorted(ours), *([f"{snapshot.head}^{{tree}}"] if snapshot.head in ours else [])]
        asked = "".join([*(f"{tip}\n" for tip in snapshot.tips), *(f"^{each}\n" for each in theirs)])
        listed = self.git("rev-list", "--objects-edge", "--stdin", stdin=asked.encode())
        lines = (line for line in listed.splitlines() if not line.startswith(b"-"))
        return [os.fsdecode(line.split(b" ", 1)[0]) for line in lines]

    @contextlib.contextmanager
    def pack_of_all(self, snapshot: Snapshot) -> Iterator[IO[bytes]]:
        """A pack of the snapshot with its whole history."""
        asked = "".join(f"{tip}\n" for tip in snapshot.tips).encode()
        with self.git.piped("pack-objects", "--revs", *_PACKING, stdin=asked) as pack:
            yield pack

    def take_in(self, pieces: Iterable[bytes]) -> None:
        """A stranger's pack, with git's checks of every object and of what it refers to."""
        path = self.directory / "objects" / "pack" / "pack-incoming.pack"
        path.parent.mkdir(exist_ok=True)
        with path.open("xb") as file:
            for piece in pieces:
                _check_room(self.directory)
                self._taken_bytes += file.write(piece)
        self.git = self.git.held_to(self.largest_file())
        try:
            self.git("index-pack", "--strict", str(path))
        except errors.OperationFailedError as error:
            raise gits.explained(error, "the guest sent what git refuses") from error

    def largest_file(self) -> int:
        """What git may write into one file for what was taken in: its objects packed again, and an index."""
        return 4 * self._taken_bytes + (1 << 30)

    @contextlib.contextmanager
    def pack_of(self, ids: Iterable[str]) -> Iterator[IO[bytes]]:
        """A pack of exactly these objects."""
        asked = "".join(f"{each}\n" for each in ids).encode()
        with self.git.piped("pack-objects", *_PACKING, stdin=asked) as pack:
            yield pack


_PACKING: Final = ("--stdout", "-q", "--delta-base-offset")


@contextlib.contextmanager
def scratch(repository: repositories.Repository) -> Iterator[Scratch]:
    """Gone with everything in it when the block ends."""
    with scratch_directory.made("banger-git-") as directory:
        _lay_out(directory, repository)
        yield Scratch(directory, repository)


def _check_room(directory: Path) -> None:
    """Whoever sends without end does not fill a disk that others need too."""
    if archive.lacks_room(directory):
        raise errors.NoSpaceError(
            f"no space left for the guest's work in {directory.parent}",
            hint="free space there, or name another place with TMPDIR=…",
        )


def _lay_out(directory: Path, repository: repositories.Repository) -> None:
    for part in ("refs", "objects/info", "info"):
        (directory / part).mkdir(parents=True)
    (directory / "HEAD").write_text("ref: refs/heads/none\n")
    (directory / "objects/info/alternates").write_bytes(_alternate(repository.objects))
    (directory / "info/attributes").write_text(_RAW)
    (directory / "config").write_text(_config(repository))
    excluded = repository.common_dir / "info" / "exclude"
    if excluded.is_file():
        shutil.copyfile(excluded, directory / "info" / "exclude")
    if shallow := repository.shallow():
        (directory / "shallow").write_bytes(shallow)


def _alternate(path: Path) -> bytes:
    """One line; git takes a quoted one for paths that hold a line end or begin with a quote."""
    raw = os.fsencode(path)
    if b"\n" not in raw and not raw.startswith(b'"'):
        return raw + b"\n"
    escaped = raw.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\n", b"\\n")
    return b'"' + escaped + b'"\n'


def _config(repository: repositories.Repository) -> str:
    """Nothing here makes git run anything."""
    sha256 = repository.object_format == "sha256"
    values: dict[str, str] = {
        "core.repositoryFormatVersion": "1" if sha256 else "0",
        "core.bare": "false",
        "core.autocrlf": "false",
        "core.safecrlf": "false",
        "core.excludesFile": repository.excludes_file(),
        "core.compression": "1",
        "core.bigFileThreshold": "32m",
        "pack.threads": "0",
        **{key: repository.config[key] for key in _COPIED_KEYS if key in repository.config},
    }
    if sha256:
        values["extensions.objectFormat"] = "sha256"
    lines = []
    for key, value in values.items():
        section, name = key.split(".")
        lines += [f"[{section}]", f"\t{name} = {_quoted(value)}"]
    return "\n".join(lines) + "\n"


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


def _parse_entry(record: bytes) -> Entry:
    head, _, path = record.partition(b"\t")
    tag, mode, object_id, stage = head.split(b" ")
    return Entry(tag, mode, object_id, stage, path)


def _removals(entries: Iterable[Entry]) -> bytes:
    """Lines that take paths out of an index."""
    paths = {entry.path: b"0" * len(entry.object_id) for entry in entries}
    return b"".join(b"0 %s\t%s\0" % (nothing, path) for path, nothing in paths.items())


def _refuse_submodules(repository: repositories.Repository, entries: list[Entry]) -> None:
    for entry in entries:
        if entry.mode == _GITLINK:
            _refuse_submodule(repository, entry.path)


def _refuse_submodule(repository: repositories.Repository, path: bytes) -> None:
    raise errors.BadRequestError(
        f"{repository.top} has a submodule, {os.fsdecode(path)!r}, which is a repository of its own",
        hint="`--mode full-copy` copies the files of both",
    )
