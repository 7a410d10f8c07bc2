# SPDX-License-Identifier: MIT
"""What can go wrong in the lab. Raised by every module of the lab; turned into text by the command line.

LabError
├── CommandError         a program on this machine failed or ran out of time
├── ImageBuildError      the host image could not be built
├── QemuError            QEMU did not start, ended early, or refused a command
├── BootTimeoutError     the host did not answer in time
├── HungError            the host's kernel hangs
├── NotRunningError      there is no lab of that name
├── BusyError            a lab of that name runs already
└── RunTimeoutError      a command in the lab ran out of time and was killed there
"""

from __future__ import annotations


class LabError(Exception):
    """Base of all; `hint` says what to do next, or is empty."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  {self.hint}" if self.hint else message


class CommandError(LabError):
    pass


class ImageBuildError(LabError):
    pass


class QemuError(LabError):
    pass


class BootTimeoutError(LabError):
    pass


class HungError(LabError):
    pass


class NotRunningError(LabError):
    pass


class BusyError(LabError):
    pass


class RunTimeoutError(LabError):
    pass
