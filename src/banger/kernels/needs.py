# SPDX-License-Identifier: MIT
"""What a kernel must have to boot under Firecracker and to serve banger's guest, and whether one has it.

Asked in this order: the kernel's build configuration, the lists of its modules, the names that its drivers
must carry in the image. What none of them tells is unknown, and is said to be. Used by the importer.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Final, Literal

from banger.contract import errors
from banger.kernels import build_config, files, modules

Basis = Literal["embedded config", "config file", "module lists", "names in the image"]


class State(enum.Enum):
    BUILT_IN = enum.auto()
    MODULE = enum.auto()
    ABSENT = enum.auto()
    UNKNOWN = enum.auto()


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """Met when one of `options` is; `names`: what an image with it built in must contain, one of them."""

    title: str
    options: tuple[str, ...]
    module: str = ""
    names: tuple[bytes, ...] = ()
    arch: str = ""


def _driver(module: str, option: str, name: bytes = b"") -> Need:
    return Need(module, (option,), module, (b"\0%b\0" % (name or module.encode()),))


# The order is that of loading where modules know no dependency: the bus before the drivers on it.
REQUIRED: Final = (
    Need("64-bit", ("64BIT",), names=(b"Linux version ",)),
    _driver("virtio_mmio", "VIRTIO_MMIO", b"virtio-mmio"),
    _driver("virtio_blk", "VIRTIO_BLK"),
    _driver("ext4", "EXT4_FS"),
    _driver("vmw_vsock_virtio_transport", "VIRTIO_VSOCKETS"),
    Need("devtmpfs", ("DEVTMPFS",), names=(b"devtmpfs",)),
    Need("proc", ("PROC_FS",)),
    Need("sysfs", ("SYSFS",)),
    Need("tmpfs", ("TMPFS",)),
    Need("unix sockets", ("UNIX",)),
    Need("ELF programs", ("BINFMT_ELF",)),
)
# How the kernel learns where Firecracker's devices are.
DISCOVERY: Final = (
    Need(
        "ACPI or virtio_mmio.device=",
        ("ACPI", "VIRTIO_MMIO_CMDLINE_DEVICES"),
        names=(b"ACPI: Interpreter enabled", b"virtio_mmio.device"),
        arch="x86_64",
    ),
    Need("device tree", ("OF",), names=(b"virtio,mmio",), arch="aarch64"),
)
FOR_INITRD: Final = (Need("initrd", ("BLK_DEV_INITRD",)), Need("gzip initrd", ("RD_GZIP",)))
WISHED: Final = (
    Need("network", ("VIRTIO_NET",), "virtio_net", (b"\0virtio_net\0",)),
    Need("overlay", ("OVERLAY_FS",), "overlay", (b"\0overlay\0",)),
    Need("serial console", ("SERIAL_8250_CONSOLE",), names=(b"serial8250",)),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """`load`: the modules to ask for; `lacks`: wishes not met; `unknown`: what nothing tells."""

    basis: Basis
    load: tuple[str, ...]
    lacks: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Evidence:
    image: files.Data
    arch: str
    config: build_config.Config | None
    """From the image itself, or else from a file."""
    embedded: bool
    tree: modules.Tree | None

    @property
    def basis(self) -> Basis:
        if self.config is not None:
            return "embedded config" if self.embedded else "config file"
        return "module lists" if self.tree is not None else "names in the image"

    def state(self, need: Need) -> State:
        found = self._configured(need) if self.config is not None else self._listed(need)
        if found is State.UNKNOWN and self.config is None and need.names:
            return State.BUILT_IN if any(self.image.find(name) >= 0 for name in need.names) else State.ABSENT
        return found

    def has_file(self, need: Need) -> bool:
        return self.tree is not None and self.tree.has_file(need.module)

    def _configured(self, need: Need) -> State:
        assert self.config is not None  # noqa: S101  # the caller asked
        values = {self.config.get(option, "n") for option in need.options}
        if "y" in values:
            return State.BUILT_IN
        return State.MODULE if "m" in values else State.ABSENT

    def _listed(self, need: Need) -> State:
        if self.tree is None or not need.module:
            return State.UNKNOWN
        if self.tree.has_file(need.module):
            return State.MODULE
        if need.module in self.tree.builtin:
            return State.BUILT_IN
        return State.ABSENT if self.tree.builtin else State.UNKNOWN


def judge(evidence: Evidence, *, ready_initrd: bool) -> Verdict:
    """Raises BadRequestError with every reason why the kernel cannot boot."""
    required = [need for need in (*DISCOVERY, *REQUIRED) if need.arch in ("", evidence.arch)]
    states = {need: evidence.state(need) for need in (*required, *WISHED)}
    loadable = [need for need in states if states[need] is State.MODULE and evidence.has_file(need)]
    if loadable or ready_initrd:
        required += FOR_INITRD
        states |= {need: evidence.state(need) for need in FOR_INITRD}
    # An initrd that came with the kernel may hold what nothing else shows.
    entrusted = [need for need in states if ready_initrd and _may_be_loaded(need, states[need], evidence)]
    fine = (*loadable, *entrusted)
    absent = [need for need in required if states[need] is State.ABSENT and need not in fine]
    no_file = [need for need in required if states[need] is State.MODULE and need not in fine]
    if absent or no_file:
        raise errors.BadRequestError(_reasons(absent, no_file, evidence), hint=_hint(evidence))
    return Verdict(
        evidence.basis,
        load=tuple(need.module for need in states if need in loadable),
        lacks=tuple(
            need.title
            for need in WISHED
            if states[need] in (State.ABSENT, State.MODULE) and need not in fine
        ),
        unknown=tuple(need.title for need in states if states[need] is State.UNKNOWN or need in entrusted),
    )


def _may_be_loaded(need: Need, state: State, evidence: Evidence) -> bool:
    unseen = evidence.config is None and state is State.ABSENT
    return bool(need.module) and (unseen or state is State.MODULE) and not evidence.has_file(need)


def _reasons(absent: Sequence[Need], no_file: Sequence[Need], evidence: Evidence) -> str:
    said = []
    if absent:
        said.append(f"it is built without {', '.join(_named(need, evidence) for need in absent)}")
    if no_file:
        said.append(
            f"{', '.join(need.title for need in no_file)}: built as modules, which did not come with it"
        )
    return f"it cannot boot under Firecracker: {'; '.join(said)}"


def _named(need: Need, evidence: Evidence) -> str:
    options = " or ".join(f"CONFIG_{option}" for option in need.options)
    return f"{need.title} ({options})" if evidence.config is not None else need.title


def _hint(evidence: Evidence) -> str:
    if evidence.tree is not None:
        return "import a kernel that is built for virtual machines"
    return "import the distribution's package, or a directory that has lib/modules/VERSION beside the kernel"
