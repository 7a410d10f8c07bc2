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
    ├── UnavailableError         unavailable       the process on the other side does not answer
    ├── RefusedError             refused           nothing listens on that port of the guest
    ├── ProtocolError            protocol          the process on the other side does not speak as agreed
    └── OperationFailedError     operation_failed

A message says what failed, on which object, and why: lower case, no full stop. `hint` says what to do next.
"""

from __future__ import annotations

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


_BY_CODE: dict[str, type[BangerError]] = {
    error.code: error
    for error in (
        BadRequestError,
        UnauthorizedError,
        NotFoundError,
        AlreadyExistsError,
        NotRunningError,
        ConflictError,
        CancelledError,
        DeadlineError,
        NoSpaceError,
        MissingToolError,
        UnavailableError,
        RefusedError,
        ProtocolError,
        OperationFailedError,
    )
}
CODES = frozenset(_BY_CODE)


def to_body(error: BaseException, *, op_id: str = "", step: str = "") -> ErrorBody:
    """Describes any exception for a wire; notes added to it (failed undos) become `also`."""
    also = tuple(getattr(error, "__notes__", ()))
    if isinstance(error, BangerError):
        return ErrorBody(
            code=error.code,
            message=error.message,
            hint=error.hint,
            op_id=op_id,
            step=step,
            fields=error.fields,
            also=also,
        )
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return ErrorBody(
        code="operation_failed",
        message=f"unexpected error: {text}",
        hint="this is a fault in banger; the journal of bangerd has the details",
        op_id=op_id,
        step=step,
        also=also,
    )


def from_body(body: ErrorBody) -> BangerError:
    """Rebuilds an error from the wire; an unknown code (a newer peer) becomes `operation_failed`."""
    error = _BY_CODE.get(body.code, OperationFailedError)(body.message, hint=body.hint)
    error.fields = dict(body.fields)
    for note in body.also:
        error.add_note(note)
    return error
