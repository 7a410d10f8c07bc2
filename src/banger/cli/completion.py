# SPDX-License-Identifier: MIT
"""`banger completion`: the script that makes a shell ask `banger` itself what fits, down to names of VMs."""

from __future__ import annotations

from typing import Final

import click

from banger.cli import command, output

_VARIABLE: Final = "_BANGER_COMPLETE"


@command.make(
    "completion",
    examples=[
        ('eval "$(banger completion bash)"', "in ~/.bashrc"),
        ('eval "$(banger completion zsh)"', "in ~/.zshrc, after compinit"),
        ("banger completion fish > ~/.config/fish/completions/banger.fish", "for fish"),
    ],
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that completes in your shell."""
    from click import shell_completion

    kind = shell_completion.get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"there is no completion for {shell}", ctx)
    script = kind(ctx.find_root().command, {}, "banger", _VARIABLE)
    output.text(script.source_template % script.source_vars())
