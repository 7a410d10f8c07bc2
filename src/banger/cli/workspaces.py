# SPDX-License-Identifier: MIT
"""What the commands do with workspaces: send one, ask for what changed, see whether the host moved on.

Imports the part that runs git only when it is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import posixpath
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from banger.cli import client, command, exchange, output, params, progress, render, signals
from banger.contract import errors, resources, sizes, transfers

if TYPE_CHECKING:
    from banger.workspace import sending
    from banger.workspace import snapshot as snapshots

_F = TypeVar("_F", bound=Callable[..., Any])
GUEST_PATH: Final = "/root/repo"
_TOLD_BYTES: Final = 8 << 20
"""Nobody reads a count more often than each so many."""


def guest_path(told: str) -> Callable[[_F], _F]:
    """The option that says which place in the guest is meant."""
    return click.option("--guest-path", metavar="PATH", type=params.GUEST_PATH, help=told)


def repository_options(when: str = "") -> Callable[[_F], _F]:
    """Which state of a repository goes into a VM, and how; `when` says when they count."""

    def said(text: str) -> str:
        return f"{when}{text[0].lower()}{text[1:]}" if when else text

    return command.together(
        guest_path(said("Where to put it [default: /root/repo].")),
        click.option(
            "--include-untracked",
            is_flag=True,
            help=said("Also files git does not track; never ignored ones."),
        ),
        click.option("--branch", metavar="NAME", default="", help=said("Be on a new branch in the guest.")),
        click.option(
            "--from",
            "start",
            metavar="COMMIT",
            default="",
            help=said("Begin from this commit, without changes."),
        ),
        click.option(
            "--mode",
            type=click.Choice(["history", "full-copy"]),
            default="history",
            show_default=True,
            help=said("full-copy needs no git in the guest and takes submodules."),
        ),
        click.option(
            "--readonly",
            "read_only",
            is_flag=True,
            help=said("Guard it against changes by mistake; root in the guest can undo that."),
        ),
    )


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
    head: str
    worktree: str
    index: str
    snapshot: snapshots.Snapshot | None = None
    """None for a full copy."""


def chosen(source: Path, options: dict[str, Any], *, path: str = GUEST_PATH) -> Wanted:
    """Takes its own options out of what click gave. Raises BadRequestError."""
    if options["start"] and options["include_untracked"]:
        raise errors.BadRequestError(
            "--from and --include-untracked exclude each other: a commit holds only what git tracks"
        )
    named = {name: options.pop(name) for name in ("include_untracked", "branch", "start", "read_only")}
    full_copy = options.pop("mode") == "full-copy"
    return Wanted(source, path=options.pop("guest_path") or path, full_copy=full_copy, **named)


def wanted(words: Sequence[str], options: dict[str, Any]) -> Wanted | None:
    """The repository that `vm run` names. Raises BadRequestError for options that need one."""
    named = ("include_untracked", "branch", "start", "read_only", "guest_path")
    given = options["mode"] != "history" or any(options[name] for name in named)
    found = chosen(Path(words[0]) if words else Path(), options)
    if given and not words:
        raise errors.BadRequestError("these options are for a repository", hint="name one: `.`")
    return found if words else None


@contextlib.contextmanager
def taken(wanted: Wanted) -> Iterator[Taken]:
    """Reads the repository, and refuses what cannot be sent. Inside the block it can be."""
    from banger.workspace import copying, receiving, repository, sending
    from banger.workspace import snapshot as snapshots

    client.require_text(wanted.path)
    found = repository.find(wanted.source)
    if wanted.full_copy:
        if wanted.branch or wanted.start:
            raise errors.BadRequestError(
                "--mode full-copy takes the files as they are, without --branch or --from"
            )
        copy = copying.take(found, include_untracked=wanted.include_untracked)
        client.require_text(copy.branch)
        yield Taken(
            wanted,
            copy.files,
            copy.notes,
            lambda talk, choice, report: copying.send(talk, copy, choice, report),
            head=copy.head,
            worktree=copy.digest,
            index="",
        )
        return
    if wanted.branch:
        receiving.branch_name(found, wanted.branch)
    with snapshots.scratch(found) as scratch:
        snapshot = scratch.take(
            include_untracked=wanted.include_untracked, start=wanted.start, branch=wanted.branch
        )
        client.require_text(snapshot.branch)
        yield Taken(
            wanted,
            snapshot.files,
            snapshot.notes,
            lambda talk, choice, report: sending.send(talk, scratch, snapshot, choice, report),
            head=snapshot.head,
            worktree=snapshot.worktree,
            index=snapshot.index,
            snapshot=snapshot,
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
        has_own_branch=bool(wanted.branch),
        is_fixed=bool(wanted.start),
    )
    report = Report("workspace.prepare", name, shown)
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


def send_into(
    settings: command.Settings, api: client.Client, vm: resources.Vm, ready: Taken
) -> sending.Sent:
    sent = send(api, vm.id, vm.name, ready, progress.display(json=settings.json))
    if not settings.json:
        say_sent(vm.name, sent, len(ready.files))
    return sent


def keep_up(
    settings: command.Settings, api: client.Client, name: str, *, path: str | None, send_changes: bool
) -> None:
    """Says that the repository here has changed since it was sent, or sends what did."""
    vm = api.get(f"/v1/vms/{client.segment(name)}", resources.Vm)
    known = _known(vm, path)
    if known is None or not vm.has_vmm:
        if send_changes and vm.has_vmm:
            raise _nothing_known(name, path)
        return
    if "fixed" in known.options:
        if send_changes:
            render.note(
                f"{known.path} was made with --from a commit, which does not change: nothing is sent"
            )
        return
    try:
        with taken(wanted_again(known)) as ready:
            news = _news(known, ready)
            if news and send_changes and ready.snapshot is None:
                raise _wants_discard(name, known, news)
            if news and send_changes:
                send_into(settings, api, vm, ready)
            elif news:
                render.note(f"{news} since it was sent; --auto-prepare sends it again")
    except errors.BadRequestError as error:
        if send_changes:
            raise
        render.note(f"cannot compare with {known.source}: {error.message}")


def _known(vm: resources.Vm, path: str | None) -> resources.Workspace | None:
    """What was sent to this place in the guest last; without one, wherever."""
    if path is None:
        return vm.workspace
    return next((each for each in vm.all_workspaces if each.path == posixpath.normpath(path)), None)


def _nothing_known(name: str, path: str | None) -> errors.BangerError:
    where, option = (f" at {path}", f" --guest-path {shlex.quote(path)}") if path else ("", "")
    hint = f"`banger vm workspace prepare {name}{option}` sends it the first time"
    return errors.NotFoundError(f"{name} has no workspace{where} to send changes to", hint=hint)


def _wants_discard(name: str, known: resources.Workspace, news: str) -> errors.BangerError:
    """Only what git sent is brought up to date: nothing tells what was changed in a copy."""
    words = f"{shlex.quote(known.source)} --guest-path {shlex.quote(known.path)} --mode full-copy --discard"
    return errors.ConflictError(
        f"{news} since it was copied to {known.path} in {name}, and a full copy is replaced as a whole",
        hint=f"`banger vm workspace prepare {name} {words}` does, with what was changed in the guest",
    )


def _news(known: resources.Workspace, ready: Taken) -> str:
    """How the repository differs from what was sent; empty when it does not."""
    if ready.head != known.head:
        return f"{known.source} has other commits"
    if (ready.worktree, ready.index) != (known.worktree, known.index):
        return f"files in {known.source} have changed"
    return ""


def say_sent(name: str, sent: sending.Sent, count: int) -> None:
    """One line on stderr."""
    made = sent.workspace
    moved = sizes.text_of_bytes(sent.sent_bytes)
    render.note(f"{made.source} is at {made.path} in {name}: {sizes.counted(count, 'file')}, {moved} sent")


class Report:
    """What is going on, as events of an operation, so that it looks like everything else."""

    def __init__(self, kind: str, name: str, shown: progress.Display) -> None:
        now = datetime.datetime.now(datetime.UTC)
        self._operation = resources.Operation(
            id="",
            kind=kind,
            target=name,
            status=resources.OperationStatus.RUNNING,
            created_at=now,
        )
        self._shown = shown
        self._began = time.monotonic()
        self._doing = ""
        self._told_bytes = 0

    def __call__(self, doing: str, count: int, total: int = 0) -> None:
        """So many bytes of `total`, which is 0 where nobody knows."""
        is_new = doing != self._doing
        if not is_new and count - self._told_bytes < _TOLD_BYTES:
            return
        self._doing, self._told_bytes = doing, count
        event = resources.Event(
            operation="",
            seq=0,
            time=datetime.datetime.now(datetime.UTC),
            kind="stage" if is_new else "progress",
            stage=self._operation.kind.rpartition(".")[2],
            detail=doing,
            current=count,
            total=total,
            elapsed_ms=(time.monotonic() - self._began) * 1000,
        )
        self._shown.hear(self._operation, event)

    def close(self) -> None:
        self._shown.close()


@contextlib.contextmanager
def exported(
    api: client.Client, ref: str, request: transfers.ExportRequest
) -> Iterator[tuple[transfers.Exported, Iterator[bytes]]]:
    """What changed in the guest; the stream is whole when it has been read to its end."""
    with (
        signals.raised(),
        exchange.opened(api, f"/v1/vms/{client.segment(ref)}/workspace/export") as talk,
    ):
        talk.tell(request)
        head = talk.hear(transfers.Exported)
        yield head, _whole(talk)


def _whole(talk: exchange.Exchange) -> Iterator[bytes]:
    yield from talk.pieces()
    talk.hear(transfers.Transferred)


def wanted_again(workspace: resources.Workspace) -> Wanted:
    """The same repository in the same way as the last time."""
    return Wanted(
        Path(workspace.source),
        path=workspace.path,
        include_untracked="untracked" in workspace.options,
        read_only="read_only" in workspace.options,
        full_copy="full_copy" in workspace.options,
        branch=workspace.branch.removeprefix("refs/heads/") if "branch" in workspace.options else "",
    )


def source_of(
    vm: resources.Vm, given: Path | None, path: str | None, here: Callable[[], Path] = Path.cwd
) -> Path:
    """The repository that a command means: the one named, the one sent before, or the one we stand in."""
    if given is not None:
        return given
    known = _known(vm, path) or vm.workspace
    return Path(known.source) if known is not None else here()


def show_files(settings: command.Settings, ready: Taken) -> None:
    if settings.json:
        output.json([name.decode(errors="backslashreplace") for name in ready.files])
    else:
        _print_files(ready.files, to_terminal=sys.stdout.isatty())


def _print_files(files: tuple[bytes, ...], *, to_terminal: bool) -> None:
    """Names as they are, one a line; on a terminal made harmless."""
    for name in files:
        shown = render.safe(name.decode(errors="replace")).encode() if to_terminal else name
        sys.stdout.buffer.write(shown + b"\n")
    sys.stdout.buffer.flush()
