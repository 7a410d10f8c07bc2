# SPDX-License-Identifier: MIT
"""Decides what runs the lab's processors: hardware virtualisation that is proven to work, or software.

The proof is the product's own, `banger.system.kvm`. Used by qemu.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from banger.system import kvm


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What QEMU is told to run processors with, and why."""

    name: str
    reason: str
    arguments: tuple[str, ...]

    @property
    def is_software(self) -> bool:
        return self.name == "tcg"


# Without ERMS: a kernel that has it clears a page byte by byte, and each store into a page that once held
# code, as of a guest that has ended, is a search through what was translated of it.
_EMULATED: Final = ("-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max,+svm,-erms")


@functools.cache
def choose() -> Accelerator:
    """Probe this machine; a failed probe is no error, software always works."""
    reason = _refusal()
    if reason is None:
        return Accelerator("kvm", "KVM runs a guest and can nest", ("-accel", "kvm", "-cpu", "host"))
    return Accelerator("tcg", reason, _EMULATED)


def _refusal() -> str | None:
    return guest_refusal() or _nesting_refusal()


def _nesting_refusal() -> str | None:
    vendor = "amd" if "svm" in kvm.cpu_flags(Path("/proc/cpuinfo").read_text()) else "intel"
    nested = Path(f"/sys/module/kvm_{vendor}/parameters/nested")
    is_on = nested.exists() and nested.read_text().strip() in ("1", "Y")
    return None if is_on else f"{nested} is not on"


def guest_refusal() -> str | None:
    """Why this machine's KVM runs no guest; None when it does."""
    try:
        return kvm.this_machine() or None
    except PermissionError as error:
        return str(error)
