# SPDX-License-Identifier: MIT
"""`banger completion`: the script that makes a shell ask `banger` itself what fits, down to names of VMs."""

from __future__ import annotations

from typing import Final

import click

from banger.cli import command, output

_VARIABLE: Final = "_BANGER_COMPLETE"
_BASH: Final = """\
%(complete_func)s() {
    local IFS=$'\\n' words=() at completion response type value has_files=
    # What the shell takes for three words, web : /etc, is one to us.
    for ((at = 0; at <= COMP_CWORD; at++)); do
        if ((at > 0)) && [[ ${COMP_WORDS[at]} == :* || ${words[-1]} == *: ]]; then
            words[-1]+=${COMP_WORDS[at]}
        else
            words+=("${COMP_WORDS[at]}")
        fi
    done
    local word=${words[-1]}
    local before=${word%%"${word##*:}"}
    [[ $COMP_WORDBREAKS == *:* ]] || before=

    at=$((${#words[@]} - 1))
    response=$(env COMP_WORDS="${words[*]}" COMP_CWORD=$at %(complete_var)s=bash_complete $1)

    for completion in $response; do
        IFS=',' read -r type value <<< "$completion"
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default; has_files=1 ;;
            plain) printf -v value %%q "$value"; COMPREPLY+=("${value#"$before"}") ;;
        esac
    done
    if [[ $has_files && ${#COMPREPLY[@]} -gt 0 ]]; then
        while read -r value; do
            [[ -d $value ]] && value+=/
            printf -v value %%q "$value"
            COMPREPLY+=("$value")
        done < <(compgen -f -- "$word")
    fi
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[:/] ]] && compopt -o nospace
    return 0
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""
"""click's own, but for words with a colon: a place in a VM is completed too."""


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
    template = _BASH if shell == "bash" else script.source_template
    output.text(template % script.source_vars())
