# SPDX-License-Identifier: MIT
"""Decides what runs the lab's processors: hardware virtualisation that is proven to work, or software.

A /dev/kvm that opens proves nothing: on some machines it opens, creates a VM and then cannot run it. So the
probe runs a few real instructions in a virtual processor, in a process of its own with a time limit. Used by
qemu; `python -m lab.accel` is that process.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import mmap
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_EXIT_IO = 2
PROBE_PORT = 0x10
PROBE_VALUE = 42
PROBE_LIMIT_S = 10

# mov al, 21; add al, al; out 0x10, al; hlt
PROBE_CODE = bytes((0xB0, PROBE_VALUE // 2, 0x00, 0xC0, 0xE6, PROBE_PORT, 0xF4))
CODE_ADDRESS = 0x1000


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What QEMU is told to run processors with, and why."""

    name: str
    reason: str
    arguments: tuple[str, ...]

    @property
    def is_software(self) -> bool:
        return self.name == "tcg"


@functools.cache
def choose() -> Accelerator:
    """Probe this machine; a failed probe is no error, software always works."""
    reason = _refusal()
    if reason is None:
        return Accelerator("kvm", "KVM runs a guest and can nest", ("-accel", "kvm", "-cpu", "host"))
    return Accelerator("tcg", reason, ("-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max,+svm"))


def _refusal() -> str | None:
    return guest_refusal() or _nesting_refusal()


def _nesting_refusal() -> str | None:
    vendor = "amd" if "svm" in _cpu_flags(Path("/proc/cpuinfo").read_text()) else "intel"
    nested = Path(f"/sys/module/kvm_{vendor}/parameters/nested")
    is_on = nested.exists() and nested.read_text().strip() in ("1", "Y")
    return None if is_on else f"{nested} is not on"


def guest_refusal() -> str | None:
    """Why this machine's KVM runs no guest; None when it does.

    The flag alone promises nothing, and a KVM without it may run a few instructions but no ordinary kernel.
    """
    if not _cpu_flags(Path("/proc/cpuinfo").read_text()) & {"svm", "vmx"}:
        return "no svm or vmx in /proc/cpuinfo"
    try:
        probe = subprocess.run(
            [sys.executable, __file__], capture_output=True, timeout=PROBE_LIMIT_S, check=False, text=True
        )
    except subprocess.TimeoutExpired:
        return f"KVM did not run seven bytes of code within {PROBE_LIMIT_S} s"
    return None if probe.returncode == 0 else f"KVM does not run a guest: {_last_line(probe.stderr)}"


def _cpu_flags(cpuinfo: str) -> set[str]:
    for line in cpuinfo.splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def run_code() -> int:
    """Run the probe's instructions in a virtual processor; give the value they put out on their port."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    memory.write(PROBE_CODE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    region = b"".join(
        (
            (0).to_bytes(8, "little"),
            CODE_ADDRESS.to_bytes(8, "little"),
            mmap.PAGESIZE.to_bytes(8, "little"),
            address.to_bytes(8, "little"),
        )
    )
    fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, region)
    vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
    shared = mmap.mmap(vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0))
    segments = bytearray(312)
    fcntl.ioctl(vcpu, KVM_GET_SREGS, segments)
    segments[0:8] = bytes(8)  # cs.base
    segments[12:14] = bytes(2)  # cs.selector
    fcntl.ioctl(vcpu, KVM_SET_SREGS, bytes(segments))
    registers = bytearray(144)
    registers[128:136] = CODE_ADDRESS.to_bytes(8, "little")  # rip
    registers[136:144] = (2).to_bytes(8, "little")  # rflags: the bit that is always set
    fcntl.ioctl(vcpu, KVM_SET_REGS, bytes(registers))
    fcntl.ioctl(vcpu, KVM_RUN, 0)
    exit_reason = int.from_bytes(shared[8:12], "little")
    port = int.from_bytes(shared[34:36], "little")
    if (exit_reason, port) != (KVM_EXIT_IO, PROBE_PORT):
        raise OSError(f"KVM_RUN left with reason {exit_reason} instead of port output")
    offset = int.from_bytes(shared[40:48], "little")
    return shared[offset]


if __name__ == "__main__":
    value = run_code()
    if value != PROBE_VALUE:
        raise SystemExit(f"the virtual processor computed {value} instead of {PROBE_VALUE}")
