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

from banger.contract import errors, names

API_VERSION: Final = 1

Vcpus = Annotated[int, msgspec.Meta(ge=1, le=32)]
MemoryMib = Annotated[int, msgspec.Meta(ge=64, le=1024 * 1024)]
DiskMib = Annotated[int, msgspec.Meta(ge=16, le=16 * 1024 * 1024)]
VmNameText = Annotated[str, msgspec.Meta(pattern=names.VM_NAME_PATTERN)]


class VmState(enum.StrEnum):
    """`running` is entered only after the agent answered."""

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
    start: bool = True
    remove_on_failure: bool = False
    """A start that fails deletes the VM instead of keeping it in `error` (`vm run --rm`)."""


class SetVm(Body, frozen=True, kw_only=True):
    """Sizes take effect at the next start; a running VM is refused with `conflict`."""

    name: VmNameText | None = None
    vcpus: Vcpus | None = None
    memory_mib: MemoryMib | None = None
    kernel: str | None = None


class StepTiming(Resource, frozen=True, kw_only=True):
    """One step of the last start, in the order it ran."""

    name: str
    stage: str
    started_ms: float
    """Since the start began."""
    elapsed_ms: float


class Vm(Resource, frozen=True, kw_only=True):
    id: str
    name: str
    state: VmState
    image: str
    image_id: str
    kernel: str
    kernel_id: str
    vcpus: int
    memory_mib: int
    disk_size_mib: int
    network: bool
    address: str
    """The guest's IPv4 address, reserved for the VM's life; empty without network."""
    created_at: datetime.datetime
    started_at: datetime.datetime | None = None
    boot_id: str = ""
    """The guest kernel's, while running."""
    pid: int = 0
    """Of the VMM, as seen now; 0 when none runs."""
    last_error: errors.ErrorBody | None = None
    sources: dict[str, SizeSource] = {}
    last_start: tuple[StepTiming, ...] = ()
    """Only in the answer for one VM, not in lists."""


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


class ExecRequest(Body, frozen=True, kw_only=True):
    """First message on the exec WebSocket, as JSON text."""

    argv: tuple[str, ...]
    env: tuple[str, ...] = ()
    """`NAME=value` each, added to the guest user's environment."""
    cwd: str = ""
    user: str = ""
    tty: bool = False
    rows: int = 0
    cols: int = 0
    remove: bool = False
    """Delete the VM when this command ends or this client goes away (`vm run --rm`)."""


class ExecControl(Body, frozen=True, kw_only=True):
    """Later JSON text messages from the client. Stdin travels as binary messages, an empty one ends it."""

    resize: tuple[int, int] | None = None
    signal: int = 0


class ExecEnd(Resource, frozen=True, kw_only=True):
    """Last message from the daemon, as JSON text. Output travels as binary: a byte 1 or 2, then the data."""

    exit_status: int | None = None
    """0–255 as a shell would report it: 128 + n for signal n."""
    signal: int = 0
    error: errors.ErrorBody | None = None


# --- images, kernels, runtime ---


class Image(Resource, frozen=True, kw_only=True):
    id: str
    name: str
    tags: tuple[str, ...] = ()
    arch: str
    size_bytes: int
    source: str
    created_at: datetime.datetime
    has_init: bool = True
    default_kernel: str = ""
    used_by: tuple[str, ...] = ()
    """Names of the VMs made from it."""


class BuildImage(Body, frozen=True, kw_only=True):
    recipe: str
    name: str | None = None


class RegisterImage(Body, frozen=True, kw_only=True):
    """`path`: a directory with `rootfs.ext4` and `image.json`, readable by the owner; it is copied."""

    path: str
    name: str | None = None


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


class ImportKernel(Body, frozen=True, kw_only=True):
    path: str
    name: str


class PullKernel(Body, frozen=True, kw_only=True):
    name: str


class RuntimeFile(Resource, frozen=True, kw_only=True):
    name: str
    path: str
    present: bool
    version: str = ""
    sha256: str = ""
    verified: bool = False
    source: str = ""


# --- operations ---


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
    total: int = 0
    elapsed_ms: float = 0.0
    """Since the operation began."""
    result: Operation | None = None


class DaemonInfo(Resource, frozen=True, kw_only=True):
    version: str
    api_version: int
    pid: int
    started_at: datetime.datetime
    helper_version: str = ""
    """Empty when the helper does not answer."""
    firecracker_version: str = ""
