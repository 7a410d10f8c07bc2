# SPDX-License-Identifier: MIT
"""Exit statuses: one table, and the exceptions with which a command ends the process through `main`.

Only the user's own command may give a status without a message.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Final

from banger.contract import errors

FAILED: Final = 1
USAGE: Final = 2
BEFORE_COMMAND: Final = 125
"""banger itself failed in `vm exec` or `vm run`, so the status is not the command's."""
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141

_BY_CODE: Final = {
    errors.BadRequestError.code: USAGE,
    errors.CancelledError.code: INTERRUPTED,
}


def status_of(error: errors.BangerError) -> int:
    return _BY_CODE.get(error.code, FAILED)


class CommandEnd(Exception):
    """The user's own command has ended: its status becomes ours, silently."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class FailedError(Exception):
    """An error whose exit status is not its code's."""

    def __init__(self, error: errors.BangerError, status: int) -> None:
        super().__init__(error.message)
        self.error = error
        self.status = status


class SomeFailedError(Exception):
    """Some of several names failed; each was reported when it happened."""


class SignalledError(BaseException):
    """SIGTERM or SIGHUP arrived; raised so that every block on the way out tidies up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def on_until_interrupted() -> Iterator[None]:
    """Around what goes on until Ctrl-C: that is its end, and no error; the status tells scripts."""
    try:
        yield
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the terminal has shown `^C`
        raise CommandEnd(INTERRUPTED) from None


@contextlib.contextmanager
def failures_as(status: int) -> Iterator[None]:
    """Errors of banger's own inside the block end with `status`."""
    try:
        yield
    except errors.BangerError as error:
        interrupted = isinstance(error, errors.CancelledError)
        raise FailedError(error, INTERRUPTED if interrupted else status) from error
