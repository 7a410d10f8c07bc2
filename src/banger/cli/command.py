# SPDX-License-Identifier: MIT
"""What every command has: examples in its help, and the root's options, also after its own name.

Start-up time is felt, so the nouns are modules that are imported only when they are used; the tables that
name them carry the help texts, so that `banger --help` and completion import none.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from banger.cli import client

_F = TypeVar("_F", bound=Callable[..., Any])
DEFAULT_SOCKET: Final = "/run/banger/bangerd.sock"
ALIASES: Final = {
    "rm": "delete",
    "ls": "list",
    "inspect": "show",
    "shell": "exec",
    "copy": "cp",
    "port": "ports",
    "ps": "list",
    "top": "stats",
    "info": "show",
}
HELP: Final = "help"
_HELP: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Settings:
    """The root's options. Given anywhere on the command line they mean the same."""

    def __init__(self) -> None:
        self.json = False
        self.socket = ""

    def client(self) -> client.Client:
        from banger.cli import client

        return client.Client(self.socket or os.environ.get("BANGER_SOCKET") or DEFAULT_SOCKET)


class Noun(NamedTuple):
    """A command or group that is imported when it is used. `summary` is the first line of its help."""

    module: str
    summary: str
    attribute: str = "group"


def _set_json(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Settings).json = True


def _set_socket(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value:
        ctx.ensure_object(Settings).socket = value


def _common_options() -> list[click.Parameter]:
    json_option = click.Option(
        ["--json"], is_flag=True, expose_value=False, callback=_set_json, help="Print JSON, for programs."
    )
    socket_option = click.Option(
        ["--socket"],
        metavar="PATH",
        expose_value=False,
        callback=_set_socket,
        help="The daemon's socket [default: $BANGER_SOCKET, else /run/banger/bangerd.sock].",
    )
    return [json_option, socket_option]


class _Documented(click.Command):
    """Help ends with examples."""

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **kwargs: Any) -> None:
        kwargs["context_settings"] = _HELP | dict(kwargs.get("context_settings") or {})
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        self.params += _common_options()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            from banger.cli import foreign

            if said := foreign.of_option(self, error.option_name):
                raise click.UsageError(f"no option {error.option_name!r} here: {said}", ctx) from None
            raise
        except click.UsageError as error:
            error.ctx = error.ctx or ctx  # whose help tells more
            raise

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                formatter.write_dl([(line, what) for line, what in self.examples], col_max=52)


class Command(_Documented):
    """A command of banger."""


class TailCommand(Command):
    """A command that ends in the user's own: what follows `--` arrives untouched as the parameter `argv`.

    Without `--` nothing after the first positional argument is read as an option, for it may be the user's.
    """

    options_anywhere = True
    """With `--`, options may also stand between the first positional argument and it."""
    words_are_ours = False
    """The user's own command always comes after `--`, so options may stand anywhere before."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        has_tail = "--" in args
        cut = args.index("--") if has_tail else len(args)
        tail = args[cut + 1 :]
        ctx.allow_interspersed_args = self.words_are_ours or (has_tail and self.options_anywhere)
        ctx.params["argv"] = tuple(tail)
        ctx.meta["banger.has_tail"] = has_tail
        return super().parse_args(ctx, args[:cut])


class PathCommand(TailCommand):
    """One that takes a path, and the user's own command only after `--`."""

    words_are_ours = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            at = self._first_word(given)
            if "--" in given or any(word.startswith(error.option_name) for word in given[:at]):
                raise
            import shlex

            meant = f"{ctx.command_path} {shlex.join([*given[:at], '--', *given[at:]])}"
            said = error.format_message().rstrip(".")
            raise click.UsageError(f"{said}; a command comes after --: `{meant}`", ctx) from None

    def _first_word(self, given: Sequence[str]) -> int:
        """Where the user's command begins: behind our options, their values, and the path."""
        options = [each for each in self.params if isinstance(each, click.Option) and not each.is_flag]
        with_value = {name for each in options for name in each.opts}
        at = 0
        while at < len(given) and given[at].startswith("-"):
            at += 2 if given[at] in with_value else 1
        return at + 1 if at < len(given) and os.path.isdir(given[at]) else min(at, len(given))


class _Aliased(_Documented, click.Group):
    """Knows what docker, lima and others call the same, which no help shows."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        meant = ALIASES.get(args[0])
        known = self.list_commands(ctx)
        if args[0] not in known and meant in known:
            args = [meant, *args[1:]]
        elif args[0] == HELP and not ctx.resilient_parsing:
            if not args[1:]:
                click.echo(ctx.get_help())
                ctx.exit()
            args = [*args[1:], "--help"]
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:
            from banger.cli import foreign

            if said := foreign.of_command(self.name or "", error.command_name):
                raise click.UsageError(f"no command {error.command_name!r} here: {said}", ctx) from None
            raise


class Group(_Aliased):
    """Commands declared in the group's own module."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Their first sentences whole, which click cuts to one line."""
        with formatter.section("Commands"):
            shown = [(name, self.commands[name]) for name in self.list_commands(ctx)]
            formatter.write_dl([(name, each.get_short_help_str(limit=1000)) for name, each in shown])


class LazyGroup(_Aliased):
    """Commands that live in modules of their own."""

    def __init__(self, *args: Any, nouns: Mapping[str, Noun], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.nouns = dict(nouns)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.nouns)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        noun = self.nouns.get(cmd_name)
        if noun is None:
            return None
        loaded: click.Command = getattr(importlib.import_module(noun.module), noun.attribute)
        return loaded

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:  # click looks for what is like it among what is loaded
            raise click.NoSuchCommand(error.command_name, possibilities=self.nouns, ctx=ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, noun.summary) for name, noun in self.nouns.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        found = [
            CompletionItem(name, help=noun.summary)
            for name, noun in self.nouns.items()
            if name.startswith(incomplete)
        ]
        return found or click.Command.shell_complete(self, ctx, incomplete)


def together(*options: Callable[[Any], Any]) -> Callable[[_F], _F]:
    """Several options as one decorator, shown in this order."""

    def decorate(function: _F) -> _F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def habit(*names: str) -> Callable[[_F], _F]:
    """An option that others need for what is done here in any case; no help shows it."""
    return click.option(*names, is_flag=True, hidden=True, expose_value=False)


def make(
    name: str,
    *,
    examples: Sequence[tuple[str, str]],
    group: click.Group | None = None,
    cls: type[Command] = Command,
) -> Callable[[Callable[..., None]], click.Command]:
    """Makes a command of a function: its docstring is its help, and examples are required."""

    def decorate(function: Callable[..., None]) -> click.Command:
        made: click.Command = click.command(name, cls=cls, examples=examples)(function)
        if group is not None:
            group.add_command(made)
        return made

    return decorate
