# SPDX-License-Identifier: MIT
"""One lab as an object: brought up, used, cut off, taken down. For tests, benchmarks, the command line."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from lab import accel, cache, command, disk, errors, evidence, instance, layer, limits, qemu, remote, resume

log = logging.getLogger("lab")

BOOT_LIMIT_S = 240
SHUTDOWN_LIMIT_S = 60
TEST_LIFE_S = 6 * 3600
CLI_LIFE_S = 24 * 3600
READY_STATES = ("running", "degraded")


class Lab:
    """A running lab: `up` makes one that dies with this process, `find` takes up one of the command line."""

    def __init__(self, root: Path, place: instance.Instance, base: layer.Base, life: qemu.Life) -> None:
        self._root = root
        self._place = place
        self._base = base
        self._life = life
        self._machine: qemu.Machine | None = None
        self._shell: remote.Shell | None = None
        self._artefacts: cache.Entry | None = None
        self.boot_s = 0.0

    @classmethod
    def up(
        cls,
        name: str,
        *,
        hardware: qemu.Hardware | None = None,
        artefacts: Path | None = None,
        layer_key: str | None = None,
        cold: bool = False,
        detached: bool = False,
        root: Path | None = None,
    ) -> Lab:
        """Bring up a fresh lab; a detached one goes on when this process ends, until `down`.

        It starts from a layer when one is named, and from a saved state unless it has to boot (`cold`).
        """
        root = root or cache.default_root()
        hardware = hardware or qemu.Hardware()
        instance.prune(root)
        if layer_key is not None:
            base = layer.need(root, layer_key)
        elif cold or not accel.choose().is_software:
            base = layer.bare(root)
        else:
            base = _booted(root, hardware)
        place = instance.create(root, name)
        life = qemu.Life(CLI_LIFE_S if detached else TEST_LIFE_S, owned=not detached, ephemeral=not detached)
        lab = cls(root, place, base, life)
        try:
            qemu.make_disk(place.path, base.disk)
            place.write(
                instance.Identity(base.image.key, hardware.cpus, hardware.memory_mib, base.layer_key)
            )
            fits = not cold and base.made_on == layer.signature(hardware)
            lab.start(state=base.state if fits else None)
            if artefacts is not None:
                lab.attach_artefacts(artefacts)
        except BaseException:
            lab.down()
            raise
        return lab

    @classmethod
    def find(cls, name: str, *, root: Path | None = None) -> Lab:
        """Take up a lab that runs already."""
        root = root or cache.default_root()
        place = instance.find(root, name)
        identity = place.read()
        running = qemu.Machine.find(place.path)
        layer_key = identity.layer_key
        base = layer.find(root, layer_key) if layer_key else layer.image_base(root, identity.image_key)
        if base is None or running is None:
            raise errors.NotRunningError(
                f"the lab named {name} has ended", hint=f"run: python -m lab up --name {name}"
            )
        lab = cls(root, place, base, qemu.Life(CLI_LIFE_S, owned=False))
        lab._machine = running
        lab._shell = lab._make_shell(running)
        return lab

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    @property
    def name(self) -> str:
        return self._place.name

    @property
    def directory(self) -> Path:
        return self._place.path

    @property
    def is_on(self) -> bool:
        return self._machine is not None

    @property
    def machine(self) -> qemu.Machine:
        if self._machine is None:
            raise errors.NotRunningError(f"the lab named {self.name} is switched off")
        return self._machine

    @property
    def shell(self) -> remote.Shell:
        if self._shell is None:
            raise errors.NotRunningError(f"the lab named {self.name} is switched off")
        return self._shell

    def start(self, *, state: Path | None = None) -> None:
        """Switch the machine on and return when commands can be run and systemd has settled."""
        started = time.monotonic()
        self._switch_on(state)
        if state is None:
            self._wait_booted(started)
        else:
            self._resume(started)
        if self._artefacts is not None:
            self._plug_artefacts(self._artefacts)

    def _switch_on(self, state: Path | None = None) -> None:
        identity = self._place.read()
        own = [] if self._place.lock_fd is None else [self._place.lock_fd]
        self._machine = qemu.Machine.start(
            self.directory,
            qemu.Hardware(identity.cpus, identity.memory_mib),
            kernel=self._base.image.kernel,
            initrd=self._base.image.initrd,
            life=self._life,
            held_fds=[*self._base.held_fds, *own],
            state=state,
        )
        chosen = self._machine.record
        log.info("lab %s: QEMU runs (%s: %s)", self.name, chosen.accelerator, chosen.accelerator_reason)
        self._shell = self._make_shell(self._machine)

    def _wait_booted(self, started: float, *, other_than: str = "") -> None:
        """Wait for a boot; one that hangs in QEMU's software processors is cut off and tried once more."""
        try:
            self._wait_ready(started, other_than=other_than)
        except errors.HungError as error:
            log.warning(
                "lab %s: %s while booting, once in some dozens of times; trying again", self.name, error
            )
            self.power_cut()
            self._switch_on()
            self._wait_ready(started)

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | None = None,
        user: str = "root",
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = remote.DEFAULT_TIMEOUT_S,
        check: bool = True,
    ) -> command.Result:
        """Run a program that ends within this time on a quiet machine; see limits, and Shell.run."""
        limit_s = limits.patient(timeout_s)
        return self.shell.run(argv, stdin=stdin, user=user, cwd=cwd, env=env, timeout_s=limit_s, check=check)

    def put(self, local: Path, remote: str, *, owner: str = "0:0") -> None:
        """Copy a file or tree into the lab, to exactly this path."""
        self.shell.put(local, remote, owner=owner)

    def write(self, remote: str, content: bytes, *, mode: int = 0o644) -> None:
        """Write a file in the lab."""
        self.shell.write(remote, content, mode=mode)

    def get(self, remote: str, local: Path) -> None:
        """Copy a file or tree out of the lab, to exactly this path."""
        self.shell.get(remote, local)

    def attach_artefacts(self, directory: Path) -> None:
        """Hand the lab a directory: it appears read-only at /artefacts, also after a reboot or power cut."""
        if self._artefacts is not None:
            raise errors.LabError("the lab has artefacts already")
        self._artefacts = disk.ensure(self._root, directory)
        self._plug_artefacts(self._artefacts)

    def reboot(self) -> None:
        """Restart the host in an orderly way and return when it answers again."""
        before = self._boot_id()
        started = time.monotonic()
        self.run(["systemctl", "reboot"], check=False)
        self.shell.close()
        self._wait_booted(started, other_than=before)
        if self._artefacts is not None and not disk.is_plugged(self.machine):
            self._plug_artefacts(self._artefacts)

    def power_cut(self) -> None:
        """Take the power away: nothing is flushed, the disk keeps what had reached it. `start` goes on."""
        self.machine.kill()
        self._off()

    def shut_down(self) -> None:
        """Switch the host off in an orderly way; `start` goes on from its disk."""
        self.run(["systemctl", "poweroff"], check=False)
        self.machine.wait_end(timeout_s=limits.patient(SHUTDOWN_LIMIT_S))
        self._off()

    def evidence(self, directory: Path) -> None:
        """Save what explains a failure: console, journals, rows, devices, rules, VMM logs. Never raises."""
        evidence.save(self.directory, self._shell, directory, self._machine)

    def down(self) -> None:
        """End the lab and delete all it had."""
        if self._machine is not None:
            self._machine.kill()
            self._off()
        if self._artefacts is not None:
            self._artefacts.close()
            self._artefacts = None
        self._place.close()
        instance.delete(self._root, self.name)
        self._base.close()

    def commit(self, key: str, *, with_state: bool = True) -> None:
        """Keep this lab as a layer that others start from; this one is switched off and at its end.

        With state, others go on from this very instant (clock and random numbers are set right); without,
        the host is shut down and they boot.
        """
        identity = self._place.read()
        machine = layer.signature(qemu.Hardware(identity.cpus, identity.memory_mib))
        layer.ensure(
            self._root, key, self._base, machine, self._save if with_state else self._save_disk
        ).close()
        self.down()

    def _save(self, stage: Path) -> None:
        self._unplug_artefacts()
        self.run(["sync"])
        self.shell.close()
        self.machine.wait_disconnected()
        self.machine.save(stage / layer.STATE)
        self._off()
        (self.directory / qemu.DISK).rename(stage / layer.DISK)

    def _save_disk(self, stage: Path) -> None:
        self.shut_down()
        (self.directory / qemu.DISK).rename(stage / layer.DISK)

    def _resume(self, started: float) -> None:
        """Enter a restored machine and make it honest: the right time, random numbers of its own."""
        self._connect(started + limits.patient(BOOT_LIMIT_S))
        resume.refresh(self.shell)
        self.boot_s = time.monotonic() - started
        log.info("lab %s: restored, ssh after %.1f s", self.name, self.boot_s)

    def _off(self) -> None:
        if self._shell is not None:
            self._shell.close()
        self._machine = self._shell = None

    def _make_shell(self, running: qemu.Machine) -> remote.Shell:
        keys = self._base.image
        return remote.Shell(self.directory, running.record.ssh_port, keys.private_key, keys.known_hosts)

    def _boot_id(self) -> str:
        return self.run(["cat", "/proc/sys/kernel/random/boot_id"]).text.strip()

    def _wait_ready(self, started: float, *, other_than: str = "") -> None:
        deadline = time.monotonic() + limits.patient(BOOT_LIMIT_S)
        while True:
            self._connect(deadline)
            with contextlib.suppress(remote.RunError):
                if self._boot_id() != other_than:
                    break
            self.shell.close()
        # The machine's own clock tells a booting kernel whole seconds only.
        resume.refresh(self.shell)
        self.boot_s = time.monotonic() - started
        # The host answers a little before its last units have started; tests want it settled.
        waiting = ["systemctl", "is-system-running", "--wait"]
        state = self.run(waiting, check=False, timeout_s=max(5.0, deadline - time.monotonic())).text.strip()
        if state not in READY_STATES:
            raise errors.BootTimeoutError(f"the lab's systemd says {state!r} instead of running")
        log.info(
            "lab %s: ssh after %.1f s, settled after %.1f s",
            self.name,
            self.boot_s,
            time.monotonic() - started,
        )

    def _connect(self, deadline: float) -> None:
        try:
            self.shell.connect(deadline=deadline, check=self.machine.check)
        except errors.LabError as error:
            console = (self.directory / qemu.CONSOLE).read_text(errors="replace")
            error.add_note(f"last lines of the console:\n{console[-2000:]}")
            raise

    def _plug_artefacts(self, entry: cache.Entry) -> None:
        disk.plug(self.machine, entry)
        self.run(["systemctl", "start", "artefacts.mount"])

    def _unplug_artefacts(self) -> None:
        if disk.is_plugged(self.machine):
            self.run(["systemctl", "stop", "artefacts.mount"])
            disk.unplug(self.machine)


def _booted(root: Path, hardware: qemu.Hardware) -> layer.Base:
    """Open the layer of the bare image, booted and settled; make it when there is none."""
    base = layer.bare(root)
    machine = layer.signature(hardware)
    key = cache.key_of(["booted", base.image.key, machine])

    def save(stage: Path) -> None:
        log.info("booting the host once, to save its state")
        with Lab.up(f"booting-{os.getpid()}", hardware=hardware, cold=True, root=root) as lab:
            lab._save(stage)

    try:
        return layer.ensure(root, key, base, machine, save)
    finally:
        base.close()


def take_down(name: str, *, root: Path | None = None) -> bool:
    """End the lab of this name in whatever state, and delete all it had; say whether there was one."""
    root = root or cache.default_root()
    try:
        place = instance.find(root, name)
    except errors.NotRunningError:
        return False
    if running := qemu.Machine.find(place.path):
        running.kill()
    if not instance.delete(root, name):
        raise errors.BusyError(f"the lab named {name} is still held by the program that started it")
    return True
