# SPDX-License-Identifier: MIT
"""`banger runtime`."""

from __future__ import annotations

import click

from banger.cli import command, exits, making, output, render
from banger.contract import resources

group = command.Group(
    "runtime",
    help="See to Firecracker and its jailer.",
    no_args_is_help=True,
    examples=[("banger runtime status", "what is here, and is it the right one")],
)


@command.make(
    "status", group=group, examples=[("banger runtime status", "a table; fails if a file is not right")]
)
@click.pass_obj
def status(settings: command.Settings) -> None:
    """Show the runtime files: which are here, their versions, and whether they are verified."""
    files = settings.client().get("/v1/runtime", list[resources.RuntimeFile])
    if settings.json:
        output.json(files)
    else:
        headers = ("NAME", "VERSION", "HERE", "VERIFIED", "SOURCE", "PATH")
        output.text(render.table(headers, map(_row, files)))
    if not all(file.present and file.verified for file in files):
        render.note("hint: `banger runtime pull` gets the files, `sudo banger system install` installs them")
        raise exits.SomeFailedError


def _row(file: resources.RuntimeFile) -> tuple[str, ...]:
    here, verified = (("no", "yes")[flag] for flag in (file.present, file.verified))
    return file.name, file.version or "-", here, verified, file.source or "-", file.path


@command.make("pull", group=group, examples=[("banger runtime pull", "into the daemon's cache, by sha256")])
@click.pass_obj
def pull(settings: command.Settings) -> None:
    """Get the pinned Firecracker and jailer into the daemon's cache.

    Root runs its own copies: `banger system install` puts them in place.
    """
    ended = making.ended(settings, "/v1/runtime/pull")
    if settings.json:
        output.json(ended)
    else:
        output.text(ended.detail or "the runtime files are in the cache")
