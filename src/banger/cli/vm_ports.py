# SPDX-License-Identifier: MIT
"""`banger vm ports|publish|unpublish`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import click

from banger.cli import client, command, output, params, render
from banger.contract import ports, resources

_NAME: Final = click.argument("name", type=params.VM)


@command.make("ports", examples=[("banger vm ports web", "what listens in it, and where you reach it")])
@_NAME
@click.pass_obj
def show_ports(settings: command.Settings, name: str) -> None:
    """Show the ports on which a VM listens, and those that are published.

    With process, address, and where this host reaches it: a link when it answers HTTP.
    """
    found = settings.client().get(f"/v1/vms/{client.segment(name)}/ports", list[ports.GuestPort])
    if settings.json:
        output.json(found)
    else:
        headers = ("PROTOCOL", "ADDRESS", "PORT", "PROCESS", "REACHED AT", "PUBLISHED")
        output.text(render.table(headers, map(_row, found)))


def _row(port: ports.GuestPort) -> Sequence[str]:
    published = ", ".join(port.published) or "-"
    if not port.address:
        return port.protocol, "-", str(port.port), "nothing listens", "-", published
    process = f"{port.process} ({port.pid})" if port.pid else "-"
    return port.protocol, port.address, str(port.port), process, port.url or port.target or "-", published


@command.make(
    "publish",
    examples=[
        ("banger vm publish web 8080:80", "http://127.0.0.1:8080/ is the guest's port 80"),
        ("banger vm publish web 0.0.0.0:8080:80 5353:53/udp", "for others too, and UDP"),
    ],
)
@_NAME
@click.argument(
    "specs", metavar="[ADDR:]HOSTPORT:GUESTPORT[/udp]…", nargs=-1, required=True, type=params.PUBLISH
)
@click.pass_obj
def publish(settings: command.Settings, name: str, specs: tuple[str, ...]) -> None:
    """Offer ports of a VM on this host.

    At once when it runs, and at every start from now on. On loopback unless an address is given. A guest
    without network is reached through its agent.
    """
    _change(settings, name, ports.ChangePorts(publish=specs))


@command.make(
    "unpublish",
    examples=[
        ("banger vm unpublish web 8080:80", "as it was published"),
        ("banger vm unpublish web 8080", "whatever is published at this host's port 8080"),
    ],
)
@_NAME
@click.argument(
    "specs",
    metavar="HOSTPORT[/udp]|[ADDR:]HOSTPORT:GUESTPORT[/udp]…",
    nargs=-1,
    required=True,
    type=params.PUBLISHED,
)
@click.pass_obj
def unpublish(settings: command.Settings, name: str, specs: tuple[str, ...]) -> None:
    """Take back ports that were published. Connections that stand are cut."""
    published = settings.client().get(f"/v1/vms/{client.segment(name)}", resources.Vm).publish
    known, gone = ports.parse_all(published), set[str]()
    for spec in specs:
        meant = ports.named(spec, known)
        if not meant:
            render.note(f"{name} does not publish {spec}")
        gone.update(map(str, meant))
    _change(settings, name, ports.ChangePorts(unpublish=tuple(sorted(gone))))


def _change(settings: command.Settings, name: str, asked: ports.ChangePorts) -> None:
    changed = settings.client().patch(f"/v1/vms/{client.segment(name)}/ports", asked, resources.Vm)
    if settings.json:
        output.json(changed)
    else:
        output.text("".join(f"{each}\n" for each in changed.publish))
        for each, why in changed.unpublished.items():
            render.note(f"{each} is not published yet, and tried again: {why}")
