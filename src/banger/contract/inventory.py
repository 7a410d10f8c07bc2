# SPDX-License-Identifier: MIT
"""What of banger's is on a host, and whose each thing is: the answer behind `banger gc`."""

from __future__ import annotations

import enum

import msgspec

from banger.contract import errors


class Kind(enum.StrEnum):
    """What a thing is. The words are those that people read."""

    VMM = "vmm"
    PROCESS = "process"
    SNAPSHOT = "snapshot"
    LOOP = "loop"
    TAP = "tap"
    RULES = "rules"
    JAIL = "jail"
    CGROUP = "cgroup"
    SOCKET = "socket"
    MOUNT = "mount"
    BRIDGE = "bridge"
    LOGS = "logs"
    DISKS = "disks"
    IMAGE = "image"
    KERNEL = "kernel"
    STAGED = "staged"
    FILE = "file"
    ADDRESS = "address"
    UID = "uid"

    @property
    def is_of_runtime(self) -> bool:
        """Only a VM that runs, or an operation on it, has use for such a thing."""
        return self in _RUNTIME


_RUNTIME = frozenset(
    {
        Kind.VMM,
        Kind.PROCESS,
        Kind.SNAPSHOT,
        Kind.LOOP,
        Kind.TAP,
        Kind.RULES,
        Kind.JAIL,
        Kind.CGROUP,
        Kind.SOCKET,
        Kind.MOUNT,
    }
)


class Thing(msgspec.Struct, frozen=True):
    """One thing on the host. Without an owner it is a leftover, and `banger gc --apply` takes it away."""

    kind: Kind
    name: str
    why: str
    """Why the owner has it, or why nobody does."""
    owner: str = ""
    """A VM, image or kernel by name, an operation by id, or `banger`; empty for nobody."""
    vm_id: str = ""
    foreign: bool = False
    """Named like ours and not made by us: it is shown, and left alone."""


class Inventory(msgspec.Struct, frozen=True):
    """Everything there is, leftovers first."""

    things: tuple[Thing, ...]

    @property
    def leftovers(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if not thing.owner and not thing.foreign)

    def sayable(self) -> Inventory:
        """For a wire; what is done by a name needs it as it is."""
        return Inventory(
            tuple(
                msgspec.structs.replace(each, name=errors.sayable(each.name), why=errors.sayable(each.why))
                for each in self.things
            )
        )
