# SPDX-License-Identifier: MIT
"""Starts QEMU for one lab and reaches it again later: its arguments, its process, its control socket.

Used by session only. Everything lies in the lab's directory, which is QEMU's working directory, so that no
socket path is too long.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import accel, command, errors, limits, process, qmp

BOOT_ARGUMENTS = (
    "console=ttyS0 quiet loglevel=4 panic=5 net.ifnames=0 mitigations=off audit=0 "
    "systemd.show_status=0 random.trust_cpu=on"
)
DEFAULT_CPUS = 1
DEFAULT_MEMORY_MIB = 4096
DISK = "disk.qcow2"
CONSOLE = "console.log"
QEMU_LOG = "qemu.log"
HUNG = b"BUG: soft lockup"
CONTROL = "qmp.sock"
RECORD = "machine.json"
CONTROL_LIMIT_S = limits.patient(30)
SAVE_LIMIT_S = limits.patient(60)
SAVE_BYTES_PER_S = 8 << 30
DISCONNECT_LIMIT_S = 3
HOT_PLUG_SLOTS = 4


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the machine is made of; part of the key of a saved state."""

    cpus: int = DEFAULT_CPUS
    memory_mib: int = DEFAULT_MEMORY_MIB


@dataclass(frozen=True, slots=True)
class Record:
    """What another process must know to reach a running machine."""

    qemu: process.Identity
    keeper_pid: int
    ssh_port: int
    accelerator: str
    accelerator_reason: str


@dataclass(frozen=True, slots=True)
class Life:
    """How long a machine lives: at most `limit_s`, and no longer than its owner's process if it has one."""

    limit_s: float
    owned: bool
    ephemeral: bool = False


def make_disk(directory: Path, base: Path) -> None:
    """Make the lab's own disk, a copy on write of a disk in the cache."""
    overlay = ["-b", str(base), "-F", "qcow2", str(directory / DISK)]
    command.run(["qemu-img", "create", "-q", "-f", "qcow2", *overlay], timeout_s=30)


class Machine:
    """One QEMU process. `start` makes it, `find` takes up one that runs."""

    def __init__(
        self,
        directory: Path,
        record: Record,
        keeper: subprocess.Popen[bytes] | None,
        owner_fd: int | None,
        *,
        console_start: int = 0,
    ) -> None:
        self.directory = directory
        self.record = record
        self._keeper = keeper
        self._owner_fd = owner_fd
        self._console_start = console_start

    @classmethod
    def start(
        cls,
        directory: Path,
        hardware: Hardware,
        *,
        kernel: Path,
        initrd: Path,
        life: Life,
        held_fds: Sequence[int],
        state: Path | None = None,
    ) -> Machine:
        """Start QEMU; `held_fds` are locks to hold while it runs, `state` a saved machine to go on from."""
        chosen = accel.choose()
        console_start = _size(directory / CONSOLE)
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(_listen(directory))
            control_fd = listener.fileno()
            argv = _arguments(directory.name, hardware, chosen, kernel, initrd, control_fd)
            if state is not None:
                argv += ["-incoming", "defer"]
            keeper, owner_fd, qemu_pid = _start_keeper(directory, argv, life, [control_fd], held_fds)
        identity = process.identify(qemu_pid)
        if identity is None:
            raise errors.QemuError("QEMU ended at once", hint=_tail(directory / QEMU_LOG))
        record = Record(identity, keeper.pid, 0, chosen.name, chosen.reason)
        machine = cls(directory, record, keeper, owner_fd, console_start=console_start)
        try:
            machine._finish_start()
            if state is not None:
                machine._load(state)
        except BaseException:
            machine.kill()
            raise
        return machine

    @classmethod
    def find(cls, directory: Path) -> Machine | None:
        """Take up the machine that runs in this directory, if one does."""
        try:
            known = json.loads((directory / RECORD).read_text())
        except (FileNotFoundError, ValueError):
            return None
        record = Record(**{**known, "qemu": process.Identity(**known["qemu"])})
        return cls(directory, record, None, None) if process.is_running(record.qemu) else None

    @contextlib.contextmanager
    def control(self, *, timeout_s: float = CONTROL_LIMIT_S) -> Iterator[qmp.Qmp]:
        with qmp.connect(self.directory / CONTROL, timeout_s=timeout_s) as control:
            yield control

    def check(self) -> None:
        """Raise when QEMU has ended, or the host's kernel says that it hangs."""
        if not process.is_running(self.record.qemu):
            raise errors.QemuError("QEMU ended by itself", hint=_tail(self.directory / QEMU_LOG))
        with (self.directory / CONSOLE).open("rb") as console:
            console.seek(self._console_start)
            if HUNG in console.read():
                raise errors.HungError("the host's kernel hangs")

    def kill(self) -> None:
        """End QEMU as a power cut would, and return when nothing of it is left."""
        process.kill(self.record.qemu)
        self._reap()

    def wait_end(self, *, timeout_s: float) -> None:
        """Return when QEMU has ended by itself."""
        process.wait_gone(self.record.qemu, timeout_s=timeout_s)
        self._reap()

    def wait_disconnected(self) -> None:
        """Return when the lab has seen the end of its ssh connection, which no saved state should hold.

        QEMU tells of no such event; one left open costs the restored lab an idle process, nothing more.
        """
        deadline = time.monotonic() + DISCONNECT_LIMIT_S
        with self.control() as control:
            while "ESTABLISHED" in control.human("info usernet") and time.monotonic() < deadline:
                time.sleep(0.02)

    def save(self, state: Path) -> None:
        """Stop the machine, write its state to a file and end QEMU; its disk belongs to that state."""
        with self.control(timeout_s=SAVE_LIMIT_S) as control, state.open("wb") as file:
            control.execute("stop")
            _migrate(control, "migrate", file.fileno())
            control.execute("quit")
        self.wait_end(timeout_s=CONTROL_LIMIT_S)

    def _load(self, state: Path) -> None:
        with self.control(timeout_s=SAVE_LIMIT_S) as control, state.open("rb") as file:
            _migrate(control, "migrate-incoming", file.fileno())
            control.execute("cont")

    def _reap(self) -> None:
        if self._keeper is not None:
            self._keeper.wait(timeout=CONTROL_LIMIT_S)
        elif keeper := process.identify(self.record.keeper_pid):
            process.wait_gone(keeper, timeout_s=CONTROL_LIMIT_S)
        if self._owner_fd is not None:
            os.close(self._owner_fd)
            self._owner_fd = None
        (self.directory / RECORD).unlink(missing_ok=True)

    def _finish_start(self) -> None:
        try:
            with self.control() as control:
                network = control.human("info usernet")
        except errors.QemuError as error:
            raise errors.QemuError("QEMU did not start", hint=_tail(self.directory / QEMU_LOG)) from error
        found = re.search(r"TCP\[HOST_FORWARD]\s+\d+\s+127\.0\.0\.1\s+(\d+)", network)
        if found is None:
            raise errors.QemuError("QEMU did not forward a port for ssh", hint=network)
        known = {**asdict(self.record), "ssh_port": int(found[1])}
        self.record = Record(**{**known, "qemu": self.record.qemu})
        staged = self.directory / f"{RECORD}.new"
        staged.write_text(json.dumps(known))
        staged.rename(self.directory / RECORD)


def _arguments(
    name: str, hardware: Hardware, chosen: accel.Accelerator, kernel: Path, initrd: Path, control_fd: int
) -> list[str]:
    argv = ["qemu-system-x86_64", "-name", f"banger-lab-{name}"]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-M", "q35", *chosen.arguments]
    argv += ["-smp", str(hardware.cpus), "-m", str(hardware.memory_mib)]
    argv += ["-kernel", str(kernel), "-initrd", str(initrd), "-append", BOOT_ARGUMENTS]
    argv += ["-drive", f"if=none,id=root,file={DISK},format=qcow2,cache=unsafe,discard=unmap"]
    argv += ["-device", "virtio-blk-pci,drive=root"]
    # Nothing leaves the lab; port 0 lets the kernel choose a free one, which is then asked for.
    argv += ["-netdev", "user,id=net,restrict=on,ipv6=off,hostfwd=tcp:127.0.0.1:0-:22"]
    argv += ["-device", "virtio-net-pci,netdev=net,romfile="]
    argv += ["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"]
    for slot in range(HOT_PLUG_SLOTS):
        argv += ["-device", f"pcie-root-port,id=slot{slot},chassis={slot + 1}"]
    argv += ["-chardev", f"file,id=console,path={CONSOLE},append=on", "-serial", "chardev:console"]
    argv += ["-chardev", f"socket,id=control,fd={control_fd},server=on,wait=off"]
    argv += ["-mon", "chardev=control,mode=control", "-rtc", "base=utc"]
    return argv


def version() -> str:
    """Name the QEMU that is installed."""
    return command.run(["qemu-system-x86_64", "--version"], timeout_s=30).text.splitlines()[0]


def template(hardware: Hardware) -> list[str]:
    """Give the arguments that every machine of this hardware has in common."""
    return _arguments("", hardware, accel.choose(), Path(), Path(), 0)


def _migrate(control: qmp.Qmp, command_name: str, fd: int) -> None:
    """Send the state to, or take it from, a file that is handed over open."""
    control.execute("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
    control.execute("migrate-set-parameters", {"max-bandwidth": SAVE_BYTES_PER_S})
    control.execute("getfd", {"fdname": "state"}, fd=fd)
    control.execute(command_name, {"uri": "fd:state"})
    while True:
        status = control.wait_event("MIGRATION")["data"]["status"]
        if status == "completed":
            return
        if status == "failed":
            raise errors.QemuError(f"QEMU failed to {command_name}")


def _listen(directory: Path) -> socket.socket:
    """Make the control socket before QEMU, so that nobody waits for a path to appear."""
    (directory / CONTROL).unlink(missing_ok=True)
    directory_fd = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(f"/proc/self/fd/{directory_fd}/{CONTROL}")
    finally:
        os.close(directory_fd)
    listener.listen(4)
    return listener


def _start_keeper(
    directory: Path, argv: Sequence[str], life: Life, passed: Sequence[int], held: Sequence[int]
) -> tuple[subprocess.Popen[bytes], int | None, int]:
    report_read, report_write = os.pipe()
    owner_read, owner_write = os.pipe() if life.owned else (None, None)
    keeper_argv = [sys.executable, "-m", "lab.keeper", "--report-fd", str(report_write)]
    keeper_argv += ["--limit-s", str(life.limit_s)]
    if owner_read is not None:
        keeper_argv += ["--owner-fd", str(owner_read)]
    if life.ephemeral:
        keeper_argv.append("--ephemeral")
    for fd in passed:
        keeper_argv += ["--pass-fd", str(fd)]
    inherited = [report_write, *passed, *held, *([] if owner_read is None else [owner_read])]
    try:
        with (directory / QEMU_LOG).open("ab") as output:
            keeper = subprocess.Popen(
                [*keeper_argv, "--", *argv],
                cwd=directory,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=inherited,
                start_new_session=True,
            )
    finally:
        os.close(report_write)
        if owner_read is not None:
            os.close(owner_read)
    with os.fdopen(report_read, "rb") as report:
        answer = report.read()
    if not answer:
        keeper.wait(timeout=CONTROL_LIMIT_S)
        raise errors.QemuError("QEMU could not be started", hint=_tail(directory / QEMU_LOG))
    return keeper, owner_write, int(answer)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-2000:].strip() if path.exists() else ""
