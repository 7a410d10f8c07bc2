# SPDX-License-Identifier: MIT
"""The root of `banger`: the table of nouns, and the edge where errors become messages and statuses."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

import banger
from banger.cli import command

if TYPE_CHECKING:
    from banger.contract import errors

NOUNS: Final = {
    "vm": command.Noun("banger.cli.vm", "Create, run and look after VMs."),
    "ps": command.Noun("banger.cli.vm_look", "List the VMs that are running.", "ps"),
    "image": command.Noun("banger.cli.image", "Get, build and keep the images that VMs are made from."),
    "kernel": command.Noun("banger.cli.kernel", "Get and keep the kernels that VMs boot."),
    "runtime": command.Noun("banger.cli.runtime", "See to Firecracker and its jailer."),
    "ssh-config": command.Noun(
        "banger.cli.ssh", "Let ssh, scp, rsync and editors reach every VM as NAME.vm.", "configure"
    ),
    "system": command.Noun("banger.cli.system", "Install banger on this host, look after it, take it off."),
    "doctor": command.Noun(
        "banger.cli.doctor", "Look whether this host has all that VMs need, and what to do.", "doctor"
    ),
    "gc": command.Noun("banger.cli.gc", "Look for what crashes left behind, and take it away.", "gc"),
    "audit": command.Noun("banger.cli.audit", "Show what root was asked, and what came of it.", "audit"),
    "version": command.Noun("banger.cli.version", "Show the versions of banger and its daemon.", "version"),
    "completion": command.Noun(
        "banger.cli.completion", "Print a script that completes in your shell.", "completion"
    ),
}


_OF_IMAGES: Final = {"images": "list", "pull": "pull", "build": "build"}


class _Root(command.LazyGroup):
    """Who leaves out `vm` or `image` is told."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.nouns and not ctx.resilient_parsing:
            from banger.cli import foreign, vm

            if args[0] in _OF_IMAGES:
                meant = f"{ctx.command_path} image {_OF_IMAGES[args[0]]}"
                raise click.UsageError(f"no command {args[0]!r} here; it is `{meant}`", ctx)
            verb = command.ALIASES.get(args[0], args[0])
            if verb in vm.NOUNS and not foreign.of_command("banger", args[0]):
                raise click.UsageError(
                    f"no command {args[0]!r} here; it is `{ctx.command_path} vm {verb}`", ctx
                )
        return super().resolve_command(ctx, args)


def _show_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"banger {banger.__version__}")
        ctx.exit()


root = _Root(
    name="banger",
    help="One-command development machines on Firecracker microVMs.",
    nouns=NOUNS,
    no_args_is_help=True,
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_show_version,
            help="Print the version of this program; `banger version` says the daemon's too.",
        )
    ],
    examples=[
        ("banger vm run", "a shell in a new VM"),
        ("banger vm run --rm -- make check", "a command in a VM that is gone afterwards"),
        ("banger vm list --json", "every command speaks JSON"),
    ],
)


def run(arguments: Sequence[str]) -> int:
    """The exit status of one command line."""
    settings = command.Settings()
    try:
        status = root.main(args=list(arguments), prog_name="banger", standalone_mode=False, obj=settings)
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        # click exits by itself when it has completed a word, and on EPIPE.
        completed = isinstance(error, SystemExit) and "_BANGER_COMPLETE" in os.environ
        return 0 if completed else _broken_pipe()
    except (KeyboardInterrupt, click.Abort):
        from banger.contract import errors

        if "_BANGER_COMPLETE" in os.environ:  # a shell asks, and what we say would stand in its user's line
            return 130
        return _report(errors.CancelledError("interrupted"), 130, json=settings.json)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.message)
        return 2
    except click.ClickException as error:
        return _refused(error, json=settings.json or _asks_for_json(arguments))
    except BaseException as error:
        return _failed(error, json=settings.json)
    return status if isinstance(status, int) else 0


def _failed(error: BaseException, *, json: bool) -> int:
    from banger.cli import exits
    from banger.contract import errors

    match error:
        case exits.CommandEnd():
            return error.status
        case exits.SomeFailedError():
            return exits.FAILED
        case exits.SignalledError():
            ended = errors.CancelledError(f"ended by signal {error.number}")
            return _report(ended, 128 + error.number, json=json)
        case exits.FailedError():
            return _report(error.error, error.status, json=json)
        case errors.BangerError():
            return _report(error, exits.status_of(error), json=json)
    if (lacking := errors.exhausted(error)) is not None:
        return _report(lacking, exits.status_of(lacking), json=json)
    if os.environ.get("BANGER_DEBUG"):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, OSError) and (refused := _of_path(error)) is not None:
        return _report(refused, exits.FAILED, json=json)
    fault = errors.OperationFailedError(
        f"unexpected error: {type(error).__name__}: {error}",
        hint="this is a fault in banger; BANGER_DEBUG=1 shows where",
    )
    return _report(fault, exits.FAILED, json=json)


def _of_path(error: OSError) -> errors.BangerError | None:
    """A path of the user's that cannot be used, or that the directory they are in is gone."""
    import errno

    from banger.contract import errors

    if error.filename is None:
        with contextlib.suppress(FileNotFoundError):
            os.getcwd()
            return None
        return errors.OperationFailedError("the directory that you are in is gone", hint="go to another")
    if error.errno not in (
        errno.EACCES,
        errno.EPERM,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
    ):
        return None
    return errors.OperationFailedError(f"{os.fsdecode(error.filename)}: {error.strerror}")


def _report(error: errors.BangerError, status: int, *, json: bool) -> int:
    from banger.cli import render

    print(render.error_json(error) if json else render.describe(error, sys.stderr), file=sys.stderr)
    return status


def _refused(error: click.ClickException, *, json: bool) -> int:
    """A command line that cannot be."""
    from banger.contract import errors

    hint = ""
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx is not None else "banger"
        hint = f"see `{where} --help`"
    text = error.format_message().replace("\n\t", " ")  # choices, which click has on lines of their own
    known = errors.BadRequestError(text, hint=hint)
    return _report(known, error.exit_code, json=json)


def _asks_for_json(arguments: Sequence[str]) -> bool:
    """Of a command line that click could not read to its end: what follows `--` is the user's own."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return "--json" in arguments[:end]


def _broken_pipe() -> int:
    """Whoever read our output has gone; as if SIGPIPE had ended us. Nothing may be flushed any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 141


if __name__ == "__main__":
    from banger.cli import start

    start.main()
