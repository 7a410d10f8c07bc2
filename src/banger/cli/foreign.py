# SPDX-License-Identifier: MIT
"""Words that docker, lima, incus, git and others have for what is called otherwise here, or not done.

A guess by spelling can name a command that destroys: `pause` is near `prune`, `top` near `stop`. Loaded only
for a command line that cannot be.
"""

from __future__ import annotations

from typing import Final

import click

_MOUNTS: Final = (
    "VMs share no directory with this host: `banger vm run PATH` sends a repository, `banger vm cp` files"
)
_CHANGED: Final = "`banger vm set NAME` changes a VM; `banger vm set --help` says what of it"
_KEPT: Final = (
    "a VM is not copied or saved: what new ones are to have belongs into an image, `banger image --help`"
)
_STILL: Final = "a VM is not paused: `banger vm stop` keeps its disks, `banger vm start` goes on with them"
_MADE: Final = "`banger vm create [NAME] --image IMAGE` makes a VM; `banger vm run` one with a shell"
_FILES: Final = (
    "`banger vm cp` copies files both ways; `banger vm workspace pull NAME` brings a repository's work"
)
_HOST: Final = "`banger ps` shows what runs, `banger system status` the services, `banger doctor` this host"

_DEVICES: Final = "a VM has no device of this host: what it has is a disk, a network and a clock"
_STARTS: Final = "it ends when the guest answers; /etc/banger/config.toml says when at the latest: "
_STOPS: Final = "it waits for the guest; /etc/banger/config.toml says for how long: "
_WAITS: Final = {
    **dict.fromkeys(("create", "start", "restart"), f"{_STARTS}`agent_deadline_s`"),
    "stop": f"{_STOPS}`flush_deadline_s`, `power_off_deadline_s`",
}
"""How long is waited, by command."""

COMMANDS: Final = {
    "banger": {
        **dict.fromkeys(("status", "info"), _HOST),
        **dict.fromkeys(("launch", "new", "up"), _MADE),
        **dict.fromkeys(("volume", "mount"), _MOUNTS),
        "network": "VMs that say the same `--network NAME` reach each other: `banger vm create --help`",
        "login": "the logins of docker and podman are used: `docker login`, `podman login`, `skopeo login`",
        "config": "settings are in /etc/banger/config.toml; `bangerd --check-config` says what they come to",
        "vms": "`banger vm list` shows them",
        "kernels": "`banger kernel list` shows them",
        "load": "`banger image import` takes what `docker save` wrote",
        "install": "`sudo banger system install` sets up both services",
        "uninstall": "`sudo banger system uninstall` takes banger off this host",
        **dict.fromkeys(("update", "upgrade"), "`sudo banger system upgrade` installs another version"),
    },
    "vm": {
        **dict.fromkeys(
            ("rename", "mv", "move"), "`banger vm set old --name new` renames one that does not run"
        ),
        **dict.fromkeys(("edit", "config", "update", "resize", "modify"), _CHANGED),
        **dict.fromkeys(("snapshot", "clone", "commit", "save", "checkpoint"), _KEPT),
        **dict.fromkeys(("pause", "unpause", "suspend", "resume", "freeze"), _STILL),
        **dict.fromkeys(("launch", "new", "add"), _MADE),
        **dict.fromkeys(("push", "pull", "file", "files", "scp"), _FILES),
        **dict.fromkeys(("diff", "export", "prepare"), "`banger vm workspace` has it, for repositories"),
        **dict.fromkeys(("mount", "volume"), _MOUNTS),
        "status": "`banger vm list` shows all, `banger vm show NAME` one, `banger vm explain NAME` why",
        "attach": "`banger vm exec NAME` is a shell in it, `banger vm console NAME` its console",
        "wait": "`banger vm create` and `start` end when the guest answers, `vm exec` with its command",
    },
    "image": {
        "tag": "`banger image promote IMAGE --name NAME` gives one another name",
        "load": "`banger image import` takes what `docker save` wrote",
        "push": "images are not pushed: docker pushes what it builds, and `banger image pull` gets it",
        "prune": "`banger image delete NAME…` deletes images; `banger image cache prune` what was fetched",
    },
    "kernel": {"prune": "`banger kernel delete NAME…` deletes kernels"},
    "system": {
        "prune": "`banger vm prune`, `banger image cache prune`, and `banger gc` for what crashes left"
    },
}
"""By group, what to say of a word that is no command of it."""

OPTIONS: Final = {
    **dict.fromkeys(("--cpus", "--cpu", "-c"), "--vcpu"),
    **dict.fromkeys(("-m", "--mem"), "--memory"),
    **dict.fromkeys(("--disk", "--storage"), "--disk-size"),
    **dict.fromkeys(("-w", "--workdir"), "--cwd"),
    "--hostname": "--name",
    "--net": "--network",
    **dict.fromkeys(("-t", "--tag"), "--name"),
    "--restart": "--autostart",
    "--filter": "--name",
}
"""What an option is called here, of a command that has it."""


def of_command(group: str, word: str) -> str:
    """What to do instead of this word, which is no command of the group; empty where nobody knows."""
    return COMMANDS.get(group, {}).get(word, "")


def of_option(command: click.Command, option: str) -> str:
    """The same of an option that this command has not."""
    known = {name for each in command.params for name in each.opts}
    ours = OPTIONS.get(option, "")
    if ours in known:
        return f"it is `{ours}`"
    if option in ("-v", "--volume", "--mount"):
        return _MOUNTS
    if option in ("--gpus", "--gpu", "--device"):
        return _DEVICES
    if option in ("-f", "--force") and command.name in {"stop", "restart"}:
        return "`banger vm kill` ends a VM at once, as if its power failed"
    if option in ("--timeout", "--wait", "--wait-timeout"):
        return _WAITS.get(command.name or "", "")
    if option == "--rm" and command.name == "create":
        return "`banger vm run --rm` makes a VM that is gone with its command"
    if option in ("-a", "--all") and command.name in {"start", "stop", "restart", "kill", "delete"}:
        return f"it takes names, and `banger vm list -q` prints all: {command.name} $(banger vm list -q)"
    return ""
