# SPDX-License-Identifier: MIT
"""`banger version`."""

from __future__ import annotations

import click

import banger
from banger.cli import command, output, render
from banger.contract import errors, resources


@command.make(
    "version", examples=[("banger version", "also of what answers"), ("banger version --json", "")]
)
@click.pass_obj
def version(settings: command.Settings) -> None:
    """Show the versions of banger and its daemon.

    A daemon that does not answer is said so, and is no error here.
    """
    info: resources.DaemonInfo | None = None
    why = ""
    try:
        info = settings.client().get("/v1/info", resources.DaemonInfo, timeout_s=5)
    except errors.BangerError as error:
        why = error.message
    if settings.json:
        output.json({"banger": banger.__version__, "daemon": info})
    elif info is None:
        output.text(render.facts([("banger", banger.__version__), ("bangerd", why)]))
    else:
        rows = [
            ("banger", banger.__version__),
            ("bangerd", info.version),
            ("bangerd-root", info.helper_version or "does not answer"),
            ("firecracker", info.firecracker_version or "not installed"),
        ]
        output.text(render.facts(rows))
