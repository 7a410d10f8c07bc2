# SPDX-License-Identifier: MIT
"""How a VMM ended that nobody had asked to: as its logs tell, into the row."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from banger.contract import errors, guest, resources
from banger.vm import readiness, record

_LOG: Final = "ending.log"
"""One line of the helper's log writer, the VMM's parent; see guest/console.c."""
_BY_SIGNAL: Final = "by signal"
_WITH_STATUS: Final = "with status"
_KINDS: Final = (_BY_SIGNAL, _WITH_STATUS)
_MAX_DIGITS: Final = 3
# What Firecracker 1.12 logs when the guest reset or powered off by itself.
_ORDERLY_END: Final = "exit_code=0"
# Exit statuses of Firecracker for signals that it catches: FcExitCode in its src/vmm/src/lib.rs.
_CAUGHT: Final = {
    148: "SIGSYS",
    149: "SIGBUS",
    150: "SIGSEGV",
    151: "SIGXFSZ",
    154: "SIGXCPU",
    155: "SIGPIPE",
    156: "SIGHUP",
    157: "SIGILL",
}


@dataclass(frozen=True, slots=True)
class Ending:
    """Of a process, as its parent saw it."""

    signal: int = 0
    """0 when it ended by itself, with this status."""
    status: int = 0
    limit_hits: int = 0
    """How often its control group was out of memory."""
    memory_kills: int = 0
    """How many processes in it the kernel ended for want of memory, the group's or the host's."""

    def __str__(self) -> str:
        if self.memory_kills:
            whose = "its control group was full" if self.limit_hits else "the host had none left"
            return f"the kernel ended its VMM for want of memory: {whose}"
        if self.signal:
            return f"its VMM was ended by {_name(self.signal)}"
        if self.status in _CAUGHT:
            return f"its VMM ended on {_CAUGHT[self.status]} (status {self.status})"
        return f"its VMM ended unexpectedly, with status {self.status}"


def read(logs: Path) -> Ending | None:
    """None where nobody saw the end: the log writer was killed, or was started by an earlier version."""
    how, _, events = readiness.console_tail(logs / _LOG).partition(";")
    kind, _, number = how.rpartition(" ")
    if kind not in _KINDS or not number.isdecimal() or len(number) > _MAX_DIGITS:
        return None
    words = iter(events.split())
    counts = {name: int(count) for name, count in zip(words, words, strict=False) if count.isdecimal()}
    return Ending(
        signal=int(number) if kind == _BY_SIGNAL else 0,
        status=int(number) if kind == _WITH_STATUS else 0,
        limit_hits=counts.get("oom", 0),
        memory_kills=counts.get("oom_kill", 0),
    )


def ended(vm: record.VmRecord, logs: Path, host_boot_id: str = "") -> record.VmRecord:
    """The row of a VM whose VMM ended without our doing, with the reason as far as its logs tell.

    When the host is in another boot than the VM was, that is the reason: what its logs tell are the steps
    of a host that goes down, if anything.
    """
    panic = readiness.panic_line(logs / "console.log")
    seen = read(logs)
    if seen is not None:
        orderly = seen == Ending()
    else:
        orderly = _ORDERLY_END in readiness.console_tail(logs / "vmm.log")
    is_sudden = orderly and _lacks_goodbye(logs / "console.log")
    restarted = bool(vm.host_boot_id and host_boot_id) and vm.host_boot_id != host_boot_id
    vm = msgspec.structs.replace(vm, boot_id="", stopped_with_host=restarted)
    if not panic and orderly and not is_sudden:
        return msgspec.structs.replace(vm, state=resources.VmState.STOPPED, last_error=None)
    why = "the host restarted while it ran" if restarted else str(seen or "its VMM ended unexpectedly")
    hint = f"`banger vm logs {vm.name}` shows its console; `banger vm start {vm.name}` runs it again"
    if panic:
        why = f"its kernel panicked: {panic}"
    elif is_sudden:
        why = (
            "its guest was reset without going down first, as by a panic of its kernel, which has no console"
        )
        hint = (
            f"a kernel with a console tells why: `banger vm set {vm.name} --kernel debian-6.12`; "
            f"`banger vm start {vm.name}` runs it again"
        )
    if seen is not None and seen.memory_kills and not seen.limit_hits:
        hint = f"this host needs memory: stop other VMs, or give them less; {hint}"
    memory = readiness.memory_line(logs / "console.log")
    if memory:
        why = f"{why}, after it ran out of memory ({memory})"
        hint = f"`banger vm set {vm.name} --memory {2 * vm.memory_mib}M` gives it more; {hint}"
    body = errors.ErrorBody(
        code=errors.OperationFailedError.code,
        message=f"{vm.name} is no longer running: {why}",
        hint=hint,
    )
    return msgspec.structs.replace(vm, state=resources.VmState.ERROR, last_error=body)


def _lacks_goodbye(console: Path) -> bool:
    """Whether the guest's agent, which said that it would, did not tell that the guest goes down."""
    _, promised, since = readiness.console_tail(console).rpartition(guest.NO_CONSOLE)
    return bool(promised) and guest.GOODBYE not in since


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
