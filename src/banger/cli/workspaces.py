# SPDX-License-Identifier: MIT
"""What the commands do with workspaces: send one, ask for what changed, see whether the host moved on.

Imports the part that runs git only when it is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from banger.cli import client, exchange, progress, render, signals
from banger.contract import errors, resources, sizes

if TYPE_CHECKING:
    from banger.workspace import sending
    from banger.workspace import snapshot as snapshots

GUEST_PATH: Final = "/root/repo"


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """Which repository, which state of it, and how it is to be in the guest."""

    source: Path
    path: str = GUEST_PATH
    include_untracked: bool = False
    branch: str = ""
    start: str = ""
    full_copy: bool = False
    read_only: bool = False
    discard: bool = False


@dataclasses.dataclass(slots=True)
class Taken:
    """A repository that has been read, and how it can be sent."""

    wanted: Wanted
    files: tuple[bytes, ...]
    notes: tuple[str, ...]
    send: Callable[[sending.Exchange, sending.Choice, sending.Report], sending.Sent]
    snapshot: snapshots.Snapshot | None = None
    """None for a full copy."""


@contextlib.contextmanager
def taken(wanted: Wanted) -> Iterator[Taken]:
    """Reads the repository, and refuses what cannot be sent. Inside the block it can be."""
    from banger.workspace import copying, receiving, repository, sending
    from banger.workspace import snapshot as snapshots

    found = repository.find(wanted.source)
    if wanted.full_copy:
        if wanted.branch or wanted.start:
            raise errors.BadRequestError(
                "--mode full-copy takes the files as they are, without --branch or --from"
            )
        copy = copying.take(found, include_untracked=wanted.include_untracked)
        yield Taken(
            wanted,
            copy.files,
            copy.notes,
            lambda talk, choice, report: copying.send(talk, copy, choice, report),
        )
        return
    if wanted.branch:
        receiving.branch_name(found, wanted.branch)
    with snapshots.scratch(found) as scratch:
        snapshot = scratch.take(
            include_untracked=wanted.include_untracked, start=wanted.start, branch=wanted.branch
        )
        yield Taken(
            wanted,
            snapshot.files,
            snapshot.notes,
            lambda talk, choice, report: sending.send(talk, scratch, snapshot, choice, report),
            snapshot,
        )


def send(api: client.Client, ref: str, name: str, ready: Taken, shown: progress.Display) -> sending.Sent:
    """Prepares the workspace of a running VM, with progress on stderr."""
    from banger.workspace import sending

    wanted = ready.wanted
    choice = sending.Choice(
        path=wanted.path,
        include_untracked=wanted.include_untracked,
        discard=wanted.discard,
        read_only=wanted.read_only,
    )
    report = _Report(name, shown)
    try:
        with (
            signals.raised(),
            exchange.opened(api, f"/v1/vms/{client.segment(ref)}/workspace/prepare") as talk,
        ):
            sent = ready.send(talk, choice, report)
    finally:
        shown.close()
    for note in ready.notes:
        render.note(note)
    return sent


def say_sent(name: str, sent: sending.Sent, count: int) -> None:
    """One line on stderr."""
    made = sent.workspace
    moved = sizes.text_of_bytes(sent.sent_bytes)
    render.note(f"{made.source} is at {made.path} in {name}: {count} files, {moved} sent")


class _Report:
    """What is going on, as events of an operation, so that it looks like everything else."""

    def __init__(self, name: str, shown: progress.Display) -> None:
        now = datetime.datetime.now(datetime.UTC)
        self._operation = resources.Operation(
            id="",
            kind="workspace.prepare",
            target=name,
            status=resources.OperationStatus.RUNNING,
            created_at=now,
        )
        self._shown = shown
        self._began = time.monotonic()
        self._stage = ""
        self._told_bytes = 0

    def __call__(self, stage: str, count: int) -> None:
        if stage == self._stage and count - self._told_bytes < 8 << 20:
            return
        kind = "note" if stage == self._stage else "stage"
        if kind == "note" and not sys.stderr.isatty():
            return
        self._stage, self._told_bytes = stage, count
        detail = f"{stage} {sizes.text_of_bytes(count)}" if count else stage
        event = resources.Event(
            operation="",
            seq=0,
            time=datetime.datetime.now(datetime.UTC),
            kind="stage",
            stage="prepare_workspace",
            detail=detail,
            elapsed_ms=(time.monotonic() - self._began) * 1000,
        )
        self._shown.hear(self._operation, event)


@contextlib.contextmanager
def exported(
    api: client.Client, ref: str, request: resources.ExportRequest
) -> Iterator[tuple[resources.Exported, Iterator[bytes]]]:
    """What changed in the guest; the stream is whole when it has been read to its end."""
    with (
        signals.raised(),
        exchange.opened(api, f"/v1/vms/{client.segment(ref)}/workspace/export") as talk,
    ):
        talk.tell(request)
        head = talk.hear(resources.Exported)
        yield head, _whole(talk)


def _whole(talk: exchange.Exchange) -> Iterator[bytes]:
    yield from talk.pieces()
    talk.hear(resources.Transferred)


def moved_on(workspace: resources.Workspace) -> str:
    """How the host's repository differs from what was sent; empty when it does not, or cannot be told."""
    wanted = wanted_again(workspace)
    if "full_copy" in workspace.options or not wanted.source.is_dir():
        return ""
    try:
        with taken(wanted) as ready:
            now = ready.snapshot
    except errors.BangerError:
        return ""
    if now is None:
        return ""
    if now.head != workspace.head:
        return f"{workspace.source} has other commits now"
    if now.worktree != workspace.worktree or now.index != workspace.index:
        return f"files in {workspace.source} have changed"
    return ""


def wanted_again(workspace: resources.Workspace) -> Wanted:
    """The same repository in the same way as the last time."""
    return Wanted(
        Path(workspace.source),
        path=workspace.path,
        include_untracked="untracked" in workspace.options,
        read_only="read_only" in workspace.options,
    )


def source_of(vm: resources.Vm, given: Path | None, here: Callable[[], Path] = Path.cwd) -> Path:
    """The repository that a command means: the one named, the one sent before, or the one we stand in."""
    if given is not None:
        return given
    return Path(vm.workspace.source) if vm.workspace is not None else here()


def print_files(files: tuple[bytes, ...], *, to_terminal: bool) -> None:
    """Names as they are, one a line; on a terminal made harmless."""
    for name in files:
        shown = render.safe(name.decode(errors="replace")).encode() if to_terminal else name
        sys.stdout.buffer.write(shown + b"\n")
    sys.stdout.buffer.flush()
