# SPDX-License-Identifier: MIT
"""The one exception tree, and how an error crosses a wire: as code and fields, never as a class name.

    BangerError                  operation_failed
    ├── BadRequestError          bad_request       the request itself is wrong; nothing was done
    ├── UnauthorizedError        unauthorized      this peer may not ask that
    ├── NotFoundError            not_found
    ├── AlreadyExistsError       already_exists
    ├── NotRunningError          not_running
    ├── ConflictError            conflict          right request, wrong moment: in use, busy
    ├── CancelledError           cancelled
    ├── DeadlineError            timed_out
    ├── NoSpaceError             no_space
    ├── MissingToolError         missing_tool      a program or kernel feature the host lacks
    ├── UnavailableError         unavailable       the other side does not answer, or has nothing left
    ├── RefusedError             refused           nothing listens on that port of the guest
    ├── ProtocolError            protocol          the process on the other side does not speak as agreed
    └── OperationFailedError     operation_failed

A message says what failed, on which object, and why: lower case, no full stop. `hint` says what to do next.
"""

from __future__ import annotations

import errno
import os
from typing import ClassVar

import msgspec


class ErrorBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error on any wire. `also` holds what failed besides, such as the undo of a step."""

    code: str
    message: str
    hint: str = ""
    op_id: str = ""
    step: str = ""
    fields: dict[str, str] = {}
    also: tuple[str, ...] = ()


class BangerError(Exception):
    """Base of every error a user may see."""

    code: ClassVar[str] = "operation_failed"

    def __init__(self, message: str, *, hint: str = "", **fields: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.fields = fields
        self.step = ""
        """The pipeline's step that failed, once the pipeline knows."""


class BadRequestError(BangerError):
    code = "bad_request"


class UnauthorizedError(BangerError):
    code = "unauthorized"


class NotFoundError(BangerError):
    code = "not_found"


class AlreadyExistsError(BangerError):
    code = "already_exists"


class NotRunningError(BangerError):
    code = "not_running"


class ConflictError(BangerError):
    code = "conflict"


class CancelledError(BangerError):
    code = "cancelled"


class DeadlineError(BangerError):
    code = "timed_out"


class NoSpaceError(BangerError):
    code = "no_space"


class MissingToolError(BangerError):
    code = "missing_tool"


class UnavailableError(BangerError):
    code = "unavailable"


class RefusedError(BangerError):
    code = "refused"


class ProtocolError(BangerError):
    code = "protocol"


class OperationFailedError(BangerError):
    code = "operation_failed"


_BY_CODE: dict[str, type[BangerError]] = {error.code: error for error in BangerError.__subclasses__()}
CODES = frozenset(_BY_CODE)


_OUT_OF: dict[int, tuple[type[BangerError], str, str]] = {
    errno.EMFILE: (
        UnavailableError,
        "this service may open no more files",
        "end terminals, tunnels and copies that nobody needs, or raise LimitNOFILE= of its unit",
    ),
    errno.ENFILE: (UnavailableError, "the host may open no more files", "raise fs.file-max with sysctl"),
    errno.ENOMEM: (
        UnavailableError,
        "the host has no memory left",
        "stop a VM that nobody needs, or give the host more memory or swap",
    ),
    errno.EAGAIN: (
        UnavailableError,
        "the host has no room for another process or thread",
        "stop a VM that nobody needs, or raise TasksMax= of the unit",
    ),
    errno.ENOSPC: (
        NoSpaceError,
        "no space left",
        "free space, or files when there is space: `df -h` and `df -i` show where",
    ),
    errno.EROFS: (
        UnavailableError,
        "the file system is read-only",
        "remount it for writing; where it was, `dmesg` says why it is not any more",
    ),
}
_OUT_OF[errno.EDQUOT] = _OUT_OF[errno.ENOSPC]
_NO_THREAD = "can't start new thread"


def exhausted(error: BaseException, *, of_fork: bool = False) -> BangerError | None:
    """What the host or this service has run out of, or cannot write; None for an error of any other kind.

    `of_fork`: a program was to be started, and so EAGAIN is no matter of a descriptor that does not block.
    """
    blocks = isinstance(error, BlockingIOError) and not of_fork
    number = error.errno if isinstance(error, OSError) and not blocks else None
    if isinstance(error, MemoryError):
        number = errno.ENOMEM
    elif isinstance(error, RuntimeError) and str(error) == _NO_THREAD:
        number = errno.EAGAIN
    if number not in _OUT_OF:
        return None
    kind, said, hint = _OUT_OF[number]
    where = f": {os.fsdecode(error.filename)}" if isinstance(error, OSError) and error.filename else ""
    return kind(f"{said}{where}", hint=hint)


def to_body(error: BaseException, *, op_id: str = "", step: str = "") -> ErrorBody:
    """Describes any exception for a wire; notes added to it (failed undos) become `also`."""
    known = error if isinstance(error, BangerError) else exhausted(error)
    if known is None:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        hint = "this is a fault in banger; the journal of bangerd has the details"
        known = OperationFailedError(f"unexpected error: {text}", hint=hint)
    return ErrorBody(
        code=known.code,
        message=sayable(known.message),
        hint=sayable(known.hint),
        op_id=op_id,
        step=step,
        fields={name: sayable(value) for name, value in known.fields.items()},
        also=tuple(map(sayable, getattr(error, "__notes__", ()))),
    )


def sayable(text: str) -> str:
    """Text for any wire: the name of a file may be no UTF-8, and none would take it as it is."""
    return text.encode("utf-8", "backslashreplace").decode()


def from_body(body: ErrorBody) -> BangerError:
    """Rebuilds an error from the wire; an unknown code (a newer peer) becomes `operation_failed`."""
    error = _BY_CODE.get(body.code, OperationFailedError)(body.message, hint=body.hint)
    error.fields = dict(body.fields)
    for note in body.also:
        error.add_note(note)
    return error
