# SPDX-License-Identifier: MIT
"""The row of a VM: intent and identity. Never a pid or a device: those are the world's and are looked up."""

from __future__ import annotations

import datetime
from typing import Final

import msgspec

from banger.contract import egress as egresses
from banger.contract import errors, names, resources

_MAX_WORKSPACES: Final = 100


class VmRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the daemon wants and remembers of one VM. Change with `msgspec.structs.replace`, save whole."""

    id: names.VmId
    name: names.VmName
    slot: int
    """Leased for the VM's life; uid and address derive from it."""
    image_id: names.ImageId
    kernel_id: names.KernelId
    vcpus: int
    memory_mib: int
    disk_size_mib: int
    network: bool
    ipv6: bool = False
    nat: bool = False
    egress: egresses.Egress = egresses.Egress.INTERNET
    allow: tuple[str, ...] = ()
    """Networks and names, as `contract/egress.py` parses them."""
    peers: str = ""
    """The network of VMs that reach each other; none when empty."""
    publish: tuple[str, ...] = ()
    """As `contract/ports.py` parses them."""
    state: resources.VmState
    created_at: datetime.datetime
    started_at: datetime.datetime | None = None
    boot_id: str = ""
    host_boot_id: str = ""
    """The boot of the host in which it was up last; empty when nobody told the daemon."""
    last_error: errors.ErrorBody | None = None
    sources: dict[str, resources.SizeSource] = {}
    last_start: tuple[resources.StepTiming, ...] = ()
    workspaces: tuple[resources.Workspace, ...] = ()
    """One for each path, the one that was sent last first; of very many, the first are forgotten."""
    placing: str = ""
    """Where a full copy is about to appear in the guest: ours, should nobody live to write `workspaces`."""
    idle_stop_s: int = 0
    """Stopped after so long without use; 0 for never."""
    ttl_s: int = 0
    """Stopped so long after its start; 0 for never."""
    ttl_ends_s: float = 0.0
    """On CLOCK_BOOTTIME, of the run that `ttl_s` is for."""
    autostart: bool = False
    """Started again with its host, when it ran as that went down."""
    stopped_with_host: bool = False
    """It ran when its host went down, and nobody has started or stopped it since."""
    stopped_because: str = ""
    """When time has stopped it: what it `had`, until its next start."""

    def require_readable(self) -> None:
        """Raises OperationFailedError for one of which too much is unknown to go on with it."""

    @property
    def workspace(self) -> resources.Workspace | None:
        return self.workspaces[0] if self.workspaces else None

    def workspace_at(self, path: str) -> resources.Workspace | None:
        return next((each for each in self.workspaces if each.path == path), None)

    def with_workspace(self, sent: resources.Workspace) -> VmRecord:
        others = tuple(each for each in self.workspaces if each.path != sent.path)
        return msgspec.structs.replace(self, workspaces=(sent, *others)[:_MAX_WORKSPACES])

    def with_what_arrived(self, latest: VmRecord) -> VmRecord:
        """With what `latest` has of workspaces: they come into a row without the lock of a life cycle."""
        if isinstance(latest, Salvaged):
            return self
        return msgspec.structs.replace(self, workspaces=latest.workspaces, placing=latest.placing)


class Salvaged(VmRecord, frozen=True, kw_only=True):
    """What is known of a VM whose record cannot be read; sizes are 0 and the rest is as if nobody had asked.

    So it can be looked at, used while it runs, and ended. Of all that, only its state may be saved.
    """

    def require_readable(self) -> None:
        known = self.last_error
        raise errors.OperationFailedError(
            known.message if known else f"the row of {self.name} is corrupt",
            hint=known.hint if known else "",
        )
