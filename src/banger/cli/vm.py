# SPDX-License-Identifier: MIT
"""`banger vm`: the table of its commands; each module is imported when one of its commands is used."""

from __future__ import annotations

from typing import Final

from banger.cli import command

_LIFE: Final = "banger.cli.vm_life"
_LOOK: Final = "banger.cli.vm_look"
_PORTS: Final = "banger.cli.vm_ports"
_RUN: Final = "banger.cli.vm_run"
_SSH: Final = "banger.cli.ssh"

NOUNS: Final = {
    "run": command.Noun(_RUN, "Create and start a VM and run a command in it.", "run"),
    "create": command.Noun(_LIFE, "Create a VM and start it.", "create"),
    "start": command.Noun(_LIFE, "Start VMs.", "start"),
    "stop": command.Noun(_LIFE, "Stop VMs, losing nothing that they wrote.", "stop"),
    "restart": command.Noun(_LIFE, "Stop VMs and start them again.", "restart"),
    "kill": command.Noun(_LIFE, "End VMs at once, as if their power failed.", "kill"),
    "delete": command.Noun(_LIFE, "Delete VMs and their disks, stopping them first.", "delete"),
    "set": command.Noun(
        _LIFE, "Change a VM's name, size or kernel, what it reaches, or how long it runs.", "change"
    ),
    "extend": command.Noun(
        _LIFE, "Give running VMs more time before --ttl or --idle-stop stops them.", "extend"
    ),
    "list": command.Noun(_LOOK, "List VMs, or only those that are named.", "list_vms"),
    "show": command.Noun(_LOOK, "Show everything about VMs.", "show"),
    "logs": command.Noun(_LOOK, "Show a VM's console, or what its VMM says.", "logs"),
    "stats": command.Noun(_LOOK, "Show what running VMs use.", "stats"),
    "cp": command.Noun("banger.cli.vm_copy", "Copy files and directories into a VM, or out of it.", "copy"),
    "console": command.Noun(_LOOK, "Watch a VM's serial console.", "console"),
    "workspace": command.Noun(
        "banger.cli.vm_workspace", "Take a repository into a VM, and its changes back out."
    ),
    "ports": command.Noun(
        _PORTS, "Show the ports on which a VM listens, and those that are published.", "show_ports"
    ),
    "publish": command.Noun(_PORTS, "Offer ports of a VM on this host.", "publish"),
    "unpublish": command.Noun(_PORTS, "Take back ports that were published.", "unpublish"),
    "explain": command.Noun(
        "banger.cli.vm_explain",
        "Say how a VM is, why, and where the time of its last start went.",
        "explain",
    ),
    "prune": command.Noun(
        "banger.cli.vm_prune", "Delete the VMs that do not run, and their disks.", "prune"
    ),
    "exec": command.Noun(_RUN, "Run a command in a running VM.", "execute"),
    "ssh": command.Noun(_SSH, "Log in to a running VM with ssh, as root.", "ssh"),
    "proxy": command.Noun(
        _SSH, "Connect stdin and stdout to a port of a running VM, with or without network.", "proxy"
    ),
}

group = command.LazyGroup(
    name="vm",
    help="Create, run and look after VMs.",
    nouns=NOUNS,
    no_args_is_help=True,
    examples=[
        ("banger vm run --rm -- uname -a", "a command in a VM that is gone afterwards"),
        ("banger vm create web --memory 2G", "a VM that stays"),
        ("banger vm exec web -- make check", "a command in it"),
        ("banger vm delete web", "the VM and its disks"),
    ],
)
