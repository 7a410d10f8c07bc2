# SPDX-License-Identifier: MIT
"""What the daemon's API speaks of: requests and resources, shared by daemon, CLI and SDK.

Sizes are integers in the unit of the name; times are RFC 3339 in UTC; ids are 12 hex digits. The API only
grows: a field is never removed, a new one always has a default.
"""

from __future__ import annotations

import datetime
import enum
from typing import Annotated, Final

import msgspec

from banger.contract import egress as egresses
from banger.contract import errors, given_names, names

API_VERSION: Final = 1

Vcpus = Annotated[int, msgspec.Meta(ge=1, le=32)]
MemoryMib = Annotated[int, msgspec.Meta(ge=64, le=1024 * 1024)]
DiskMib = Annotated[int, msgspec.Meta(ge=16, le=16 * 1024 * 1024)]
LifeSeconds = Annotated[int, msgspec.Meta(ge=0, le=10 * 366 * 86400)]
PeerNetwork = Annotated[str, msgspec.Meta(pattern=names.PEER_NETWORK_PATTERN)]
VmNameText = Annotated[str, msgspec.Meta(pattern=given_names.VM_NAME_PATTERN)]


class VmState(enum.StrEnum):
    """`running`: the agent answered within the last seconds. One whose agent is silent shows `error`."""

    CREATED = "created"
    RUNNING = "running"
    STOPPED = "stopped"
    ERROR = "error"

    @property
    def can_start(self) -> bool:
        return self is not VmState.RUNNING


class SizeSource(enum.StrEnum):
    """Where a size came from, in the order of preference."""

    REQUEST = "request"
    CONFIG = "config"
    HOST = "host"
    DEFAULT = "default"


class Stage(enum.StrEnum):
    """The progress stages that a client sees."""

    PREFLIGHT = "preflight"
    PREPARE_ROOTFS = "prepare_rootfs"
    PREPARE_HOST_FEATURES = "prepare_host_features"
    BOOT_FIRECRACKER = "boot_firecracker"
    WAIT_VSOCK_AGENT = "wait_vsock_agent"
    WAIT_GUEST_READY = "wait_guest_ready"
    FINALIZE = "finalize"
    PULL_KERNEL = "pull_kernel"
    PULL_IMAGE = "pull_image"
    IMPORT_IMAGE = "import_image"
    BUILD_IMAGE = "build_image"
    PULL_RUNTIME = "pull_runtime"
    STOP = "stop"
    DELETE = "delete"


class Resource(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what the API returns; a client ignores fields that it does not know."""


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what a client sends; the daemon refuses fields that it does not know."""


# --- virtual machines ---


class CreateVm(Body, frozen=True, kw_only=True):
    """Absent values are resolved by the daemon: configuration, then the host's size, then a constant."""

    name: VmNameText | None = None
    image: str | None = None
    kernel: str | None = None
    vcpus: Vcpus | None = None
    memory_mib: MemoryMib | None = None
    disk_size_mib: DiskMib | None = None
    network: bool = True
    ipv6: bool | None = None
    """Whether the guest has an IPv6 address too; absent, as configured."""
    nat: bool | None = None
    """Whether the guest reaches beyond its host; absent, when `egress` or `allow` says so."""
    egress: egresses.Egress | None = None
    """Where to; absent: the internet, or with `allow` and without `nat` only what is allowed."""
    allow: tuple[str, ...] = ()
    """Besides: `CIDR[:PORT]`, `[CIDR]:PORT` for IPv6, or `NAME[:PORT]`."""
    peer_network: PeerNetwork = ""
    """VMs of one peer network reach each other."""
    publish: tuple[str, ...] = ()
    """`[ADDR:]HOSTPORT:GUESTPORT[/udp]`, on loopback by default; one in use is refused, and nothing made."""
    idle_stop_s: LifeSeconds = 0
    """Stop it after so long without use: commands, ssh, copies, workspaces, published ports. 0: never."""
    ttl_s: LifeSeconds = 0
    """Stop it so long after each start. 0: never."""
    autostart: bool = False
    """Start it again with the host, when it ran as that went down."""
    start: bool = True
    remove_on_failure: bool = False
    """A start that fails deletes the VM instead of keeping it in `error` (`vm run --rm`)."""
    for_command: bool = False
    """Delete it when no command with `remove` (ExecRequest) comes within a minute of its being there."""
    needs_git: bool = False
    """Refuse an image without git, before anything is made: a repository is to go in."""
    needs_mise: bool = False
    """Refuse an image without mise, before anything is made: the repository's tools are to be installed."""


class SetVm(Body, frozen=True, kw_only=True):
    """What a guest reaches, how long it runs and whether it starts with the host change at once; a running
    VM is refused any other change with `conflict`.
    """

    name: VmNameText | None = None
    vcpus: Vcpus | None = None
    memory_mib: MemoryMib | None = None
    disk_size_mib: DiskMib | None = None
    """The work disk grows at the next start; it never shrinks."""
    kernel: str | None = None
    nat: bool | None = None
    """As of CreateVm; true alone is refused for a VM that may reach only what is allowed."""
    egress: egresses.Egress | None = None
    """As of CreateVm; absent, as it was when `nat` and `allow` open nothing either."""
    allow: tuple[str, ...] | None = None
    """Instead of what was allowed; alone, nothing else is reached. Empty: it takes those away."""
    idle_stop_s: LifeSeconds | None = None
    """0 takes it away."""
    ttl_s: LifeSeconds | None = None
    """From now on; 0 takes it away."""
    autostart: bool | None = None

    @property
    def changes_egress(self) -> bool:
        return any(value is not None for value in (self.nat, self.egress, self.allow))

    @property
    def needs_no_stop(self) -> bool:
        others = (self.name, self.vcpus, self.memory_mib, self.disk_size_mib, self.kernel)
        return all(value is None for value in others)


class ExtendVm(Body, frozen=True, kw_only=True):
    """A running VM lives on, and has just been used."""

    by_s: Annotated[int, msgspec.Meta(ge=1, le=10 * 366 * 86400)] | None = None
    """So much longer than it would; absent: as long from now as from its start."""


class StepTiming(Resource, frozen=True, kw_only=True):
    """One step of the last start, in the order it ran."""

    name: str
    stage: str
    started_ms: float
    """Since the start began."""
    elapsed_ms: float


class Workspace(Resource, frozen=True, kw_only=True):
    """A repository of the host as it was last sent into a VM."""

    path: str
    """Where it is in the guest."""
    source: str
    """Where it came from on the host."""
    head: str
    """Its commit then; empty before the first one."""
    branch: str
    """Such as refs/heads/main; empty when detached."""
    worktree: str
    """The files, as a git tree; of a full copy a digest of their names, modes, sizes and times."""
    index: str
    """What was staged, as a git tree."""
    prepared_at: datetime.datetime
    options: tuple[str, ...] = ()
    """How it was sent: `untracked`, `read_only`, `full_copy`, `branch` (a new one), `fixed` (a commit)."""


class Vm(Resource, frozen=True, kw_only=True):
    id: str
    name: str
    state: VmState
    image: str
    image_id: str
    kernel: str
    kernel_id: str
    vcpus: int
    """0 where the daemon cannot read what it kept of the VM, as its last error says then; the sizes too."""
    memory_mib: int
    disk_size_mib: int
    network: bool
    address: str
    """The guest's IPv4 address, reserved for the VM's life; empty without network."""
    address6: str = ""
    """Its IPv6 address, as long; empty unless asked for."""
    nat: bool = False
    egress: egresses.Egress = egresses.Egress.INTERNET
    """Where NAT leads to."""
    allow: tuple[str, ...] = ()
    peer_network: str = ""
    publish: tuple[str, ...] = ()
    """`ADDR:HOSTPORT:GUESTPORT/PROTOCOL` each: what is offered while it runs, but for `unpublished`."""
    unpublished: dict[str, str] = {}
    """Of a VM that runs: those of `publish` that are not open, each with why; they are tried again."""
    created_at: datetime.datetime
    started_at: datetime.datetime | None = None
    boot_id: str = ""
    """The guest kernel's, while running."""
    pid: int = 0
    """Of the VMM, as seen now; 0 when none runs."""
    silent_since: datetime.datetime | None = None
    """When the agent last answered, if that is too long ago. The VM can be stopped like one that runs."""
    last_error: errors.ErrorBody | None = None
    sources: dict[str, SizeSource] = {}
    last_start: tuple[StepTiming, ...] = ()
    """Only in the answer for one VM, not in lists."""
    workspace: Workspace | None = None
    """The one that was sent last."""
    other_workspaces: tuple[Workspace, ...] = ()
    """Those at other paths."""
    idle_stop_s: int = 0
    ttl_s: int = 0
    idle_stop_at: datetime.datetime | None = None
    """When it will be stopped if nobody uses it; absent while somebody does."""
    ttl_ends_at: datetime.datetime | None = None
    autostart: bool = False
    stopped_with_host: bool = False
    """It ran when its host went down, and was not started since."""
    stopped_because: str = ""
    """Why time stopped it, to come after its name, such as `had been idle for 30 minutes`."""

    @property
    def all_workspaces(self) -> tuple[Workspace, ...]:
        """The one that was sent last first."""
        return (self.workspace, *self.other_workspaces) if self.workspace is not None else ()

    @property
    def is_known(self) -> bool:
        """False where the daemon cannot read what it kept of it; the last error says so.

        Then id, name, state, image, kernel, age and VMM are as shown, and all else is only left out.
        """
        return self.vcpus > 0

    @property
    def has_vmm(self) -> bool:
        """It runs as a process, whether or not its agent answers."""
        return self.state is VmState.RUNNING or self.silent_since is not None


class VmStats(Resource, frozen=True, kw_only=True):
    """Counters since the VMM started; rates are the client's business."""

    id: str
    name: str
    pid: int
    uptime_ms: int
    cpu_usec: int
    memory_bytes: int
    memory_peak_bytes: int
    guest_memory_total_bytes: int
    guest_memory_available_bytes: int
    read_bytes: int
    write_bytes: int
    rx_bytes: int
    tx_bytes: int
    overlay_bytes: int
    work_disk_bytes: int
    host_free_bytes: int
    """Of the host's file system that its disks are on: without any, what its guest writes is lost."""


EXEC_WINDOW_BYTES: Final = 256 * 1024
"""What an ExecRequest calls windowed."""


class ExecRequest(Body, frozen=True, kw_only=True):
    """First message on the exec WebSocket, as JSON text."""

    argv: tuple[str, ...]
    """Empty: what the image says it runs, as the user that it says."""
    env: tuple[str, ...] = ()
    """`NAME=value` each, over the image's own, added to the guest user's environment."""
    cwd: str = ""
    """Empty: the workspace for root, when there is one, else the image's directory, else the user's home."""
    user: str = ""
    tty: bool = False
    rows: int = 0
    cols: int = 0
    remove: bool = False
    """Delete the VM when this command ends or this client goes away (`vm run --rm`)."""
    notices: bool = False
    """The client takes ExecNotice messages before the last one."""
    windowed: bool = False
    """The client sends at most 262144 bytes of stdin beyond those that ExecNotices call taken, and so is
    heard also while the command takes none."""
    hold: bool = False
    """Begin only when an ExecControl says so: until then the client prepares the VM for the command."""


class ExecControl(Body, frozen=True, kw_only=True):
    """Later JSON text messages from the client. Stdin travels as binary messages, an empty one ends it."""

    begin: bool = False
    resize: tuple[int, int] | None = None
    signal: int = 0


class ExecNotice(Resource, frozen=True, kw_only=True):
    """While the command runs, as JSON text."""

    notice: str = ""
    """Something for the user to know."""
    taken: int = 0
    """More bytes of stdin are on their way no longer (`windowed`)."""


class ExecEnd(Resource, frozen=True, kw_only=True):
    """Last message from the daemon, as JSON text. Output travels as binary: a byte 1 or 2, then the data."""

    exit_status: int | None = None
    """0–255 as a shell would report it: 128 + n for signal n."""
    signal: int = 0
    error: errors.ErrorBody | None = None


# --- images, kernels, runtime ---


class ImageRun(Resource, frozen=True, kw_only=True):
    """How the image's author wants it run."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    user: str = ""
    working_dir: str = ""
    exposed_ports: tuple[str, ...] = ()


class Image(Resource, frozen=True, kw_only=True):
    id: str
    name: str
    tags: tuple[str, ...] = ()
    """What it was pulled by, with its tag."""
    arch: str
    size_bytes: int
    """Of the root disk; what it takes here is `stored_bytes`."""
    source: str
    created_at: datetime.datetime | None = None
    has_init: bool = True
    has_shell: bool = True
    default_kernel: str = ""
    used_by: tuple[str, ...] = ()
    """Names of the VMs made from it."""
    stored_bytes: int = 0
    reference: str = ""
    """Of an image that was pulled, in full."""
    digest: str = ""
    """What `reference` meant then."""
    layers_bytes: int = 0
    """As they were transferred."""
    run: ImageRun = ImageRun()
    available: bool = False
    """Only in the catalog, not on this host yet."""
    is_default: bool = False
    """VMs are made from it for which no image is named."""


class Kernel(Resource, frozen=True, kw_only=True):
    id: str
    name: str
    kind: str
    """`direct` (no initrd) or `initrd`."""
    version: str
    arch: str
    size_bytes: int
    source: str
    created_at: datetime.datetime | None = None
    available: bool = False
    """Only in the catalog, not on this host yet."""
    used_by: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    """What the initrd loads, in this order."""
    checked_by: str = ""
    """What was asked whether it can boot: its configuration, lists of its modules, or names in the image."""
    lacks: tuple[str, ...] = ()
    """What a guest will not have, such as a network."""
    unknown: tuple[str, ...] = ()
    """What it needs or may have, and nothing tells."""


class RuntimeFile(Resource, frozen=True, kw_only=True):
    name: str
    path: str
    present: bool
    version: str = ""
    sha256: str = ""
    verified: bool = False
    source: str = ""


# --- operations ---

STARTS: Final = frozenset({"vm.create", "vm.start", "vm.restart"})
"""Kinds of operations under which a VM is being started."""


class OperationStatus(enum.StrEnum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self is not OperationStatus.RUNNING


class Operation(Resource, frozen=True, kw_only=True):
    """Long work. Answered with 202; watch `/v1/operations/{id}/events`, cancel with DELETE."""

    id: str
    kind: str
    """Such as `vm.create`, `vm.stop`, `image.build`."""
    target: str
    """Name of what it works on."""
    status: OperationStatus
    created_at: datetime.datetime
    ended_at: datetime.datetime | None = None
    stage: str = ""
    detail: str = ""
    error: errors.ErrorBody | None = None
    vm: Vm | None = None
    image: Image | None = None
    kernel: Kernel | None = None


class Event(Resource, frozen=True, kw_only=True):
    """One line of an operation's event stream."""

    operation: str
    seq: int
    time: datetime.datetime
    kind: str
    """`stage` (one began), `progress` (current of total), `note` (a line to show), `end` (see `result`)."""
    stage: str = ""
    detail: str = ""
    current: int = 0
    """Bytes."""
    total: int = 0
    """Bytes; 0 where nobody knows."""
    elapsed_ms: float = 0.0
    """Since the operation began."""
    result: Operation | None = None


class DnsStatus(Resource, frozen=True, kw_only=True):
    """How names of VMs are answered."""

    listen: str
    """For this host; empty: not at all."""
    listen_source: SizeSource
    guests: str = ""
    """For guests, who ask at port 53 of the same address; empty: not at all."""
    upstream: tuple[str, ...] = ()
    """Whom we ask for guests with NAT."""
    upstream_source: SizeSource
    routed: bool = False
    """This host's resolver asks us for `.vm` by itself."""
    problem: str = ""
    """Why it does not."""


class DaemonInfo(Resource, frozen=True, kw_only=True):
    version: str
    api_version: int
    pid: int
    started_at: datetime.datetime
    helper_version: str = ""
    """Empty when the helper does not answer."""
    firecracker_version: str = ""
    dns: DnsStatus | None = None
    can_build: bool = True
    """The socket of the builder is there, which runs what the packages of recipes bring."""
