# SPDX-License-Identifier: MIT
"""The daemon's services over a fake helper in a process of its own: what is ours is real, and e2fsprogs."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from banger.contract import names, privileged, resources
from banger.owner import composition, config, helper, routes

TREE: Final = Path(__file__).resolve().parent.parent
IMAGE_ID: Final = "0123456789ab"
KERNEL_ID: Final = "ba9876543210"
DISK_MIB: Final = 64
SETTINGS: Final = config.Config(
    image="tiny", disk_size_mib=DISK_MIB, memory_mib=128, vms_memory_mib=1 << 20, dns_listen=""
)
NETWORK: Final = ipaddress.IPv4Network(names.NETWORK)
END_S: Final = 30.0


@dataclass(slots=True)
class Recorder:
    """Meets `PrivilegedOps`: passes requests on to the helper and remembers them."""

    ops: privileged.PrivilegedOps
    requests: list[privileged.Request[Any]] = field(default_factory=list)

    async def call(self, request: privileged.Request[privileged.ResultT], /) -> privileged.ResultT:
        self.requests.append(request)
        return await self.ops.call(request)


@dataclass(frozen=True, slots=True)
class FakeHost:
    """A daemon that has started, where its files are, and the fake helper behind it."""

    services: routes.Services
    paths: config.Paths
    ops: Recorder

    async def start(self, name: str) -> resources.Vm:
        """Creates and starts a VM; raises RuntimeError with the daemon's reason when that fails."""
        began = await self.services.vms.create(resources.CreateVm(name=name))
        return _vm_of(await self.services.operations.wait(began.id))

    async def delete(self, name: str) -> None:
        began = await self.services.vms.delete(name)
        await self.services.operations.wait(began.id)


def _vm_of(ended: resources.Operation) -> resources.Vm:
    if ended.vm is None:
        raise RuntimeError(f"{ended.target}: {ended.error}")
    return ended.vm


@contextlib.asynccontextmanager
async def running(
    *,
    agent: Path | None = None,
    settings: config.Config = SETTINGS,
    network: ipaddress.IPv4Network = NETWORK,
) -> AsyncIterator[FakeHost]:
    """In a directory whose sockets' paths fit into a socket address. `agent`: a real one's socket."""
    with tempfile.TemporaryDirectory(prefix="b-", dir="/tmp") as directory:
        paths = _prepared(Path(directory))
        async with _helper(paths, agent):
            ops = Recorder(helper.Client(paths.helper_socket))
            async with composition.compose(settings, network, paths, ops, "0" * 64) as services:
                yield FakeHost(services, paths, ops)


@contextlib.asynccontextmanager
async def _helper(paths: config.Paths, agent: Path | None) -> AsyncIterator[None]:
    """Its VMMs are in that process too, so that their work is not taken for the daemon's."""
    given = ("--socket", paths.helper_socket, "--state", paths.state, "--helper-dir", paths.helper_dir)
    argv = [sys.executable, "-m", "tests.fakes.helper", *map(str, given)]
    argv += ["--agent", str(agent)] if agent is not None else []
    process = await asyncio.create_subprocess_exec(*argv, cwd=TREE)
    try:
        async with asyncio.timeout(END_S):
            while not paths.helper_socket.exists():  # noqa: ASYNC110 - another process makes it
                await asyncio.sleep(0.01)
        yield
    finally:
        process.terminate()
        await process.wait()


def _prepared(top: Path) -> config.Paths:
    """A state directory with one image and one kernel, both as small as they can be."""
    state, helper_dir = top / "s", top / "h"
    image_dir, kernel_dir = state / "images" / IMAGE_ID, state / "kernels" / KERNEL_ID
    for directory in (image_dir, kernel_dir, helper_dir / "logs"):
        directory.mkdir(parents=True)
    common = {"name": "tiny", "arch": "x86_64", "source": "bench", "created_at": "2026-01-01T00:00:00Z"}
    image = {"id": IMAGE_ID, "size_bytes": 1 << 20, "stored_bytes": 0, "guest_sha256": "0" * 64}
    kernel = {"id": KERNEL_ID, "version": "1", "kind": "direct", "vmlinux_sha256": "0" * 64}
    _write(image_dir / "image.json", {**common, **image, "has_init": True, "kernel": "tiny"})
    _write(kernel_dir / "kernel.json", {**common, **kernel, "vmlinux_bytes": 4})
    (image_dir / "rootfs.ext4").write_bytes(bytes(1 << 20))
    (image_dir / "work-seed.tar").write_bytes(bytes(1024))  # the end of an archive
    (kernel_dir / "vmlinux").write_bytes(b"\x7fELF")
    return config.Paths(
        state=state,
        cache=top / "c",
        run=top / "r",
        helper_socket=top / "h.sock",
        helper_dir=helper_dir,
        install=top / "install.toml",
    )


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document))
