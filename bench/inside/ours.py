# SPDX-License-Identifier: MIT
"""A VM of the installed banger, made over the daemon's API by a client that already runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from banger.cli import attach, client
from banger.contract import privileged, resources
from bench.inside import agent, bare

API: Final = "/run/banger/bangerd.sock"
STATE: Final = Path("/var/lib/banger")
JAILS: Final = "/var/lib/banger-root/jails"
KERNEL: Final = "generic-6.12"
IMAGE: Final = "debian-bookworm"
SMALLEST: Final = "busybox"
NAME: Final = "bench"


def prepare_bare(api: client.Client) -> None:
    """The rival boots the very kernel and root file system that banger's VMs do."""
    image = api.get(f"/v1/images/{IMAGE}", resources.Image).id
    kernel = api.get(f"/v1/kernels/{KERNEL}", resources.Kernel).id
    bare.prepare(STATE / "images" / image / "rootfs.ext4", STATE / "kernels" / kernel / "vmlinux")


@contextlib.contextmanager
def running(api: client.Client, image: str = IMAGE) -> Iterator[resources.Vm]:
    """A VM whose agent answers, as large as the rival's; deleted afterwards."""
    body = resources.CreateVm(
        name=NAME,
        image=image,
        kernel=KERNEL,
        vcpus=1,
        memory_mib=bare.MEMORY_MIB,
        remove_on_failure=True,
    )
    vm = _ended(api, api.post("/v1/vms", body)).vm
    assert vm is not None
    try:
        yield vm
    finally:
        began = api.delete(f"/v1/vms/{NAME}")
        assert began is not None
        _ended(api, began)


def execute(api: client.Client, *argv: str) -> None:
    """Its output is ours. Raises RuntimeError unless it ends with 0."""
    status = attach.run(api, NAME, resources.ExecRequest(argv=argv), stdin=False)
    if status != 0:
        raise RuntimeError(f"{argv}: status {status}")


def agent_of(vm: resources.Vm) -> agent.Agent:
    return agent.Agent(privileged.vsock_socket(JAILS, vm.id))


def _ended(api: client.Client, operation: resources.Operation) -> resources.Operation:
    """Raises RuntimeError when it failed."""
    for event in api.events(operation.id):
        operation = event.result or operation
    if operation.error is not None:
        raise RuntimeError(f"{operation.kind}: {operation.error}")
    return operation
