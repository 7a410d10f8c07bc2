# SPDX-License-Identifier: MIT
"""`banger vm prune`: deletes VMs that do not run, with their disks, after asking."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Collection

import click

from banger.cli import client, command, output, params, render, vm_life
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
    api = settings.client()
    starting = _being_started(api)  # first: what ends being started meanwhile is seen to run
    found = api.get("/v1/vms", list[resources.Vm])
    ids = {vm.name: vm.id for vm in found if _is_idle(vm, older_than) and vm.name not in starting}
    names = list(ids)
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
    vm_life.each(settings, names, "delete", cancellable=False, ids=ids, unless_up="true")


def _being_started(api: client.Client) -> Collection[str]:
    running = resources.OperationStatus.RUNNING
    all_ = api.get("/v1/operations", list[resources.Operation])
    return {each.target for each in all_ if each.kind in resources.STARTS and each.status is running}


def _is_idle(vm: resources.Vm, older_than_s: float | None) -> bool:
    if vm.has_vmm or (vm.autostart and vm.stopped_with_host):
        return False  # the latter is about to be started
    if not vm.is_known:
        return False  # nor when it ran last: it is deleted by name alone
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
