# SPDX-License-Identifier: MIT
"""What a VM needs and is not here yet is obtained by the command that wants it, and its progress is seen."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from banger.contract import resources
from tests.contract import api_served, cli_process, conftest
from tests.unit import kernel_samples as samples


@pytest.fixture
async def served(daemon: conftest.Daemon) -> AsyncIterator[api_served.Served]:
    async with api_served.serving(daemon) as made:
        yield made


def _offer(served: api_served.Served, directory: Path, *, sha256: str = "") -> None:
    """The host's own catalog has a kernel that can boot."""
    data = samples.bzimage(gzip.compress(samples.vmlinux()), len(samples.vmlinux()))
    (directory / "k").write_bytes(data)
    catalogs = served.daemon.paths.kernel_catalogs
    catalogs.mkdir()
    wanted = sha256 or hashlib.sha256(data).hexdigest()
    (catalogs / "mine.toml").write_text(
        samples.CATALOG_ENTRY.format(name="mine", sha256=wanted, size=len(data), path=directory / "k")
    )


async def _run(served: api_served.Served, *words: str) -> cli_process.Done:
    return await asyncio.to_thread(cli_process.Cli(served.path).run, "vm", *words)


async def test_a_kernel_is_pulled_by_the_first_that_wants_it(
    served: api_served.Served, tmp_path: Path
) -> None:
    _offer(served, tmp_path)
    done = await _run(served, "run", "--rm", "--kernel", "mine", "--", "exit", "7")
    assert done.status == 7, done.err
    assert "pulling mine" in done.err
    assert done.err.index("pulling mine") < done.err.index("preflight")
    assert "mine" in {kernel.name for kernel in await served.get("/v1/kernels", list[resources.Kernel])}
    again = await _run(served, "run", "--rm", "--kernel", "mine", "--", "exit", "0")
    assert "pulling" not in again.err


async def test_a_kernel_that_is_not_what_it_should_be_leaves_no_row(
    served: api_served.Served, tmp_path: Path
) -> None:
    _offer(served, tmp_path, sha256="0" * 64)
    failed = await _run(served, "create", "web", "--kernel", "mine")
    assert failed.status == 1
    assert "sha256" in failed.err
    assert await served.get("/v1/vms", list[resources.Vm]) == []


async def test_one_that_no_catalog_has_is_refused_at_once(served: api_served.Served) -> None:
    refused = await _run(served, "create", "web", "--kernel", "nope")
    assert "there is no kernel 'nope'" in refused.err
    assert [each.kind for each in served.daemon.services.operations.list()] == []
