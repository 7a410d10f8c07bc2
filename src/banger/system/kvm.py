# SPDX-License-Identifier: MIT
"""Whether this machine's KVM runs a guest. A /dev/kvm that opens proves nothing.

On some machines it opens, creates a VM and then cannot run it. So a few real instructions run in a virtual
processor, in a process of its own with a time limit: `python -m banger.system.kvm` is that process. Used by
doctor, and by the lab to choose its accelerator.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import sys
from pathlib import Path
from typing import Final

from banger import run
from banger.contract import errors

KVM_CREATE_VM: Final = 0xAE01
KVM_GET_VCPU_MMAP_SIZE: Final = 0xAE04
KVM_CREATE_VCPU: Final = 0xAE41
KVM_SET_USER_MEMORY_REGION: Final = 0x4020AE46
KVM_RUN: Final = 0xAE80
KVM_SET_REGS: Final = 0x4090AE82
KVM_GET_SREGS: Final = 0x8138AE83
KVM_SET_SREGS: Final = 0x4138AE84
KVM_EXIT_IO: Final = 2
PROBE_PORT: Final = 0x10
PROBE_VALUE: Final = 42
LIMIT_S: Final = 45.0
"""Who never answers is told from who has much else to do: an interpreter starts, and a VM is made."""

# mov al, 21; add al, al; out 0x10, al; hlt
PROBE_CODE: Final = bytes((0xB0, PROBE_VALUE // 2, 0x00, 0xC0, 0xE6, PROBE_PORT, 0xF4))
CODE_ADDRESS: Final = 0x1000
DENIED: Final = 77
"""Exit status of the process that may not open /dev/kvm."""


def has_instructions() -> bool:
    """There are instructions of ours for this machine's architecture; elsewhere only a processor is made."""
    return platform.machine() == "x86_64"


def refusal(cpuinfo: str, *, python: Path = Path(sys.executable), limit_s: float = LIMIT_S) -> str:
    """Why this machine's KVM runs no guest; empty when it does. PermissionError: this user may not try.

    The processor's flag alone promises nothing, and a KVM without it may run a few instructions but no
    ordinary kernel.
    """
    if has_instructions() and not cpu_flags(cpuinfo) & {"svm", "vmx"}:
        return "no svm or vmx in /proc/cpuinfo"
    try:
        ended = run.run(
            [str(python), "-I", "-m", __name__],  # root looks too, in whatever directory
            deadline_s=limit_s,
            ok=range(-64, 256),
        )
    except errors.DeadlineError:
        return f"KVM did not run seven bytes of code within {limit_s:g} s"
    if ended.status == DENIED:
        raise PermissionError(f"/dev/kvm: {_last_line(ended.stderr)}")
    return "" if ended.status == 0 else f"KVM does not run a guest: {_last_line(ended.stderr)}"


def cpu_flags(cpuinfo: str) -> set[str]:
    for line in cpuinfo.splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _last_line(text: bytes) -> str:
    return (text.decode(errors="replace").strip().splitlines() or ["no message"])[-1]


def run_code() -> int:
    """Run the probe's instructions in a virtual processor; give the value they put out on their port."""
    kvm, vcpu, _memory = _make_processor()
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


def _make_processor() -> tuple[int, int, mmap.mmap]:
    """/dev/kvm, a VM's one processor, and its memory with the probe's code, to be held while it runs."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    memory.write(PROBE_CODE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    numbers = (0, CODE_ADDRESS, mmap.PAGESIZE, address)
    region = b"".join(number.to_bytes(8, "little") for number in numbers)
    fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, region)
    return kvm, fcntl.ioctl(vm, KVM_CREATE_VCPU, 0), memory


def _main() -> int:
    """The process with the time limit: exits 0, says why not, or exits DENIED."""
    try:
        if not has_instructions():
            _make_processor()
            return 0
        value = run_code()
    except PermissionError as error:
        print(error.strerror, file=sys.stderr)
        return DENIED
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    if value != PROBE_VALUE:
        print(f"the virtual processor computed {value} instead of {PROBE_VALUE}", file=sys.stderr)
        return 1
    return 0


def this_machine() -> str:
    """`refusal` for the machine this runs on."""
    return refusal(Path("/proc/cpuinfo").read_text())


if __name__ == "__main__":
    sys.exit(_main())
