# SPDX-License-Identifier: MIT
"""Writes docs/cli.md from the commands themselves: `python -m banger.cli.reference > docs/cli.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from banger.cli import main as cli

_WIDTH = 100


def reference() -> str:
    """The page as it should be; a test compares it with the one in the tree."""
    lines = ["# Commands", "", "Made from the program's own help. Every command also takes `--json`.", ""]
    for path, command in _commands(cli.root, "banger"):
        settings = {**command.context_settings, "max_content_width": _WIDTH, "terminal_width": _WIDTH}
        context = click.Context(command, info_name=path, **settings)
        lines += [f"## {path}", "", "```", *command.get_help(context).splitlines(), "```", ""]
    return "\n".join(lines)


def _commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, group
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None or command.hidden:
            continue
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


if __name__ == "__main__":
    sys.stdout.write(reference())
