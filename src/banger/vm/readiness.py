# SPDX-License-Identifier: MIT
"""Waiting for the guest's agent: until it answers, the VMM is gone, or time is up — and saying which."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from banger import steps
from banger.contract import errors, guest
from banger.vm import host as hosts
from banger.vm import record

# The guest cannot announce itself to an unprivileged host process, so we knock. Each knock is one connect to
# a local socket that Firecracker closes at once while nobody listens in the guest.
_KNOCK_MIN_S: Final = 0.005
_KNOCK_MAX_S: Final = 0.05
_TAIL_BYTES: Final = 4096


async def wait_for_agent(host: hosts.Host, vm: record.VmRecord) -> guest.Health:
    """The agent's first answer.

    Raises OperationFailedError when the VMM ends before that, DeadlineError after `limits.agent_s` seconds;
    both quote the guest's console where it says why.
    """
    gone = asyncio.ensure_future(_gone(host, vm))
    knock = asyncio.ensure_future(_knock(host, vm))
    try:
        async with asyncio.timeout(host.limits.agent_s):
            await asyncio.wait({gone, knock}, return_when=asyncio.FIRST_COMPLETED)
    except TimeoutError:
        raise _silent(host, vm) from None
    finally:
        await steps.finish(_cancel(gone, knock))
    if knock.done() and not knock.cancelled():
        return knock.result()
    raise _ended(host, vm)


async def _gone(host: hosts.Host, vm: record.VmRecord) -> None:
    await host.vmm_gone(vm.id)


async def _knock(host: hosts.Host, vm: record.VmRecord) -> guest.Health:
    pause_s = _KNOCK_MIN_S
    while True:
        try:
            return await host.agent(vm.id).health()
        except (errors.UnavailableError, errors.DeadlineError, errors.ProtocolError):
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _KNOCK_MAX_S)


async def _cancel(*tasks: asyncio.Future[None] | asyncio.Future[guest.Health]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at: what mattered is raised by others


def _ended(host: hosts.Host, vm: record.VmRecord) -> errors.BangerError:
    console = host.layout.console_log(vm.id)
    panic = panic_line(console)
    if panic:
        return errors.OperationFailedError(
            f"the guest kernel of {vm.name} panicked: {panic}",
            hint=f"`banger vm logs {vm.name}` shows its console; does the kernel suit the image?",
        )
    said = guest_line(console)
    why = f": {said}" if said else ""
    return errors.OperationFailedError(
        f"the VMM of {vm.name} ended before the guest's agent answered{why}",
        hint=f"`banger vm logs {vm.name}` shows the guest's console, "
        f"`banger vm logs --source vmm {vm.name}` what Firecracker said",
    )


def _silent(host: hosts.Host, vm: record.VmRecord) -> errors.BangerError:
    panic = panic_line(host.layout.console_log(vm.id))
    why = f": its kernel panicked: {panic}" if panic else ""
    return errors.DeadlineError(
        f"the agent of {vm.name} did not answer within {host.limits.agent_s:g} s{why}",
        hint=f"`banger vm logs {vm.name}` shows the guest's console; "
        "`agent_deadline_s` in /etc/banger/config.toml allows a slow host more time, "
        "once `sudo banger system restart` has run",
    )


def panic_line(console: Path) -> str:
    """The line in which a guest kernel said why it gave up; empty when there is none."""
    text = console_tail(console)
    for line in text.splitlines():
        _, found, reason = line.partition("Kernel panic - not syncing: ")
        if found:
            return reason.strip()
    return ""


def memory_line(console: Path) -> str:
    """What a guest kernel that ran out of memory last ended for it; empty when it did not."""
    _, found, rest = console_tail(console).rpartition("Out of memory: ")
    return rest.partition(",")[0].partition("\n")[0].strip() if found else ""


def guest_line(console: Path) -> str:
    """The last line of our own init in a guest, which is quiet unless it gives up; empty without one."""
    lines = [line.partition("banger-guest: ")[2] for line in console_tail(console).splitlines()]
    return next((line.strip() for line in reversed(lines) if line), "")


def console_tail(path: Path, limit: int = _TAIL_BYTES) -> str:
    """The last bytes of a log as printable text; empty when it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - limit))
            text = file.read(limit).decode("utf-8", "replace")
    except OSError:
        return ""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)
