# SPDX-License-Identifier: MIT
"""Sends a repository into a VM: what the daemon's prepare WebSocket is told, in order."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Final, Protocol, TypeVar

from banger.contract import errors, resources, transfers
from banger.workspace import git as gits
from banger.workspace import repository as repositories
from banger.workspace import snapshot as snapshots

T = TypeVar("T")
_PIECE_BYTES: Final = 256 * 1024
Report = Callable[[str, int, int], None]
"""Hears what is being sent, how many bytes of it have been, and of how many; 0 where nobody knows."""


class Exchange(Protocol):
    """A conversation with the daemon."""

    def tell(self, message: resources.Body, /) -> None: ...

    def send(self, pieces: Iterable[bytes], /) -> int: ...

    def hear(self, kind: type[T], /) -> T: ...

    def pieces(self) -> Iterator[bytes]: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """How a workspace is made."""

    path: str = "/root/repo"
    include_untracked: bool = False
    discard: bool = False
    read_only: bool = False
    has_own_branch: bool = False
    is_fixed: bool = False
    """Made from a commit that was named, whatever happens here."""

    @property
    def options(self) -> tuple[str, ...]:
        named = {
            "untracked": self.include_untracked,
            "read_only": self.read_only,
            "branch": self.has_own_branch,
            "fixed": self.is_fixed,
        }
        return tuple(name for name, is_set in named.items() if is_set)


@dataclass(frozen=True, slots=True)
class Sent:
    """What a prepare came to."""

    workspace: resources.Workspace
    sent_bytes: int
    is_update: bool


def send(
    exchange: Exchange,
    scratch: snapshots.Scratch,
    snapshot: snapshots.Snapshot,
    choice: Choice,
    report: Report,
) -> Sent:
    """The whole conversation. The guest has either all of it afterwards or, as far as it is new, nothing."""
    exchange.tell(transfers.PrepareRequest(path=choice.path, discard=choice.discard, notices=True))
    state = state_of_guest(exchange, report)
    exchange.tell(_plan(snapshot, choice, _had(snapshot.repository, state.work)))
    if state.exists:
        missing = _missing(exchange, scratch.objects_since(snapshot, state.tips))
        with scratch.pack_of(missing) as pack:
            count = exchange.send(_pieces(pack, report))
    else:
        with scratch.pack_of_all(snapshot) as pack:
            count = exchange.send(_pieces(pack, report))
    count += exchange.send([_side_files(snapshot)])
    report("checking it out", count, 0)
    made = exchange.hear(transfers.Prepared).workspace
    if made is None:
        raise errors.ProtocolError("bangerd did not say what it prepared")
    return Sent(made, count, is_update=state.exists)


def state_of_guest(exchange: Exchange, report: Report) -> transfers.WorkspaceState:
    """Once it is this client's turn."""
    while (state := exchange.hear(transfers.WorkspaceState)).waiting_for:
        report(f"waiting for {state.waiting_for}, which prepares another workspace there", 0, 0)
    return state


def _had(repository: repositories.Repository, work: transfers.Exported | None) -> str | None:
    """The head of the guest's work, when branches or tags here hold all of it."""
    if work is None or not work.head or work.nested:
        return None
    ids = [work.head, *(each.commit for each in work.aside)]
    if gits.present(repository.git, ids) != set(ids) or not all(map(repository.holds, ids)):
        return None
    return work.head


def _plan(snapshot: snapshots.Snapshot, choice: Choice, had: str | None) -> transfers.PreparePlan:
    sha256 = snapshot.repository.object_format == "sha256"
    return transfers.PreparePlan(
        source=os.fsencode(snapshot.repository.top).decode(errors="replace"),
        object_format="sha256" if sha256 else "sha1",
        head=snapshot.head or None,
        branch=snapshot.branch or None,
        worktree=snapshot.worktree,
        index=snapshot.index,
        read_only=choice.read_only,
        has=had,
        options=choice.options,
    )


def _missing(exchange: Exchange, ids: list[str]) -> list[str]:
    exchange.send(
        "".join(f"{each}\n" for each in ids[at : at + 4096]).encode() for at in range(0, len(ids), 4096)
    )
    said = b"".join(exchange.pieces())
    wanted = set(ids)
    lacking = [
        line.partition(b" ")[0].decode(errors="replace")
        for line in said.splitlines()
        if line.endswith(b" missing")
    ]
    return [each for each in lacking if each in wanted]


def _pieces(pack: IO[bytes], report: Report) -> Iterator[bytes]:
    count = 0
    while piece := pack.read(_PIECE_BYTES):
        count += len(piece)
        report("sending history and files", count, 0)
        yield piece


def _side_files(snapshot: snapshots.Snapshot) -> bytes:
    refs = dict(snapshot.refs)
    if snapshot.branch and snapshot.head:
        refs[snapshot.branch] = snapshot.head
    config = snapshot.repository.guest_config
    files = {
        "refs": b"".join(
            # The name itself, also where it stands for another in the guest.
            b"option no-deref\0update %s\0%s\0\0" % (os.fsencode(name), each.encode())
            for name, each in refs.items()
        ),
        "sent": b"".join(b"%s %s\n" % (each.encode(), os.fsencode(name)) for name, each in refs.items()),
        "config": b"".join(
            f"{key}\n{value}\n".encode(errors="surrogateescape")
            for key, value in config.items()
            if "\n" not in key + value
        ),
        "symbolic": b"".join(
            b"%s\n%s\n" % (os.fsencode(name), os.fsencode(target))
            for name, target in snapshot.repository.symbolic_refs().items()
        ),
        "shallow": snapshot.repository.shallow(),
        "unmerged": snapshot.unmerged,
        "intended": b"".join(path + b"\0" for path in snapshot.intended),
        "skipped": b"".join(path + b"\0" for path in snapshot.skipped),
        "assumed": b"".join(path + b"\0" for path in snapshot.assumed),
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o600
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
