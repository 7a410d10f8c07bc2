# SPDX-License-Identifier: MIT
"""`banger audit`: what root was asked on this host, and what came of it."""

from __future__ import annotations

import collections
from pathlib import Path

import click

from banger.cli import command, output, render
from banger.contract import audit as contract


@command.make(
    "audit",
    examples=[
        ("banger audit", "the last 50 requests to root"),
        ("banger audit --refused", "what root refused"),
        ("banger audit --op-id 0123456789ab", "what one operation asked of root"),
    ],
)
@click.option("--vm", "vm_id", metavar="ID", default="", help="Only what was about this VM's id.")
@click.option("--op-id", metavar="ID", default="", help="Only what this operation asked.")
@click.option("--refused", is_flag=True, help="Only what was refused.")
@click.option(
    "-n",
    "count",
    metavar="N",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="The last so many.",
)
@click.option("--directory", metavar="DIR", type=click.Path(path_type=Path), help="Another host's record.")
@click.pass_obj
def audit(
    settings: command.Settings, vm_id: str, op_id: str, refused: bool, count: int, directory: Path | None
) -> None:
    """Show what root was asked, and what came of it.

    The helper alone can write it; the owner and root can read it. It works without the daemon. Requests that
    only look, and went well, are not recorded. One that is only `begun` is under way, or was cut off.
    Of what was refused the two newest files of 4 MiB are kept, of all else four.
    """
    from banger.system import audit as record

    entries = record.read(directory or record.DIRECTORY)
    chosen = (
        entry
        for entry in entries
        if (not vm_id or entry.vm.startswith(vm_id))
        and (not op_id or entry.op_id == op_id)
        and (not refused or entry.outcome == "refused")
    )
    last = collections.deque(chosen, maxlen=count)
    if settings.json:
        output.json(list(last))
    else:
        headers = ("TIME", "OUTCOME", "REQUEST", "VM", "OPERATION", "UID", "MS", "ERROR")
        output.text(render.table(headers, map(_row, last), dispensable=("UID", "OPERATION")))


def _row(entry: contract.Entry) -> tuple[str, ...]:
    return (
        entry.time[:19],
        entry.outcome,
        entry.op or "-",
        entry.vm,
        entry.op_id,
        str(entry.peer_uid),
        f"{entry.elapsed_ms:.0f}",
        entry.error,
    )
