# SPDX-License-Identifier: MIT
"""A kernel that cannot boot a VM is refused in `preflight`, and a wrong catalog says which file is wrong."""

from __future__ import annotations

import json
import platform
from collections.abc import AsyncIterator

import pytest

from banger.contract import privileged, resources
from tests.contract import api_served, conftest

Served = api_served.Served
MIB = 1 << 20


@pytest.fixture
async def served(daemon: conftest.Daemon) -> AsyncIterator[Served]:
    async with api_served.serving(daemon) as made:
        yield made


def say(daemon: conftest.Daemon, **more: object) -> None:
    """The kernel's record says this too."""
    path = daemon.paths.state / "kernels" / conftest.KERNEL_ID / "kernel.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **more}))


@pytest.mark.parametrize(
    ("said", "reason", "hint"),
    [
        ({"arch": "riscv64"}, f"is for riscv64, and this host is {platform.machine()}", "--kernel"),
        ({"loaded_end": 200 * MIB, "initrd_bytes": MIB}, "needs more than 201 MiB", "--memory 265M"),
        ({"lacks": ["network"]}, "no driver for the network", "without a network"),
    ],
)
async def test_a_kernel_that_cannot_boot_the_vm_is_refused_before_anything_is_made(
    daemon: conftest.Daemon, said: dict[str, object], reason: str, hint: str
) -> None:
    say(daemon, **said)
    ended = await daemon.create()
    assert ended.error is not None
    assert (ended.error.step, ended.error.code) == ("preflight", "bad_request")
    assert reason in ended.error.message
    assert hint in ended.error.hint
    assert daemon.world.asked(privileged.EnsureBridge) == daemon.world.asked(privileged.TearDown) == 0


async def test_a_kernel_without_a_network_boots_a_vm_without_one(daemon: conftest.Daemon) -> None:
    say(daemon, lacks=["network"], loaded_end=100 * MIB)
    body = resources.CreateVm(name="web", network=False)
    ended = await daemon.done(await daemon.services.vms.create(body))
    assert ended.status is resources.OperationStatus.SUCCEEDED


async def test_what_the_import_found_is_shown(served: Served) -> None:
    say(served.daemon, checked_by="config file", lacks=["overlay"], unknown=["proc"], modules=["virtio_blk"])
    found = served.daemon.services.kernels.get("tiny")
    assert (found.checked_by, found.lacks, found.unknown) == ("config file", ("overlay",), ("proc",))
    assert found.modules == ("virtio_blk",)


async def test_a_wrong_catalog_is_named_and_stops_nothing_else(served: Served) -> None:
    directory = served.daemon.paths.kernel_catalogs
    directory.mkdir(parents=True)
    (directory / "mine.toml").write_text('[[kernel]]\nname = "Mine"\nsummary = ""\narch = "x86_64"\n')
    error = await served.error("GET", "/v1/kernels?available=true", 400)
    assert error.message.startswith(f"{directory / 'mine.toml'}: kernel[0].name: ")
    await served.error("POST", "/v1/kernels/pull", 400, {"name": "generic-6.12"})
    assert [kernel.name for kernel in served.daemon.services.kernels.list()] == ["tiny"]
    assert (await served.daemon.create()).status is resources.OperationStatus.SUCCEEDED
    await served.error("POST", "/v1/vms", 404, {"kernel": "none", "name": "other"})


async def test_a_relative_path_is_no_path_of_the_daemon(served: Served) -> None:
    error = await served.error("POST", "/v1/kernels/import", 400, {"path": "vmlinux", "name": "mine"})
    assert "not an absolute path" in error.message
