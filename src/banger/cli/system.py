# SPDX-License-Identifier: MIT
"""`banger system`. The work is in banger.system, which is imported only when it is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from banger.cli import command, output, progress, render
from banger.contract import errors, names, resources

group = command.Group(
    "system",
    help="Install banger on this host, look after it, take it off.",
    no_args_is_help=True,
    examples=[("sudo banger system install --owner alice", "set up both services for alice")],
)


_NO_BUILDER: Final = "no bangerd-build.socket; `sudo banger system install` sets it up"


@command.make(
    "install",
    group=group,
    examples=[
        ("sudo banger system install", "for the user who called sudo"),
        ("sudo banger system install --firecracker ./firecracker --jailer ./jailer", "with own files"),
    ],
)
@click.option("--owner", metavar="USER", default="", help="Whose daemon it is [default: who called sudo].")
@click.option(
    "--network", metavar="CIDR", default="", help=f"The VMs' addresses [default: {names.NETWORK}]."
)
@click.option("--network6", metavar="CIDR", default="", help="Those in IPv6 [default: the host's own].")
@click.option(
    "--firecracker",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Your own Firecracker [default: the pinned one, fetched].",
)
@click.option(
    "--jailer",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Your own jailer [default: the pinned one, fetched].",
)
@click.option("--pinned", is_flag=True, help="No more your own: the pinned Firecracker and jailer.")
@click.option(
    "--signers",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Who may sign releases: ssh-keygen's allowed signers.",
)
def install(
    owner: str,
    network: str,
    network6: str,
    firecracker: Path | None,
    jailer: Path | None,
    pinned: bool,
    signers: Path | None,
) -> None:
    """Set up both services on this host. Run again to mend or change it: VMs go on running.

    Where banger is installed, what is not said stays as it is.
    """
    from banger.system import choices, install

    given = {"firecracker": firecracker, "jailer": jailer}
    chosen = choices.Choices(
        owner=owner,
        caller=os.environ.get("SUDO_USER") or "root",
        network=network,
        network6=network6,
        programs={name: path.resolve() for name, path in given.items() if path is not None},
        pinned=pinned,
        signers=signers,
    )
    with _ended_by_signals("the installation"):
        owner = asyncio.run(install.Install(chosen, render.note).run())
    render.note(f"banger is installed for {owner}; next, as {owner}:")
    render.note("  banger vm run --rm -- uname -a")


@command.make(
    "upgrade",
    group=group,
    examples=[("sudo banger system upgrade ./banger-1.3.0", "a release's directory; VMs go on running")],
)
@click.argument("release", type=click.Path(exists=True, file_okay=False, path_type=Path))
def upgrade(release: Path) -> None:
    """Install a signed release beside this version, then switch to it. VMs go on running.

    What is not signed by one of this host's signers is refused, and so is what is older. Whatever fails, the
    version before comes back with its rows.
    """
    from banger.system import machine, upgrade

    if os.geteuid() != 0:
        raise errors.UnauthorizedError("upgrading needs root", hint="run it with sudo")
    with _ended_by_signals("the upgrade"):
        asyncio.run(upgrade.Upgrade(release.resolve(), machine.Machine(), render.note).run())


@contextlib.contextmanager
def _ended_by_signals(what: str) -> Iterator[None]:
    """A task that a signal cancelled is no fault; its notes tell what could not be taken back."""
    try:
        yield
    except asyncio.CancelledError as error:
        ended = errors.CancelledError(f"{what} was ended by a signal")
        for note in getattr(error, "__notes__", ()):
            ended.add_note(note)
        raise ended from None


@command.make("status", group=group, examples=[("banger system status", "do both services answer")])
@click.pass_obj
def status(settings: command.Settings) -> None:
    """Say whether both services answer, and in which versions."""
    info = settings.client().get("/v1/info", resources.DaemonInfo)
    if settings.json:
        output.json(info)
        return
    output.text(
        f"bangerd:      {info.version}, pid {info.pid}, since {info.started_at:%Y-%m-%d %H:%M:%S} UTC"
    )
    output.text(f"bangerd-root: {info.helper_version or 'does not answer'}")
    output.text(f"builds:       {'each in a unit of its own' if info.can_build else _NO_BUILDER}")
    output.text(f"firecracker:  {info.firecracker_version or 'not installed'}")
    if info.dns is not None:
        for line in _dns_lines(info.dns):
            output.text(line)


def _dns_lines(dns: resources.DnsStatus) -> list[str]:
    routed = (
        "asked by this host for .vm"
        if dns.routed
        else f"not asked by this host: {dns.problem or 'no VM yet'}"
    )
    lines = [f"dns:          {dns.listen or 'off'} ({dns.listen_source}), {routed}"]
    if dns.guests:
        asked = ", ".join(dns.upstream) or "nobody"
        lines.append(f"guests' dns:  {dns.guests}, asks {asked} ({dns.upstream_source})")
    return lines


@command.make("restart", group=group, examples=[("sudo banger system restart", "VMs go on running")])
def restart() -> None:
    """Restart both services. VMs go on running."""
    from banger.system import host

    if os.geteuid() != 0:
        raise errors.UnauthorizedError("restarting needs root", hint="run it with sudo")
    host.systemctl("stop", "bangerd-root.service")
    host.systemctl("restart", "bangerd.service")


@command.make(
    "stop-vms",
    group=group,
    examples=[("banger system stop-vms", "before the host is taken down by hand")],
)
@click.pass_obj
def stop_vms(settings: command.Settings) -> None:
    """Stop all VMs in order. systemd does this by itself when the host goes down.

    Those with --autostart start again when the host has restarted.
    """
    api = settings.client()
    shown = progress.display(json=settings.json)
    try:
        outcome = progress.follow_one(api, lambda: api.post("/v1/host/stop-vms"), shown, cancellable=False)
    finally:
        shown.close()
    outcome.require()


@command.make(
    "uninstall",
    group=group,
    examples=[
        ("sudo banger system uninstall", "keeps VMs, images and settings"),
        ("sudo banger system uninstall --purge", "the host is as before"),
    ],
)
@click.option("--purge", is_flag=True, help="Also delete VMs, images, caches, settings and banger itself.")
@click.option("--force", is_flag=True, help="End the VMs that run.")
def uninstall(purge: bool, force: bool) -> None:
    """Take banger off this host.

    Refused while VMs run; --force ends them. ~/.ssh is not touched: `banger ssh-config --uninstall` before.
    """
    from banger.system import uninstall

    uninstall.uninstall(purge=purge, force=force, say=render.note)
    render.note("banger is off this host")
