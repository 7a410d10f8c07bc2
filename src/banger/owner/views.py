# SPDX-License-Identifier: MIT
"""Rows and observations, put together into what the API shows."""

from __future__ import annotations

import datetime
import functools
import ipaddress
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from banger.contract import errors, guest, names, resources
from banger.owner import usage as usages
from banger.vm import host, lifetime, record


@dataclass(frozen=True, slots=True)
class Seen:
    """What is true of a VM at this moment, and no row says."""

    pid: int = 0
    silent_since: datetime.datetime | None = None
    idle_s: float | None = None
    """None while it is in use."""
    unpublished: dict[str, str] = field(default_factory=dict)
    """Of one that runs: those of its ports on which this host does not listen, each with why."""


class Views:
    """Pure, but for reading sizes of the owner's files."""

    def __init__(
        self,
        layout: host.Layout,
        network: ipaddress.IPv4Network,
        network6: ipaddress.IPv6Network,
        image_name: Callable[[str], str],
        kernel_name: Callable[[str], str],
    ) -> None:
        self._layout = layout
        self._network = network
        self._network6 = network6
        self._image_name = image_name
        self._kernel_name = kernel_name

    def remembering(self) -> Views:
        """For one answer about many VMs: each image and each kernel is looked up once."""
        image_name, kernel_name = functools.cache(self._image_name), functools.cache(self._kernel_name)
        return Views(self._layout, self._network, self._network6, image_name, kernel_name)

    def vm(self, vm: record.VmRecord, seen: Seen, *, with_timings: bool = False) -> resources.Vm:
        runs = vm.state is resources.VmState.RUNNING
        silent_since = seen.silent_since if runs else None
        idles = runs and vm.idle_stop_s > 0
        return resources.Vm(
            id=vm.id,
            name=vm.name,
            state=resources.VmState.ERROR if silent_since else vm.state,
            image=self._image_name(vm.image_id),
            image_id=vm.image_id,
            kernel=self._kernel_name(vm.kernel_id),
            kernel_id=vm.kernel_id,
            vcpus=vm.vcpus,
            memory_mib=vm.memory_mib,
            disk_size_mib=vm.disk_size_mib,
            network=vm.network,
            address=str(names.guest_address(self._network, vm.slot)) if vm.network else "",
            address6=str(names.guest_address6(self._network6, vm.slot)) if vm.ipv6 else "",
            nat=vm.nat,
            egress=vm.egress,
            allow=vm.allow,
            peer_network=vm.peers,
            publish=vm.publish,
            unpublished=seen.unpublished if runs else {},
            created_at=vm.created_at,
            started_at=vm.started_at,
            boot_id=vm.boot_id,
            pid=seen.pid,
            silent_since=silent_since,
            last_error=_silent(vm, silent_since) if silent_since else vm.last_error,
            sources=vm.sources,
            last_start=vm.last_start if with_timings else (),
            workspace=vm.workspace,
            other_workspaces=vm.workspaces[1:],
            idle_stop_s=vm.idle_stop_s,
            ttl_s=vm.ttl_s,
            idle_stop_at=_in(vm.idle_stop_s - seen.idle_s) if idles and seen.idle_s is not None else None,
            ttl_ends_at=_in(vm.ttl_ends_s - lifetime.now_s()) if runs and vm.ttl_s else None,
            autostart=vm.autostart,
            stopped_with_host=not runs and vm.stopped_with_host,
            stopped_because="" if runs else vm.stopped_because,
        )

    def stats(
        self, vm: record.VmRecord, pid: int, usage: usages.Usage, health: guest.Health
    ) -> resources.VmStats:
        return resources.VmStats(
            id=vm.id,
            name=vm.name,
            pid=pid,
            uptime_ms=health.uptime_ms,
            cpu_usec=usage.cpu_usec,
            memory_bytes=usage.memory_bytes,
            memory_peak_bytes=usage.memory_peak_bytes,
            guest_memory_total_bytes=health.memory_total_bytes,
            guest_memory_available_bytes=health.memory_available_bytes,
            read_bytes=usage.read_bytes,
            write_bytes=usage.write_bytes,
            rx_bytes=usage.rx_bytes,
            tx_bytes=usage.tx_bytes,
            overlay_bytes=_allocated(self._layout.overlay(vm.id)),
            work_disk_bytes=_allocated(self._layout.work_disk(vm.id)),
            host_free_bytes=shutil.disk_usage(self._layout.state).free,
        )


def _in(seconds: float) -> datetime.datetime:
    """A moment of the wall clock as it is set now, to the second."""
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=max(0.0, seconds) + 0.5)
    return moment.replace(microsecond=0)


def _silent(vm: record.VmRecord, since: datetime.datetime) -> errors.ErrorBody:
    """Its VMM runs, and nobody in it answers."""
    return errors.ErrorBody(
        code=errors.UnavailableError.code,
        message=f"the agent of {vm.name} has been silent since {since:%Y-%m-%d %H:%M:%S} UTC",
        hint=f"see `banger vm logs {vm.name}`; `banger vm restart {vm.name}` begins anew",
    )


def _allocated(path: Path) -> int:
    """Bytes really used by a sparse file; 0 when it is not there."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
