# SPDX-License-Identifier: MIT
"""`banger vm prune`: deletes VMs that do not run, with their disks, after asking."""

from __future__ import annotations

import datetime
import sys

import click

from banger.cli import command, output, params, render, vm_life
from banger.contract import errors, resources, sizes


@command.make(
    "prune",
    examples=[
        ("banger vm prune", "shows which, asks, then deletes"),
        ("banger vm prune --older-than 7d --force", "without asking, those not started for a week"),
        ("banger vm prune --dry-run", "only shows which"),
    ],
)
@click.option(
    "--older-than",
    metavar="TIME",
    type=params.SPAN,
    help="Only those not started for 90m, 12h, 7d; a bare number is seconds.",
)
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Print their names; delete nothing.")
@click.pass_obj
def prune(settings: command.Settings, older_than: float | None, force: bool, dry_run: bool) -> None:
    """Delete the VMs that do not run, and their disks.

    What is on their work disks is lost.
    """
    found = settings.client().get("/v1/vms", list[resources.Vm])
    names = [vm.name for vm in found if _is_idle(vm, older_than)]
    if dry_run or not names:
        if settings.json:
            output.json(names)
            return
        if not names:
            render.note("nothing to prune")
        output.text("".join(f"{name}\n" for name in names))
        return
    if not force:
        _ask(names)
    vm_life.each(settings, names, "delete", cancellable=False)


def _is_idle(vm: resources.Vm, older_than_s: float | None) -> bool:
    if vm.has_vmm:
        return False
    since = vm.started_at or vm.created_at
    age_s = (datetime.datetime.now(datetime.UTC) - since).total_seconds()
    return older_than_s is None or age_s >= older_than_s


def _ask(names: list[str]) -> None:
    if not sys.stdin.isatty():
        raise errors.BadRequestError(
            f"this would delete {sizes.counted(len(names), 'VM')} and all disks, and there is nobody to ask",
            hint="say so with --force; --dry-run shows which",
        )
    render.note(f"this deletes {', '.join(names)}, with what is on their disks")
    if not click.confirm("Delete them?", err=True):
        raise errors.CancelledError("nothing was deleted")
