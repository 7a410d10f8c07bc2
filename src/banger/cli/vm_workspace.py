# SPDX-License-Identifier: MIT
"""`banger vm workspace prepare|export|diff|pull`: a repository into a running VM, and its changes back."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from banger.cli import client, command, output, params, progress, pulling, render, signals, workspaces
from banger.contract import errors, resources, sizes, transfers

if TYPE_CHECKING:
    from banger.workspace import receiving, repository

_COLOURS: Final = ((b"+", b"32"), (b"-", b"31"), (b"@@", b"36"), (b"diff ", b"1"))

group = command.Group(
    name="workspace",
    help="Take a repository into a VM, and its changes back out.",
    no_args_is_help=True,
    examples=[
        ("banger vm workspace prepare web .", "this repository, at /root/repo in the guest"),
        ("banger vm workspace diff web", "what was changed there"),
        ("banger vm workspace pull web", "as branch banger/web of the repository it came from"),
    ],
)
_MAX_LINE_BYTES: Final = 64 * 1024
_GUEST_PATH: Final = workspaces.guest_path("Where it is in the guest [default: the workspace, /root/repo].")
_BASE: Final = click.option(
    "--base-commit", metavar="COMMIT", help="Compare with this commit [default: the one it was made from]."
)


def _vm(settings: command.Settings, name: str) -> resources.Vm:
    return settings.client().get(f"/v1/vms/{client.segment(name)}", resources.Vm)


@command.make(
    "prepare",
    group=group,
    examples=[
        ("banger vm workspace prepare web .", "history and files, as they are now"),
        ("banger vm workspace prepare web . --dry-run", "which files that would be"),
        ("banger vm workspace prepare web", "the same repository again: only what changed"),
    ],
)
@click.argument("name", type=params.VM)
@click.argument("path", required=False, type=click.Path(path_type=Path))
@workspaces.repository_options()
@click.option("--discard", is_flag=True, help="Throw away what was changed in the guest.")
@click.option("--dry-run", is_flag=True, help="List the files; send nothing.")
@click.pass_obj
def prepare(
    settings: command.Settings,
    /,
    name: str,
    path: Path | None,
    discard: bool,
    dry_run: bool,
    **chosen: Any,
) -> None:
    """Take a repository into a running VM.

    Its history and its files as they are: with what is staged, changed and deleted, but without what git
    ignores, and without what it does not track unless asked. Again, only what changed is sent. What was
    changed in the guest meanwhile is never replaced without --discard.
    """
    vm = _vm(settings, name)
    known = vm.workspace.path if vm.workspace else workspaces.GUEST_PATH
    source = workspaces.source_of(vm, path, chosen["guest_path"])
    wanted = dataclasses.replace(workspaces.chosen(source, chosen, path=known), discard=discard)
    with signals.raised(), workspaces.taken(wanted) as ready:
        if dry_run:
            workspaces.show_files(settings, ready)
            return
        sent = workspaces.send(
            settings.client(), vm.id, vm.name, ready, progress.display(json=settings.json)
        )
    if settings.json:
        told = {"workspace": sent.workspace, "sent_bytes": sent.sent_bytes, "files": len(ready.files)}
        output.json(told)
    else:
        workspaces.say_sent(vm.name, sent, len(ready.files))


@command.make(
    "export",
    group=group,
    examples=[
        ("banger vm workspace export web > work.patch", "everything that changed, also what was committed"),
        ("banger vm workspace export web -o work.patch", "the same"),
        ("git apply --index work.patch", "how to take it in"),
    ],
)
@click.argument("name", type=params.VM)
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), help="A file [default: stdout].")
@_BASE
@_GUEST_PATH
@click.pass_obj
def export(
    settings: command.Settings,
    name: str,
    target: Path | None,
    base_commit: str | None,
    guest_path: str | None,
) -> None:
    """Print what changed in the guest as a patch.

    It holds what was committed there, what was not, and new files that git does not ignore; binary files
    too. The guest's repository and its index stay as they are.
    """
    from banger.workspace import receiving

    request = transfers.ExportRequest(path=guest_path, base=base_commit)
    with workspaces.exported(settings.client(), name, request) as (_, pieces):
        counted = _Measured(pieces)
        if target is not None and str(target) != "-":
            receiving.write_file(target, counted)
        else:
            for piece in counted:
                output.raw(piece)
    if not counted.bytes:
        render.note(f"nothing was changed in {name}: the patch is empty")


class _Measured:
    """Pieces, and how many bytes they were."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = pieces
        self.bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            self.bytes += len(piece)
            yield piece


@command.make(
    "diff",
    group=group,
    examples=[
        ("banger vm workspace diff web", "what was changed in the guest"),
        ("banger vm workspace diff web | less", "page by page"),
    ],
)
@click.argument("name", type=params.VM)
@_BASE
@_GUEST_PATH
@click.pass_obj
def diff(settings: command.Settings, name: str, base_commit: str | None, guest_path: str | None) -> None:
    """Show what changed in the guest, for reading."""
    request = transfers.ExportRequest(path=guest_path, base=base_commit)
    has_colour = render.has_colour(sys.stdout)
    with workspaces.exported(settings.client(), name, request) as (_, pieces):
        for line, is_whole in _lines(pieces):
            _print_line(line, has_colour=has_colour and is_whole)
    sys.stdout.buffer.flush()


def _lines(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Lines with their ends, and whether they are whole: of one that is very long, parts come."""
    held, is_whole = bytearray(), True
    for piece in pieces:
        start = 0
        while end := piece.find(b"\n", start) + 1:
            yield bytes(held) + piece[start:end], is_whole
            held.clear()
            start, is_whole = end, True
        held += piece[start:]
        if len(held) > _MAX_LINE_BYTES:
            yield bytes(held), False
            held.clear()
            is_whole = False
    if held:
        yield bytes(held), is_whole


def _print_line(line: bytes, *, has_colour: bool) -> None:
    """A guest wrote it: on a terminal nothing of it is obeyed."""
    if sys.stdout.isatty():
        line = render.safe_log(re.sub("\x1b", "\\\\x1b", line.decode(errors="replace"))).encode()
    for start, code in _COLOURS:
        if has_colour and line.startswith(start):
            line = b"\x1b[%sm%s\x1b[0m\n" % (code, line.rstrip(b"\n"))
            break
    sys.stdout.buffer.write(line)


@command.make(
    "pull",
    group=group,
    examples=[
        ("banger vm workspace pull web", "as branch banger/web of the repository it was made from"),
        ("banger vm workspace pull web --branch fix", "another name"),
        ("git merge banger/web", "how to take it in"),
    ],
)
@click.argument("name", type=params.VM)
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--branch", metavar="NAME", help="Name of the branch [default: banger/NAME].")
@click.option("--force", is_flag=True, help="Replace a branch that holds something else.")
@_BASE
@_GUEST_PATH
@click.pass_obj
def pull(
    settings: command.Settings,
    name: str,
    path: Path | None,
    branch: str | None,
    force: bool,
    base_commit: str | None,
    guest_path: str | None,
) -> None:
    """Bring what changed in the guest into a branch of the repository on this host.

    With the guest's own commits; what is not committed there becomes one more. Your files, your index and
    the branch you are on are not touched. Work in submodules goes into a branch of the same name in each.
    """
    from banger.workspace import receiving, repository

    vm = _vm(settings, name)
    found = repository.find(workspaces.source_of(vm, path, guest_path))
    asked = pulling.Asked(
        settings.client(), vm, receiving.branch_name(found, branch or f"banger/{vm.name}"), force=force
    )
    request = transfers.ExportRequest(form=transfers.ExportForm.PACK, path=guest_path, base=base_commit)
    brought = pulling.bring(asked, found, request)
    if settings.json:
        output.json(pulling.told(brought))
        return
    for path_inside, landed in brought.nested:
        render.note(f"{_counted(landed)} in branch {landed.branch} of {path_inside}")
    if brought.landed.commits:
        render.note(f"{_counted(brought.landed)}{_where(found)} merge {brought.landed.branch}`")
    output.text(brought.landed.branch)


def _where(found: repository.Repository) -> str:
    """Up to `git`, and of which repository unless we stand in it: one may pull from anywhere."""
    from banger.workspace import repository

    with contextlib.suppress(errors.BangerError, OSError):
        if repository.find(Path.cwd()).common_dir == found.common_dir:
            return "; take them in with `git"
    return f", in {found.top}; take them in with `git -C {shlex.quote(str(found.top))}"


def _counted(landed: receiving.Landed) -> str:
    return sizes.counted(landed.commits, "commit")
