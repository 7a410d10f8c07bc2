# SPDX-License-Identifier: MIT
"""The daemon's services over a fake world: everything of ours is real but root and the machine."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from banger.contract import names, resources
from banger.owner import composition, config, routes
from tests.contract import agent, cli_process, publishing, workspaces
from tests.fakes import daemon as fakes
from tests.fakes import helper as helpers
from tests.fakes import world as worlds

if TYPE_CHECKING:
    from tests.contract import crash_host

IMAGE_ID = "0123456789ab"
KERNEL_ID = "ba9876543210"
NETWORK = ipaddress.IPv4Network(names.NETWORK)
SETTINGS = config.Config(
    image="tiny",
    flush_deadline_s=60,
    power_off_deadline_s=60,
    disk_size_mib=16,
    memory_mib=128,
    vms_memory_mib=1 << 20,  # nothing of it is used
    dns_listen="",
)
IMPATIENT = msgspec.structs.replace(SETTINGS, agent_deadline_s=1.0, power_off_deadline_s=0.2)
"""For what waits for guests that never answer; with it a busy machine can pass for such a guest."""


def own_network() -> ipaddress.IPv4Network:
    """This process's alone, for a daemon that answers guests: the port there is a fixed one."""
    first = ipaddress.IPv4Address("10.0.0.0") + (os.getpid() % (1 << 12) << 12)
    return ipaddress.IPv4Network(f"{first}/20")


def answering(settings: config.Config = SETTINGS, **more: Any) -> config.Config:
    """The same with DNS, for this host at a free port, and for guests."""
    listen = f"127.0.0.1:{publishing.free_port()}"
    return msgspec.structs.replace(settings, **{"dns_listen": listen, **more})


@dataclass(slots=True)
class Daemon:
    """The services, their paths and the world that they believe in."""

    services: routes.Services
    paths: config.Paths
    world: worlds.World

    async def create(self, name: str = "web", *, start: bool = True) -> resources.Operation:
        body = resources.CreateVm(name=name, start=start)
        return await self.done(await self.services.vms.create(body))

    async def done(self, operation: resources.Operation) -> resources.Operation:
        async with asyncio.timeout(50):
            return await self.services.operations.wait(operation.id)


@pytest.fixture
def fake() -> Iterator[fakes.FakeDaemon]:
    """A daemon that only looks like one, with one running VM, `web`."""
    with cli_process.fake_daemon() as made:
        made.add_vm("web")
        yield made


@pytest.fixture
def cli(fake: fakes.FakeDaemon) -> cli_process.Cli:
    """`banger`, which talks to that daemon."""
    return cli_process.Cli(fake.path)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose sockets' paths fit into a socket address, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="b-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def paths(short_path: Path) -> config.Paths:
    """A state directory with one image and one kernel, both as small as they can be."""
    made = laid_out(short_path)
    furnish(made)
    return made


def furnish(paths: config.Paths) -> None:
    state, helper = paths.state, paths.helper_dir
    for directory in (state / "images" / IMAGE_ID, state / "kernels" / KERNEL_ID, helper / "logs"):
        directory.mkdir(parents=True)
    common = {"name": "tiny", "arch": "x86_64", "source": "test", "created_at": "2026-01-01T00:00:00Z"}
    image = {"id": IMAGE_ID, "size_bytes": 1 << 20, "stored_bytes": 0, "guest_sha256": "1" * 64}
    kernel = {"id": KERNEL_ID, "version": "1", "kind": "direct", "vmlinux_sha256": "0" * 64}
    (state / "images" / IMAGE_ID / "image.json").write_text(
        json.dumps({**common, **image, "has_init": True, "kernel": "tiny"})
    )
    (state / "kernels" / KERNEL_ID / "kernel.json").write_text(
        json.dumps({**common, **kernel, "vmlinux_bytes": 4})
    )
    (state / "images" / IMAGE_ID / "rootfs.ext4").write_bytes(bytes(1 << 20))
    (state / "images" / IMAGE_ID / "work-seed.tar").write_bytes(bytes(1024))  # the end of an archive
    (state / "kernels" / KERNEL_ID / "vmlinux").write_bytes(b"\x7fELF")


def laid_out(top: Path) -> config.Paths:
    """Where everything is below a directory."""
    return config.Paths(
        state=top / "s",
        cache=top / "c",
        run=top / "r",
        helper_socket=top / "h.sock",
        helper_dir=top / "h",
        install=top / "install.toml",
        image_catalog=top / "images.toml",
        kernel_catalogs=top / "kernels.d",
    )


@pytest.fixture
async def world(paths: config.Paths) -> AsyncIterator[worlds.World]:
    """An empty host."""
    made = worlds.World(state=paths.state, jails=paths.helper_dir / "jails", logs=paths.helper_dir / "logs")
    yield made
    await made.close()


@pytest.fixture
async def daemon(paths: config.Paths, world: worlds.World) -> AsyncIterator[Daemon]:
    """A daemon that has started and reconciled."""
    async with composition.compose(SETTINGS, NETWORK, paths, world, "0" * 64) as services:
        yield Daemon(services, paths, world)


@pytest.fixture
async def impatient(paths: config.Paths, world: worlds.World) -> AsyncIterator[Daemon]:
    """The same, which gives guests up soon."""
    async with composition.compose(IMPATIENT, NETWORK, paths, world, "0" * 64) as services:
        yield Daemon(services, paths, world)


@pytest.fixture(scope="session")
def native_agent() -> Iterator[Path]:
    """Socket of the shipped agent, running here."""
    with agent.running("shipped") as path:
        yield path


@pytest.fixture
async def guest(daemon: Daemon, native_agent: Path, tmp_path: Path) -> AsyncIterator[workspaces.Guest]:
    """A served daemon with one running VM, `web`, in which commands and files are real."""
    from tests.contract import api_served  # it needs this module's Daemon

    daemon.world.behaviour.agent = native_agent
    await daemon.create()
    async with api_served.serving(daemon) as served:
        yield workspaces.Guest(served, tmp_path / "here", tmp_path / "there" / "repo")


@pytest.fixture
async def survivors(paths: config.Paths, world: worlds.World) -> AsyncIterator[crash_host.Host]:
    """A helper on its socket, and no daemon."""
    from tests.contract import crash_host  # its daemons need this module

    host = crash_host.Host(paths, world)
    async with helpers.FakeHelper(world).serving(paths.helper_socket):
        yield host
    gc.collect()  # here, where what asyncio lost is nobody's fault
