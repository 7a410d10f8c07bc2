# SPDX-License-Identifier: MIT
"""The privileged operations: one closed, typed table. The daemon names intents, the helper derives paths.

Wire: one request per connection on `bangerd-root.sock`: a 4-byte big-endian length, then an `Envelope` as
JSON; one `Reply` back in the same framing. Unknown operations, unknown fields and wrong types are refused by
the decoder before any effect. `docs/privileges.md` says of each what it validates.

Deleting what is already gone succeeds. Every operation that makes something cleans its own partial state
when it fails, so the caller sees either all of it or none.
"""

from __future__ import annotations

import typing
from typing import Annotated, Final, Generic, Protocol, TypeVar

import msgspec

from banger.contract import egress as egresses
from banger.contract import errors, names

MAX_REQUEST_BYTES: Final = 64 * 1024
MAX_REPLY_BYTES: Final = 4 * 1024 * 1024
MAX_OTHERS: Final = 10_000
PROTOCOL_VERSION: Final = 4

Id = Annotated[str, msgspec.Meta(pattern=names.ID_PATTERN)]
Slot = Annotated[int, msgspec.Meta(ge=1, le=names.MAX_SLOTS)]
OpId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-zA-Z-]{0,40}$(?!\n)")]
BootArgs = Annotated[str, msgspec.Meta(pattern=r"^[\x21-\x7e]+( [\x21-\x7e]+)*$(?!\n)", max_length=1900)]
PeerNetwork = Annotated[str, msgspec.Meta(pattern=names.PEER_NETWORK_PATTERN)]
IpAddress = Annotated[str, msgspec.Meta(pattern=r"^([0-9]{1,3}(\.[0-9]{1,3}){3}|[0-9a-f:]{2,39})$(?!\n)")]


class Result(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="result", tag=True):
    """Base of what an operation returns."""


ResultT = TypeVar("ResultT", bound=Result)


class Request(msgspec.Struct, Generic[ResultT], frozen=True, forbid_unknown_fields=True, tag_field="op"):
    """Base of every operation; the type parameter is what it returns."""


# --- results ---


class Done(Result, tag="done", frozen=True):
    """It is so now."""


class HostInfo(Result, tag="host_info", frozen=True):
    version: str
    protocol: int


class Vmm(Result, tag="vmm", frozen=True):
    """A VMM process. `pid` is 0 when none runs."""

    pid: int


class VmWorld(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What exists on the host under one VM's name."""

    vm_id: str
    snapshot: bool = False
    loops: int = 0
    tap: bool = False
    rules: bool = False
    """Packet rules speak of this VM."""
    jail: bool = False
    cgroup: bool = False
    logs: bool = False
    vmm_pid: int = 0

    @property
    def is_empty(self) -> bool:
        """Nothing but perhaps logs is left of this VM."""
        kept = (self.snapshot, self.loops, self.tap, self.rules, self.jail, self.cgroup, self.vmm_pid)
        return not any(kept)


class Ensured(Result, tag="ensured", frozen=True):
    rebuilt: bool
    """The packet rules were missing or another version's, and were loaded by this request."""
    with_rules: tuple[Id, ...] = ()
    """The VMs that have packet rules now. Whoever else runs has lost them, whenever that was."""


class Routed(Result, tag="routed", frozen=True):
    problem: str = ""
    """Why this host's resolver cannot be told where VMs' names are; empty when it was."""


class Other(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What has a name or a uid of banger's and is not named after one VM."""

    kind: str
    """As in `inventory.Kind`."""
    name: str
    slot: int = 0
    """Of the VM whose uid it has."""
    vm_id: str = ""


class World(Result, tag="world", frozen=True):
    vms: tuple[VmWorld, ...]
    bridge: bool
    others: tuple[Other, ...] = ()
    """At most MAX_OTHERS of them."""


# --- operations on the host ---


class GetHost(Request[HostInfo], tag="get_host", frozen=True):
    """Who answers."""


class ListWorld(Request[World], tag="list_world", frozen=True):
    """Everything banger-named on this host, found by scanning the kernel, never from memory."""

    settled: bool = False
    """Waits for what is under way when it is asked: a daemon that died may have asked for that."""


class EnsureBridge(Request[Ensured], tag="ensure_bridge", frozen=True):
    """The bridge is up and holds the first address of the configured prefix; its packet rules are loaded.

    Also mends what other firewalls took away when they were loaded anew; the daemon asks now and then.
    """


class DeleteBridge(Request[Done], tag="delete_bridge", frozen=True):
    """And the packet rules. Refused with `conflict` while a VM has a tap, or something else is attached."""


class RouteResolver(Request[Routed], tag="route_resolver", frozen=True):
    """systemd-resolved asks the daemon, on the bridge's link, for names of VMs and for nothing else."""


class UnrouteResolver(Request[Done], tag="unroute_resolver", frozen=True):
    """What it was told about the bridge's link is taken back."""


class CheckRuntime(Request[Done], tag="check_runtime", frozen=True):
    """Firecracker and jailer are there, writable by root alone, and the ones recorded at installation."""


# --- operations on one VM ---


class CreateSnapshot(Request[Done], tag="create_snapshot", frozen=True):
    """A dm-snapshot of the image's `rootfs.ext4` (read-only) with the VM's `overlay.cow` as its store."""

    vm_id: Id
    slot: Slot
    image_id: Id


class CheckSnapshot(Request[Done], tag="check_snapshot", frozen=True):
    """`e2fsck -p` (then `-y`) on the snapshot, as the VM's uid; exit 0 and 1 are both fine."""

    vm_id: Id
    slot: Slot


class PatchRoot(Request[Done], tag="patch_root", frozen=True):
    """Writes the guest binary of this installation into the snapshot's ext4."""

    vm_id: Id
    slot: Slot


class DeleteSnapshot(Request[Done], tag="delete_snapshot", frozen=True):
    """Removes the device-mapper device and both loops; waits for a busy device with a deadline."""

    vm_id: Id


class AttachWorkDisk(Request[Done], tag="attach_work_disk", frozen=True):
    """A loop device over the VM's `work.ext4`; checked with e2fsck as the VM's uid first, and grown with
    resize2fs when the file has become larger than its file system.
    """

    vm_id: Id
    slot: Slot


class DetachWorkDisk(Request[Done], tag="detach_work_disk", frozen=True):
    vm_id: Id


class CreateTap(Request[Done], tag="create_tap", frozen=True):
    """The VM's tap, owned by its uid, attached to the bridge as an isolated port, up.

    Nothing passes through it before `SetGuestRules`.
    """

    vm_id: Id
    slot: Slot
    peers: bool = False
    """Not isolated: the packet rules alone say which other guests it reaches."""


class DeleteTap(Request[Done], tag="delete_tap", frozen=True):
    vm_id: Id


class SetGuestRules(Request[Done], tag="set_guest_rules", frozen=True):
    """Exactly these packet rules for this VM, in one atomic change, whatever held before.

    They bind the tap to the VM's hardware and IP address, and say what its guest reaches. NAT makes the host
    forward for it, past other firewalls too.
    """

    vm_id: Id
    slot: Slot
    nat: bool = False
    egress: egresses.Egress = egresses.Egress.INTERNET
    allow: Annotated[tuple[egresses.Destination, ...], msgspec.Meta(max_length=egresses.MAX_RULES)] = ()
    peers: PeerNetwork = ""
    """Guests of one network reach each other; those of none reach no other guest."""
    ipv6: bool = False
    """Its address in the IPv6 prefix too, under the same policy. The bridge has one while a guest has."""


class DeleteGuestRules(Request[Done], tag="delete_guest_rules", frozen=True):
    """Nothing passes through the VM's tap any more; the last guest with NAT ends forwarding."""

    vm_id: Id


class AllowAddresses(Request[Done], tag="allow_addresses", frozen=True):
    """For `ttl_s` seconds this guest, which has NAT, reaches these addresses too: what a name stands for."""

    vm_id: Id
    slot: Slot
    addresses: Annotated[tuple[IpAddress, ...], msgspec.Meta(min_length=1, max_length=64)]
    ttl_s: Annotated[int, msgspec.Meta(ge=1, le=86400)]
    port: egresses.Port = 0


class PrepareJail(Request[Done], tag="prepare_jail", frozen=True):
    """The VM's jail directory and that of its logs: console, vmm, metrics, each bounded, and ending."""

    vm_id: Id
    slot: Slot


class DeleteJail(Request[Done], tag="delete_jail", frozen=True):
    """Removes the jail and the cgroup; keeps the tail of the VMM's log. Refused while the VMM runs."""

    vm_id: Id


class LaunchVmm(Request[Vmm], tag="launch_vmm", frozen=True):
    """Starts Firecracker through the jailer; the VM boots at once and outlives both services."""

    vm_id: Id
    slot: Slot
    kernel_id: Id
    initrd: bool
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=32)]
    memory_mib: Annotated[int, msgspec.Meta(ge=64, le=1024 * 1024)]
    boot_args: BootArgs
    work_disk: bool = True
    tap: bool = True


class GrantApiSocket(Request[Done], tag="grant_api_socket", frozen=True):
    """The owner may connect to the VMM's API socket, which the launch waited for."""

    vm_id: Id
    slot: Slot


class GrantVsock(Request[Done], tag="grant_vsock", frozen=True):
    """The owner may connect to the VM's vsock socket, which the launch waited for."""

    vm_id: Id
    slot: Slot


class FindVmm(Request[Vmm], tag="find_vmm", frozen=True):
    """The process in the VM's cgroup, which root alone can fill; pid 0 if none. No file is believed."""

    vm_id: Id


class KillVmm(Request[Done], tag="kill_vmm", frozen=True):
    """SIGKILL to all that runs in the VM's cgroup; waits until it is gone."""

    vm_id: Id


class TearDown(Request[Done], tag="tear_down", frozen=True):
    """Nothing is left of this VM's runtime: VMM, tap, rules, loops, snapshot, jail, cgroup. Keeps logs."""

    vm_id: Id


class PurgeLogs(Request[Done], tag="purge_logs", frozen=True):
    """Removes the VM's console and VMM logs; part of delete."""

    vm_id: Id


AnyRequest = (
    GetHost
    | ListWorld
    | EnsureBridge
    | DeleteBridge
    | RouteResolver
    | UnrouteResolver
    | CheckRuntime
    | CreateSnapshot
    | CheckSnapshot
    | PatchRoot
    | DeleteSnapshot
    | AttachWorkDisk
    | DetachWorkDisk
    | CreateTap
    | DeleteTap
    | SetGuestRules
    | DeleteGuestRules
    | AllowAddresses
    | PrepareJail
    | DeleteJail
    | LaunchVmm
    | GrantApiSocket
    | GrantVsock
    | FindVmm
    | KillVmm
    | TearDown
    | PurgeLogs
)
AnyResult = Done | Ensured | Routed | HostInfo | Vmm | World
REQUEST_TYPES: Final[tuple[type[Request[Result]], ...]] = typing.get_args(AnyRequest)


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    request: AnyRequest
    op_id: OpId = ""
    """Greps in the journal of both services."""


class Reply(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Exactly one of the two is set."""

    result: AnyResult | None = None
    error: errors.ErrorBody | None = None


class PrivilegedOps(Protocol):
    """What the daemon may ask of root; met by the socket client, the in-process adapter and the fake.

    `call` raises a BangerError: the helper's own, or UnavailableError when nobody answers.
    """

    async def call(self, request: Request[ResultT], /) -> ResultT: ...


def jail_root(jails: str, vm_id: str) -> str:
    """The chroot of a VM, as Firecracker's jailer lays it out: <base>/<exec file name>/<id>/root."""
    return f"{jails}/firecracker/{vm_id}/root"


def api_socket(jails: str, vm_id: str) -> str:
    return f"{jail_root(jails, vm_id)}/run/api.sock"


def vsock_socket(jails: str, vm_id: str) -> str:
    return f"{jail_root(jails, vm_id)}/run/vsock.sock"
