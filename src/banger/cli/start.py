# SPDX-License-Identifier: MIT
"""Console script of `banger`: a process that mostly lives for a blink, started and ended as one.

Nothing but what every Python process has is loaded before `main` runs.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import signal
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any, NoReturn


class _StandIn(types.ModuleType):
    """In the place of a module that is slow to load, with the few names that others always ask it for.

    Any other name brings the real one.
    """

    def __init__(self, name: str, **known: object) -> None:
        super().__init__(name)
        self.__dict__.update(known)
        sys.modules.setdefault(name, self)

    def __getattr__(self, name: str) -> Any:
        if name == "__path__":
            raise AttributeError(name)  # how an import asks whether this is a package
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def _put_stand_ins() -> None:
    inspect = _StandIn("inspect")
    inspect.__dict__["cleandoc"] = functools.partial(_cleaned, inspect)
    _StandIn("platform", system=lambda: os.uname().sysname)
    names = ("NotRequired", "Required", "get_type_hints")
    _StandIn("typing_extensions", **{name: getattr(typing, name) for name in names})


def _cleaned(inspect: _StandIn, doc: str) -> str:
    """click asks for this with each help text of an option, and those are one line."""
    if "\n" not in doc:
        return doc.expandtabs().lstrip()
    cleaned: str = inspect.__getattr__("cleandoc")(doc)
    return cleaned


def main() -> NoReturn:
    gc.set_threshold(200_000)  # what is loaded stays; looking for garbage in it takes a tenth of the time
    _put_stand_ins()
    _fill_standard_descriptors()
    with _interrupts_end_us():
        from banger.cli import main as cli

    status = cli.run(sys.argv[1:])
    _end(status)


@contextlib.contextmanager
def _interrupts_end_us() -> Iterator[None]:
    """While modules load nothing was begun: Ctrl-C ends the process, without a traceback of Python's."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _fill_standard_descriptors() -> None:
    """One that the caller closed would become the number of our next socket, and be read as input.

    Python has no stream for it either.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            stream = open(fd, mode, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def _end(status: int) -> NoReturn:
    """Ends the process without taking it apart piece by piece: the kernel does that at once."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = status or 1
    os._exit(status)


if __name__ == "__main__":
    main()
