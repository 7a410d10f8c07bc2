# SPDX-License-Identifier: MIT
"""Starting a VM: the nineteen steps, their order, stages and undos. The names are fixed by contract."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from banger import steps
from banger.contract import errors, names, privileged, resources
from banger.storage import overlay
from banger.vm import boot_args, capabilities, clock, host, lifetime, readiness, record, sources

_SUN_PATH_BYTES: Final = 107
_RESERVE_BYTES: Final = 64 * 1024 * 1024
_RESERVE_FILES: Final = 64
Stage = resources.Stage


class Start:
    """One start of one VM: the handles its steps hand to each other. `steps()` is the pipeline, as data."""

    def __init__(
        self,
        host: host.Host,
        vm: record.VmRecord,
        features: Sequence[capabilities.Capability],
        observer: steps.Observer,
    ) -> None:
        self._host = host
        self._vm = vm
        self._features = features
        self._observer = observer
        self._context = capabilities.Context(host=host, vm=vm)
        self._files = sources.Files()
        self._created_overlay = False
        self._created_dir = False
        self._doubts = 0
        self.started: record.VmRecord | None = None
        self.vmm_pid = 0

    def steps(self) -> list[steps.Step]:
        """The pipeline. A step without a stage is logged but not shown."""
        step, vm = steps.Step, self._vm
        rootfs, features = Stage.PREPARE_ROOTFS, Stage.PREPARE_HOST_FEATURES
        boot, agent = Stage.BOOT_FIRECRACKER, Stage.WAIT_VSOCK_AGENT
        ready, final = Stage.WAIT_GUEST_READY, Stage.FINALIZE
        return [
            step(
                "preflight",
                self._preflight,
                self._forget_preflight,
                stage=Stage.PREFLIGHT,
                detail="checking image, kernel and space",
            ),
            step("cleanup_runtime", self._tear_down),
            step("bridge", self._bridge),
            step("socket_dir", self._make_dir, self._remove_dir),
            step("prepare_sockets", self._check_sockets),
            step("system_overlay", self._make_overlay, self._remove_overlay, rootfs, "making the root disk"),
            step(
                "dm_snapshot", self._make_snapshot, self._delete_snapshot, rootfs, "joining base and overlay"
            ),
            step("fsck_snapshot", self._check_snapshot),
            step("patch_root_overlay", self._patch_root, None, rootfs, "looking at the guest binary"),
            step("prepare_host_features", self._prepare, self._clean_up, features, "making the work disk"),
            step("tap", self._make_tap, self._delete_tap),
            step("metrics_file", self._make_jail, self._delete_jail),
            step("firecracker_binary", self._check_runtime),
            step("firecracker_launch", self._launch, self._kill, boot, "starting Firecracker in its jail"),
            step("socket_access", self._grant_api),
            step("vsock_access", self._grant_vsock),
            step("wait_vsock_agent", self._wait_agent, None, agent, f"waiting for the agent of {vm.name}"),
            step("post_start_features", self._after_start, None, ready, "finishing features"),
            step("persist", self._persist, None, final, "saving"),
        ]

    # --- before anything is made ---

    async def _preflight(self) -> None:
        self._files = sources.look(self._host.layout, self._vm)
        _require_disks(self._host.layout, self._vm)
        # Root's directory is looked at from here: who is refused there has begun to make things.
        for place in (self._host.layout.state, self._host.layout.jails.parent):
            _check_room(place, self._vm.name)
        await capabilities.check_all(self._features, self._context)

    async def _forget_preflight(self) -> None:
        await capabilities.uncheck_all(self._features, self._context)

    async def _tear_down(self) -> None:
        await self._host.privileged(privileged.TearDown(vm_id=self._vm.id))

    async def _bridge(self) -> None:
        if self._vm.network:
            await self._host.keeper.ensure()
            self._doubts = self._host.keeper.doubts

    async def _make_dir(self) -> None:
        path = self._host.layout.vm_dir(self._vm.id)
        self._created_dir = not path.exists()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def _remove_dir(self) -> None:
        if self._created_dir:
            with contextlib.suppress(FileNotFoundError):
                self._host.layout.vm_dir(self._vm.id).rmdir()

    async def _check_sockets(self) -> None:
        layout = self._host.layout
        for path in (layout.api_socket(self._vm.id), layout.vsock_socket(self._vm.id)):
            if len(os.fsencode(path)) > _SUN_PATH_BYTES:
                raise errors.BadRequestError(
                    f"the socket path {path} is longer than {_SUN_PATH_BYTES} bytes",
                    hint="install banger's root directory at a shorter path",
                )

    # --- root disk ---

    async def _make_overlay(self) -> None:
        path = self._host.layout.overlay(self._vm.id)
        base_bytes = self._host.layout.rootfs(self._vm.image_id).stat().st_size
        self._created_overlay = overlay.ensure(path, base_bytes=base_bytes)

    async def _remove_overlay(self) -> None:
        if self._created_overlay:
            self._host.layout.overlay(self._vm.id).unlink(missing_ok=True)

    async def _make_snapshot(self) -> None:
        vm = self._vm
        await self._host.privileged(
            privileged.CreateSnapshot(vm_id=vm.id, slot=vm.slot, image_id=vm.image_id)
        )

    async def _delete_snapshot(self) -> None:
        await self._host.privileged(privileged.DeleteSnapshot(vm_id=self._vm.id))

    async def _check_snapshot(self) -> None:
        """A fresh overlay shows the base as it was published, which was checked then."""
        if not self._created_overlay:
            await self._host.privileged(privileged.CheckSnapshot(vm_id=self._vm.id, slot=self._vm.slot))

    async def _patch_root(self) -> None:
        """All else that a guest must know is in its kernel's command line: nothing to write is quickest."""
        if self._files.guest_sha256 != self._host.guest_sha256:
            await self._host.privileged(privileged.PatchRoot(vm_id=self._vm.id, slot=self._vm.slot))

    # --- host features ---

    async def _prepare(self) -> None:
        await capabilities.prepare_all(self._features, self._context, self._observer)

    async def _clean_up(self) -> None:
        await capabilities.clean_up_all(self._features, self._context)

    async def _make_tap(self) -> None:
        if self._vm.network:
            vm = self._vm
            await self._host.privileged(
                privileged.CreateTap(vm_id=vm.id, slot=vm.slot, peers=bool(vm.peers))
            )

    async def _delete_tap(self) -> None:
        await self._host.privileged(privileged.DeleteTap(vm_id=self._vm.id))

    # --- the VMM ---

    async def _make_jail(self) -> None:
        await self._host.privileged(privileged.PrepareJail(vm_id=self._vm.id, slot=self._vm.slot))

    async def _delete_jail(self) -> None:
        await self._host.privileged(privileged.DeleteJail(vm_id=self._vm.id))

    async def _check_runtime(self) -> None:
        await self._host.privileged(privileged.CheckRuntime())

    async def _launch(self) -> None:
        vm = self._vm
        vmm = await self._host.privileged(
            privileged.LaunchVmm(
                vm_id=vm.id,
                slot=vm.slot,
                kernel_id=vm.kernel_id,
                initrd=self._files.has_initrd,
                vcpus=vm.vcpus,
                memory_mib=vm.memory_mib,
                boot_args=self._boot_args(),
                work_disk=True,
                tap=vm.network,
            )
        )
        self.vmm_pid = vmm.pid

    async def _kill(self) -> None:
        await self._host.privileged(privileged.KillVmm(vm_id=self._vm.id))

    async def _grant_api(self) -> None:
        await self._host.privileged(privileged.GrantApiSocket(vm_id=self._vm.id, slot=self._vm.slot))

    async def _grant_vsock(self) -> None:
        await self._host.privileged(privileged.GrantVsock(vm_id=self._vm.id, slot=self._vm.slot))

    # --- the guest ---

    async def _wait_agent(self) -> None:
        asked_ns = time.time_ns()
        health = await readiness.wait_for_agent(self._host, self._vm)
        if health.realtime_ns:
            with contextlib.suppress(errors.BangerError):  # the daemon looks at it again, and says why
                agent = self._host.agent(self._vm.id)
                await clock.correct(agent, health.realtime_ns, asked_ns=asked_ns)
        self.started = msgspec.structs.replace(
            lifetime.begun(self._vm),
            state=resources.VmState.RUNNING,
            started_at=datetime.datetime.now(datetime.UTC),
            boot_id=health.boot_id,
            host_boot_id=self._host.boot_id,
            last_error=None,
            stopped_because="",
            stopped_with_host=False,
        )

    async def _after_start(self) -> None:
        await capabilities.after_start_all(self._features, self._context)

    async def _persist(self) -> None:
        if self.started is not None:
            # One may have been saved when the VM ended that this one follows.
            self.started = self.started.with_what_arrived(self._host.records.get(self._vm.id))
            self._host.records.save(self.started)
            # Only a row that says it runs is looked after: what was lost before must be looked for now.
            if self._vm.network and self._host.keeper.doubts != self._doubts:
                self._host.keeper.look_again()

    def _boot_args(self) -> str:
        ip6 = boot_args.ip6_argument(self._vm.slot, self._host.network6) if self._vm.ipv6 else ""
        words = boot_args.guest_words(self._vm.name, self._host.dns, work_disk=True, ip6=ip6)
        return boot_args.compose(
            has_initrd=self._files.has_initrd,
            ip=self._ip_argument(),
            guest=words,
        )

    def _ip_argument(self) -> str:
        if not self._vm.network:
            return ""
        network = self._host.network
        address = names.guest_address(network, self._vm.slot)
        return boot_args.ip_argument(self._vm.name, address, network, self._host.dns)


def _require_disks(layout: host.Layout, vm: record.VmRecord) -> None:
    """One that has run has both; made anew they would be empty, and nobody would be told."""
    disks = {"root disk": layout.overlay(vm.id), "work disk": layout.work_disk(vm.id)}
    for what, path in disks.items() if vm.started_at is not None else ():
        if not path.exists():
            raise errors.NotFoundError(
                f"the {what} of {vm.name} is gone: there is no {path}",
                hint=f"put the file back; `banger vm delete {vm.name}` deletes what is left",
            )


def _check_room(directory: Path, name: str) -> None:
    found = os.statvfs(directory)
    if found.f_bavail * found.f_frsize < _RESERVE_BYTES:
        raise errors.NoSpaceError(
            f"no space left in {directory} to start {name}",
            hint="delete VMs or images that are no longer needed, or give the file system more room",
        )
    if found.f_files and found.f_favail < _RESERVE_FILES:  # some file systems have no such number
        raise errors.NoSpaceError(
            f"no more files can be made in {directory} to start {name}",
            hint=f"its file system is out of inodes: `df -i {directory}`; delete what has many small files",
        )
