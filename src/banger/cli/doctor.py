# SPDX-License-Identifier: MIT
"""`banger doctor`. The probes are in banger.system, which is imported only when they are asked for."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

import click
import msgspec

from banger.cli import command, exits, output, params, render

if TYPE_CHECKING:
    from banger.system.doctor import report

_COLOURS: Final = {"pass": "32", "warn": "33", "fail": "1;31", "skip": "2"}


@command.make(
    "doctor",
    examples=[
        ("banger doctor", "what is wrong here, and what to do"),
        ("sudo banger doctor --strict", "fails unless every row passes"),
        ("banger doctor --production", "is this host fit to serve strangers"),
    ],
)
@click.option("--strict", is_flag=True, help="Also fail on warnings and on what could not be looked at.")
@click.option("--production", is_flag=True, help="Add what Firecracker recommends for production hosts.")
@click.option("--quiet", "-q", is_flag=True, help="Show only the rows that do not pass.")
@click.option(
    "--timeout",
    metavar="TIME",
    type=params.SPAN,
    default="60s",
    show_default=True,
    help="How long each check may take; all run at once.",
)
@click.pass_obj
def doctor(settings: command.Settings, strict: bool, production: bool, quiet: bool, timeout: float) -> None:
    """Look whether this host has all that VMs need, and what to do.

    Works without the daemon, and changes nothing. Rows marked SKIP could not be looked at: some need root.
    Exits 0 when no row fails, 1 when one does.
    """
    from banger.system.doctor import report, scene, table

    host = scene.Scene(limit_s=timeout)
    checks = (*table.ORDINARY, *(table.PRODUCTION if production else ()))
    found = report.examine(checks, host)
    if settings.json:
        output.json({"ok": found.is_good(strict=strict), "counts": found.counts(), "rows": found.rows})
    else:
        output.text(_shown(found, quiet=quiet))
    if not found.is_good(strict=strict):
        raise exits.SomeFailedError


def _shown(found: report.Report, *, quiet: bool) -> str:
    """A line for each row, the remedy under those that do not pass, and a sum."""
    rows = [*(row for row in found.rows if row.status not in _hidden(quiet)), *_folded(found)]
    width = max((len(row.check) for row in rows), default=0)
    lines = []
    for row in rows:
        mark = render.styled(row.status.upper(), _COLOURS[row.status], sys.stdout)
        detail = render.hanging(render.safe(row.detail), 10 + width)
        lines.append(f"{mark}   {row.check:<{width}}   {detail}")
        if row.remedy:
            lines.append(f"       {'':<{width}}   → {render.safe(row.remedy)}")
    if rows:
        lines.append("")
    lines += [_sum(found), *_score(found)]
    return "\n".join(lines)


def _hidden(quiet: bool) -> set[str]:
    return {"skip", "pass"} if quiet else {"skip"}


def _folded(found: report.Report) -> list[report.Row]:
    """One row for all that was kept from us by the same cause."""
    together: dict[tuple[str, str], list[report.Row]] = {}
    for row in found.rows:
        if row.status == "skip":
            together.setdefault((row.detail, row.remedy), []).append(row)
    return [
        msgspec.structs.replace(
            rows[0], check=f"{len(rows)} checks", detail=f"{why}: {', '.join(row.check for row in rows)}"
        )
        if len(rows) > 1
        else rows[0]
        for (why, _), rows in together.items()
    ]


def _sum(found: report.Report) -> str:
    counts = found.counts()
    if counts["pass"] == len(found.rows):
        return f"all {len(found.rows)} checks pass"
    said = [f"{counts['pass']} pass", f"{counts['warn']} warn", f"{counts['fail']} fail"]
    if counts["skip"]:
        said.append(f"{counts['skip']} could not be looked at")
    return ", ".join(said)


def _score(found: report.Report) -> list[str]:
    """How much of what is recommended for production hosts is met."""
    rows = [row for row in found.rows if row.feature == "production"]
    met = sum(row.status == "pass" for row in rows)
    return [f"production: {met} of {len(rows)} recommendations met"] if rows else []
