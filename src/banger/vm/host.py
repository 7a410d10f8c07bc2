# SPDX-License-Identifier: MIT
"""What a VM's life cycle needs from outside, handed in by the daemon: helper, guest, files, row."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterable, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from banger import steps
from banger.contract import guest, names, privileged, resources
from banger.vm import record


class Agent(Protocol):
    """The guest's agent, as far as the life cycle speaks with it. Every call has its own deadline."""

    async def health(self) -> guest.Health: ...

    async def put(self, spec: guest.PutSpec, archive: AsyncIterable[bytes], /) -> guest.Transferred: ...

    async def flush(self, *, deadline_s: float) -> None: ...

    async def power_off(self, *, grace_ms: int) -> None: ...

    async def time_ns(self) -> int: ...

    async def set_time(self, realtime_ns: int, /) -> None: ...


class Records(Protocol):
    """Where the row is kept."""

    def get(self, vm_id: names.VmId, /) -> record.VmRecord: ...

    def save(self, vm: record.VmRecord, /) -> None: ...

    def save_state(self, vm: record.Salvaged, state: resources.VmState, /) -> record.VmRecord: ...


class Keeper(Protocol):
    """Whoever sees to it that VMs which run have their packet rules."""

    @property
    def doubts(self) -> int:
        """Grows with every look after which some may be without."""

    async def set_rules(self, vm: record.VmRecord, /) -> None:
        """Of one that runs, now, or raises; then they are set later, as the row is by then."""

    async def ensure(self) -> None:
        """Bridge and packet rules are there; whoever runs and lost its own is given them again."""

    def look_again(self) -> None:
        """Soon, in another task."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the owner's files are. Everything of one VM is derivable from its id."""

    state: Path
    jails: Path
    logs: Path

    def vm_dir(self, vm_id: names.VmId) -> Path:
        return self.state / "vms" / vm_id

    def overlay(self, vm_id: names.VmId) -> Path:
        return self.vm_dir(vm_id) / "overlay.cow"

    def work_disk(self, vm_id: names.VmId) -> Path:
        return self.vm_dir(vm_id) / "work.ext4"

    def image_dir(self, image_id: names.ImageId) -> Path:
        return self.state / "images" / image_id

    def rootfs(self, image_id: names.ImageId) -> Path:
        return self.image_dir(image_id) / "rootfs.ext4"

    def work_seed(self, image_id: names.ImageId) -> Path:
        return self.image_dir(image_id) / "work-seed.tar"

    def kernel_dir(self, kernel_id: names.KernelId) -> Path:
        return self.state / "kernels" / kernel_id

    def console_log(self, vm_id: names.VmId) -> Path:
        return self.logs / vm_id / "console.log"

    def api_socket(self, vm_id: names.VmId) -> Path:
        return Path(privileged.api_socket(str(self.jails), vm_id))

    def vsock_socket(self, vm_id: names.VmId) -> Path:
        return Path(privileged.vsock_socket(str(self.jails), vm_id))


@dataclass(frozen=True, slots=True)
class Limits:
    """Deadlines in seconds, from the configuration."""

    agent_s: float = 60.0
    flush_s: float = 10.0
    power_off_s: float = 4.0
    agent_silence_s: float = 15.0
    """An agent that has not answered for so long is shown as silent."""


@dataclass(frozen=True, slots=True)
class Host:
    """The daemon's doors. `ops` may be the socket client, the in-process adapter or a fake."""

    ops: privileged.PrivilegedOps
    records: Records
    layout: Layout
    network: ipaddress.IPv4Network
    agent: Callable[[names.VmId], Agent]
    vmm_gone: Callable[[names.VmId], Awaitable[None]]
    """Returns once the VM's VMM is no more; at once when there is none."""
    keeper: Keeper
    network6: ipaddress.IPv6Network = names.DEFAULT_NETWORK6
    dns: tuple[str, ...] = ()
    names_closed: str = ""
    """Why no guest can have a name of its policy opened; empty when it can."""
    guest_sha256: str = ""
    """Of the guest binary this program carries; an image with another one is patched at start."""
    limits: Limits = Limits()
    boot_id: str = ""
    """Which boot of the machine this is; empty when nobody told the daemon."""

    async def privileged(self, request: privileged.Request[privileged.ResultT]) -> privileged.ResultT:
        """Asks the helper and awaits its answer even when cancelled: root's work cannot be called back."""
        return await steps.finish(_call(self.ops, request))


async def _call(
    ops: privileged.PrivilegedOps, request: privileged.Request[privileged.ResultT]
) -> privileged.ResultT:
    return await ops.call(request)
