# SPDX-License-Identifier: MIT
"""What a VM needs and is not here yet is obtained by the command that wants it, and its progress is seen."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import platform
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from banger.contract import resources
from banger.images import recipe
from tests import oci_make
from tests.contract import api_served, cli_process, conftest, test_image_service
from tests.fakes import registry as registries
from tests.unit import kernel_samples as samples

RECIPE = """
name = "built"
summary = "nothing but a shell"
headroom_mib = 1
suite = "bookworm"
variant = "extract"
kernel = "tiny"
packages = ["busybox-static"]
"""


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


@pytest.fixture
def registry() -> Iterator[registries.Registry]:
    with registries.serving() as made:
        test_image_service.add(made, "v1", oci_make.tar({"bin/sh": b"shell"}))
        yield made


def _extend_catalog(served: api_served.Served, directory: Path, registry: registries.Registry) -> None:
    """With `pulled`, an image of the registry, and `built`, a recipe whose packages are here already."""
    (directory / "recipe").write_text(RECIPE)
    wanted, paths = recipe.parse(RECIPE.encode()), served.daemon.paths
    packages = paths.cache / "recipes" / f"built-{wanted.base_key(platform.machine(), '')}.tar"
    packages.parent.mkdir(parents=True)
    packages.write_bytes(oci_make.tar({"bin/sh": b"shell"}))
    assert paths.image_catalog is not None
    entries = (
        ("pulled", "oci", f"{registry.host}/app:v1", "digest", oci_make.digest(registry.manifests["v1"][1])),
        ("built", "recipe", directory / "recipe", "sha256", hashlib.sha256(RECIPE.encode()).hexdigest()),
        ("changed", "recipe", directory / "recipe", "sha256", "0" * 64),
    )
    paths.image_catalog.write_text(
        "".join(
            f'[[image]]\nname = "{name}"\nkind = "{kind}"\nsource = "{source}"\n{of} = "{what}"\n'
            for name, kind, source, of, what in entries
        )
    )


@pytest.mark.parametrize(
    ("image", "seen"), [("{host}/app:v1", "pulling "), ("pulled", "pulling "), ("built", "building built")]
)
async def test_an_image_is_obtained_by_the_first_that_wants_it(
    served: api_served.Served, registry: registries.Registry, tmp_path: Path, image: str, seen: str
) -> None:
    _extend_catalog(served, tmp_path, registry)
    image = image.format(host=registry.host)
    done = await _run(served, "run", "--rm", "--image", image, "--kernel", "tiny", "--", "exit", "7")
    assert done.status == 7, done.err
    assert done.err.index(seen) < done.err.index("preflight")
    assert image in {each.name for each in await served.get("/v1/images", list[resources.Image])}
    again = await _run(served, "create", "web", "--image", image, "--kernel", "tiny")
    assert again.status == 0, again.err
    assert seen not in again.err


@pytest.mark.parametrize(
    ("image", "why"),
    [
        ("{host}/app:v2", "v2"),
        ("changed", "is not the one that the catalog knows"),
        ("nope", "no image 'nope'"),
    ],
)
async def test_an_image_that_cannot_be_obtained_leaves_no_row(
    served: api_served.Served, registry: registries.Registry, tmp_path: Path, image: str, why: str
) -> None:
    _extend_catalog(served, tmp_path, registry)
    image = image.format(host=registry.host)
    failed = await _run(served, "create", "web", "--image", image, "--kernel", "tiny")
    assert failed.status == 1
    assert why in failed.err
    assert "nothing is left" not in failed.err, "there was no VM"
    assert ("no VM was made" in failed.err) is ("/" in image), "the others are refused at once"
    assert await served.get("/v1/vms", list[resources.Vm]) == []


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
