# SPDX-License-Identifier: MIT
"""`banger gc`: what of banger's is on this host, whose it is, and away with what is nobody's."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import click

from banger.cli import command, exits, output, progress, render
from banger.contract import inventory, sizes


@command.make(
    "gc",
    examples=[
        ("banger gc", "what nobody owns; exits 1 when there is something"),
        ("banger gc --explain", "everything of banger's on this host, and whose it is"),
        ("banger gc --apply", "takes away what nobody owns"),
    ],
)
@click.option("--explain", is_flag=True, help="Show everything, also what has an owner, and why.")
@click.option("--apply", "applies", is_flag=True, help="Take away what has no owner, and nothing else.")
@click.pass_obj
def gc(settings: command.Settings, explain: bool, applies: bool) -> None:
    """Look for what crashes left behind, and take it away.

    Devices, links, packet rules, jails, processes and files.
    Works while the daemon and VMs run; what a running operation works on is that VM's. The daemon does the
    same whenever it starts. Exits 0 when nothing is left over, 1 when something is.
    """
    api = settings.client()
    found = api.get("/v1/inventory", inventory.Inventory)
    removed: Sequence[inventory.Thing] = ()
    if applies and found.leftovers:
        began = api.post("/v1/inventory/collect", None)
        progress.follow_one(api, lambda: began, progress.Silent(), cancellable=False).require()
        before, found = found.leftovers, api.get("/v1/inventory", inventory.Inventory)
        still = {(thing.kind, thing.name) for thing in found.leftovers}
        removed = [thing for thing in before if (thing.kind, thing.name) not in still]
    if settings.json:
        things = found.things if explain else found.leftovers
        output.json({"things": things, "removed": removed, "leftovers": len(found.leftovers)})
    else:
        output.text(_shown(found, removed, explain=explain))
    if found.leftovers:
        raise exits.SomeFailedError


def _shown(found: inventory.Inventory, removed: Sequence[inventory.Thing], *, explain: bool) -> str:
    lines = [f"took away: {thing.kind} {render.safe(thing.name)} ({thing.why})" for thing in removed]
    things = found.things if explain else found.leftovers
    if things:
        rows = [(thing.kind, thing.name, _owner(thing), thing.why) for thing in things]
        table = render.table(("KIND", "NAME", "OWNER", "WHY"), rows)
        lines += [table] if render.fits(table) else _one_by_one(things)
    left = len(found.leftovers)
    if left:
        total = f"{left} left over; `banger gc --apply` takes them away"
        lines.append(render.styled(total, "33", sys.stdout))
    else:
        lines.append(f"{sizes.counted(len(found.things), 'thing')}, and each has its owner")
    return "\n".join(lines)


def _one_by_one(things: Sequence[inventory.Thing]) -> Iterator[str]:
    """On a narrow terminal: each name ends its line, so that a path can be copied whole."""
    width = max(len(thing.kind) for thing in things)
    for thing in things:
        why = render.hanging(render.safe(f"{_owner(thing)}: {thing.why}"), width + 2)
        yield f"{thing.kind:<{width}}  {render.safe(thing.name)}\n{' ' * (width + 2)}{why}"


def _owner(thing: inventory.Thing) -> str:
    return thing.owner or ("not ours" if thing.foreign else "nobody")
