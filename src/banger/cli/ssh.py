# SPDX-License-Identifier: MIT
"""`banger vm ssh`, `banger vm proxy` and `banger ssh-config`. The work is OpenSSH's."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Final, NoReturn

import click

from banger.cli import client, command, exits, output, params, ssh_config, tunnel
from banger.contract import errors, reach, resources

_WITH_VALUE: Final = "BbcDEeFIiJLlmOopQRSWw"
"""The options of ssh(1) that take a value, of OpenSSH 9.2."""


def _program() -> tuple[str, ...]:
    """This program by its path, as ssh's shell will start it; as a module when it runs as one."""
    found = shutil.which(sys.argv[0])
    return (os.path.abspath(found),) if found else (sys.executable, "-I", "-m", "banger.cli.start")


def _proxy(settings: command.Settings) -> str:
    return ssh_config.proxy_command(_program(), settings.socket or os.environ.get("BANGER_SOCKET", ""))


def _access(settings: command.Settings) -> reach.SshAccess:
    return settings.client().get("/v1/ssh", reach.SshAccess)


def _found(settings: command.Settings, ref: str) -> resources.Vm:
    return settings.client().get(f"/v1/vms/{client.segment(ref)}", resources.Vm)


def _running(settings: command.Settings, ref: str) -> resources.Vm:
    vm = _found(settings, ref)
    if not vm.has_vmm:
        hint = f"start it: `banger vm start {vm.name}`"
        raise errors.NotRunningError(f"{vm.name} is not running", hint=hint)
    return vm


def _require_name(settings: command.Settings, ref: str) -> None:
    """ssh pins a host key under what it is given; it is a VM's name that is forgotten with the VM."""
    vm = _found(settings, ref)
    if vm.name != ref:
        hint = f"ssh knows VMs by their names alone: `ssh {vm.name}.vm`"
        raise errors.NotFoundError(f"there is no VM named {ref}", hint=hint)


class _Ssh(command.TailCommand):
    """What stands behind the VM's name is for ssh."""

    options_anywhere = False


@command.make(
    "ssh",
    cls=_Ssh,
    examples=[
        ("banger vm ssh web", "a shell over ssh, with or without network"),
        ("banger vm ssh web make check", "a command; its exit status is yours"),
        ("banger vm ssh web -o ForwardAgent=yes", "options of ssh go after the name"),
    ],
)
@click.argument("name", type=params.VM)
@click.argument("words", metavar="[SSH-OPTION…] [[--] CMD…]", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def ssh(ctx: click.Context, /, name: str, words: tuple[str, ...], argv: tuple[str, ...]) -> NoReturn:
    """Log in to a running VM with ssh, as root.

    Uses banger's own key and host keys and no configuration of yours. The command begins at `--`, or at the
    first word that is no option of ssh; its words arrive in the guest as given. A guest whose image has no
    ssh server is reached by `banger vm exec`.
    """
    settings = ctx.ensure_object(command.Settings)
    options, bare = _split(words)
    if bare and ctx.meta["banger.has_tail"]:
        raise click.UsageError(f"{bare[0]!r} stands between ssh's options and --", ctx)
    with exits.failures_as(exits.BEFORE_COMMAND):
        if shutil.which("ssh") is None:
            raise errors.MissingToolError("ssh is not installed", hint="install the package openssh-client")
        vm = _running(settings, name)
        known = ssh_config.options(_access(settings), _proxy(settings))
    given = [part for key, value in known for part in ("-o", f"{key}={value}")]
    tail = [shlex.join(argv or bare)] if argv or bare else []
    # What comes first wins, so the user's options do.
    os.execvp("ssh", ["ssh", "-F", "none", *options, *given, f"{vm.name}.vm", *tail])  # noqa: S606, S607


def _split(words: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """ssh's options, and the command behind them, as ssh itself reads what follows a host's name."""
    at = 0
    while at < len(words) and len(words[at]) > 1 and words[at].startswith("-"):
        letters = words[at][1:]
        first = next((place for place, letter in enumerate(letters) if letter in _WITH_VALUE), None)
        at += 2 if first == len(letters) - 1 else 1
    return words[:at], words[at:]


@command.make(
    "proxy",
    examples=[
        ("ssh -o ProxyCommand='banger vm proxy web' root@web", "ssh through the daemon"),
        ("banger vm proxy web 8080", "a connection to another port of the guest"),
    ],
)
@click.argument("name")
@click.argument("port", type=click.IntRange(1, 65535), default=22)
@click.option(
    "--wait",
    metavar="SECONDS",
    type=click.FloatRange(0, 120),
    default=0,
    show_default=True,
    help="How long a booting guest may take to answer.",
)
@click.pass_obj
def proxy(settings: command.Settings, name: str, port: int, wait: float) -> None:
    """Connect stdin and stdout to a port of a running VM, with or without network.

    NAME may be `NAME.vm` too, as ssh has it. Made for ssh's ProxyCommand.
    """
    vm = params.VM.convert(name.removesuffix(".vm"), None, None)
    if vm != name:
        _require_name(settings, vm)
    tunnel.run(settings.client(), vm, reach.ConnectRequest(port=port, wait_s=wait))


@command.make(
    "ssh-config",
    examples=[
        ("banger ssh-config --install", "`ssh NAME.vm`, scp, rsync and editors reach every VM"),
        ("banger ssh-config --uninstall", "takes exactly that away again"),
        ("banger ssh-config > guests.conf", "to include it yourself"),
    ],
)
@click.option("--install", is_flag=True, help="Include it in ~/.ssh/config.")
@click.option("--uninstall", is_flag=True, help="Take that away again.")
@click.option("--stdout", is_flag=True, help="Print it [default].")
@click.pass_obj
def configure(settings: command.Settings, install: bool, uninstall: bool, stdout: bool) -> None:
    """Let ssh, scp, rsync and editors reach every VM as NAME.vm.

    Your ~/.ssh/config is touched by --install and --uninstall only: a fenced block at its top includes
    ~/.ssh/banger.conf. Whatever else it holds stays as it is.
    """
    if install + uninstall + stdout > 1:
        raise click.UsageError("--install, --uninstall and --stdout exclude each other")
    place = ssh_config.Install(Path.home())
    if uninstall:
        _say(settings, place.uninstall(), "removed", "nothing to remove")
        return
    content = ssh_config.text(_access(settings), _proxy(settings))
    if install:
        _say(settings, place.install(content), "installed: try `ssh NAME.vm`", "installed already")
    elif settings.json:
        output.json({"config": content})
    else:
        sys.stdout.write(content)


def _say(settings: command.Settings, changed: bool, done: str, otherwise: str) -> None:
    if settings.json:
        output.json({"changed": changed})
    else:
        output.text(done if changed else otherwise)
