# SPDX-License-Identifier: MIT
"""Types of arguments and options: checked before anything is sent, and completed by the shell."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import click

from banger.cli import command

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_COMPLETION_S: Final = 1.0


def lack_of(path: str | os.PathLike[str]) -> str:
    """Why there is nothing at a path of this host, after its name; nothing where something is."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"
    return ""


class _Name(click.ParamType[str]):
    """A name of something the daemon has; completing it is quick, and silent when it does not answer."""

    def __init__(self, what: str, collection: str) -> None:
        self.name = what
        self._collection = collection

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from banger.contract import errors, given_names

        if self.name == "vm" and self._collection and re.search(r"[*?[]", value):
            import shlex

            meant = f"`banger vm list --name {shlex.quote(value)}` lists what is like it"
            self.fail(f"{value!r} is a pattern, and no VM's name: {meant}", param, ctx)
        try:
            if self.name == "vm":
                return given_names.parse_vm_name(value)
            if self._is_reference(value):
                return value
            return given_names.parse_artefact_name(value, "an image" if self.name == "image" else "a kernel")
        except errors.BadRequestError as error:
            self.fail(f"{error.message}: {error.hint}", param, ctx)

    def _is_reference(self, value: str) -> bool:
        """An image may be meant by its reference or digest; the daemon reads those."""
        return self.name == "image" and bool(self._collection) and any(mark in value for mark in "/:@")

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        if not self._collection:
            return []
        given = ctx.params.get(param.name or "") or ()
        return [
            CompletionItem(name)
            for name in self.known(ctx.ensure_object(command.Settings))
            if name.startswith(incomplete) and name not in given
        ]

    def known(self, settings: command.Settings) -> list[str]:
        """Those that there are; nothing when nobody answers."""
        from banger.contract import errors

        with contextlib.suppress(errors.BangerError, OSError):
            return settings.client().names(self._collection, timeout_s=_COMPLETION_S)
        return []


class _Local(click.types.UnprocessedParamType):
    """Taken as it is; the shell completes it with what is here: a `file`, or a `dir`."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type=self._kind)]


class _Place(_Local):
    """A path here, or NAME:PATH; a guest is asked what it has, quickly, and silently when it is down."""

    def __init__(self) -> None:
        super().__init__("file")

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        from banger.cli import guest_paths

        settings = ctx.ensure_object(command.Settings)
        name, colon, path = incomplete.partition(":")
        if colon and name and "/" not in name:
            return [CompletionItem(f"{name}:{each}") for each in guest_paths.like(settings, name, path)]
        here = super().shell_complete(ctx, param, incomplete)
        if "/" in incomplete:
            return here
        found = VM.known(settings)
        return [*(CompletionItem(f"{each}:") for each in found if each.startswith(incomplete)), *here]


class _Size(click.ParamType[int]):
    """`2G`, `512M`; a bare number is MiB. `limited` is the contract's type of it, by name."""

    name = "size"

    def __init__(self, limited: str = "") -> None:
        self._limited = limited

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from banger.contract import errors, sizes

        if isinstance(value, int):
            return value
        try:
            size = sizes.parse_mib(value)
        except errors.BadRequestError as error:
            self.fail(f"{error.message}: {error.hint}", param, ctx)
        if wrong := self._limited and _outside(self._limited, size, _short):
            bare = "; a bare number is in MiB" if value.strip()[-1].isdigit() else ""
            self.fail(f"{wrong}{bare}", param, ctx)
        return size


def _short(mib: int) -> str:
    """As one types it: `64M`, `1T`."""
    for unit, shift in (("T", 20), ("G", 10)):
        if mib and not mib % (1 << shift):
            return f"{mib >> shift}{unit}"
    return f"{mib}M"


class _Count(click.ParamType[int]):
    """A whole number within the limits of the contract's type of that name."""

    name = "n"

    def __init__(self, limited: str) -> None:
        self._limited = limited

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            count = int(value)
        except ValueError:
            self.fail(f"{value!r} is not a whole number", param, ctx)
        if wrong := _outside(self._limited, count, str):
            self.fail(wrong, param, ctx)
        return count


def _outside(limited: str, value: int, text: Callable[[int], str]) -> str:
    """What is wrong with a value; nothing when it is within the limits."""
    import typing

    from banger.contract import resources

    (limits,) = typing.get_args(getattr(resources, limited))[1:]
    if value < limits.ge:
        return f"{text(value)} is too little; at least {text(limits.ge)}"
    if value > limits.le:
        return f"{text(value)} is too much; at most {text(limits.le)}"
    return ""


class _Span(click.ParamType[float]):
    """`90`, `90s`, `5m`, `2h`, `7d`, `1h30m`: seconds."""

    name = "span"
    besides = ""
    """What else may be given."""
    _UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    _PART: Final = re.compile(r"([0-9]*\.?[0-9]+)([smhd]?)")
    _WHOLE: Final = re.compile(r"[0-9]*\.?[0-9]+[smhd]?|([0-9]*\.?[0-9]+[smhd]){2,4}")

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        seconds = 0.0
        if self._WHOLE.fullmatch(value):
            seconds = sum(float(n) * self._UNITS.get(unit, 1) for n, unit in self._PART.findall(value))
        if not 0 < seconds < 1e9:
            self.fail(
                f"{value!r} is not a time, such as 90, 90s, 5m, 2h, 1h30m or 7d{self.besides}", param, ctx
            )
        return seconds


class _Limit(_Span):
    """A span in whole seconds, or `off`, which is 0."""

    name = "limit"
    besides = "; or off"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "off":
            return 0
        return max(1, round(super().convert(value, param, ctx)))


class _Variable(click.ParamType[str]):
    """`NAME=value`, or `NAME` for the caller's own value."""

    name = "variable"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name, equals, _ = value.partition("=")
        if not name:
            self.fail(f"{value!r} is not NAME=value", param, ctx)
        if equals:
            return value
        if name not in os.environ:
            self.fail(f"{name} is not set here", param, ctx)
        return f"{name}={os.environ[name]}"


class _Checked(click.ParamType[str]):
    """A text that a parser of the contract takes."""

    def __init__(self, name: str, parse: Callable[[str], object]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from banger.contract import errors

        try:
            self._parse(value)
        except errors.BadRequestError as error:
            self.fail(f"{error.message}: {error.hint}", param, ctx)
        return value


def _parse_destination(text: str) -> object:
    from banger.contract import destinations

    return destinations.parse(text)


def _parse_publish(text: str) -> object:
    from banger.contract import ports

    return ports.parse(text)


def _parse_published(text: str) -> object:
    from banger.contract import ports

    return ports.named(text, ())


def _parse_peers(text: str) -> object:
    from banger.contract import given_names

    return given_names.parse_vm_name(text, "a network's name") if text else text


def _parse_guest_path(text: str) -> object:
    from banger.contract import errors

    if not text.startswith("/"):
        raise errors.BadRequestError(f"{text!r} is no path in a guest", hint="it begins with /")
    return text


VM: Final = _Name("vm", "/v1/vms")
FILE: Final = _Local("file")
PLACE: Final = _Place()
DIRECTORY: Final = _Local("dir")
NEW_VM: Final = _Name("vm", "")
IMAGE: Final = _Name("image", "/v1/images")
NEW_IMAGE: Final = _Name("image", "")
KERNEL: Final = _Name("kernel", "/v1/kernels")
NEW_KERNEL: Final = _Name("kernel", "")
CATALOG_IMAGE: Final = _Name("image", "/v1/images?available=true")
CATALOG_KERNEL: Final = _Name("kernel", "/v1/kernels?available=true")
SIZE: Final = _Size()
MEMORY: Final = _Size("MemoryMib")
DISK: Final = _Size("DiskMib")
VCPUS: Final = _Count("Vcpus")
SPAN: Final = _Span()
LIMIT: Final = _Limit()
VARIABLE: Final = _Variable()
DESTINATION: Final = _Checked("destination", _parse_destination)
PUBLISH: Final = _Checked("port", _parse_publish)
PUBLISHED: Final = _Checked("port", _parse_published)
GUEST_PATH: Final = _Checked("path", _parse_guest_path)
PEERS: Final = _Checked("network", _parse_peers)
