# SPDX-License-Identifier: MIT
"""Images that are no machines: each boots, answers the agent and runs what it was made for, without network.

The default image, with systemd, boots in every other test here.
"""

from __future__ import annotations

import platform
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from banger.images import recipe as recipes
from lab import cache
from lab.session import Lab
from tests import oci_make
from tests.lab import user

HOME: Final = f"/home/{user.NAME}"


def _base(recipe: recipes.Recipe) -> Path:
    downloads = cache.default_root() / "downloads"
    return recipes.base_archive(recipe, arch=platform.machine(), cache_dir=downloads)


@pytest.fixture(scope="module")
def busybox() -> bytes:
    """A static program that is a shell, `id` or `echo`, by the name it is called."""
    with tarfile.open(_base(recipes.load("busybox"))) as archive:
        for name in ("./bin/busybox", "./usr/bin/busybox"):
            try:
                member = archive.extractfile(name)
            except KeyError:
                continue
            if member is not None:
                return member.read()
    raise AssertionError("busybox-static has no busybox")


@pytest.fixture(scope="module")
def layout(busybox: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout with an image of one static program, and one of a shell without init."""
    root = tmp_path_factory.mktemp("oci") / "layout"
    alone = {"Entrypoint": ["/busybox", "echo"], "Cmd": ["all", "alone"]}
    oci_make.layout(root, "static", [oci_make.tar({"busybox": busybox})], alone)
    programs = oci_make.tar({"bin/sh": busybox, "bin/id": busybox, "srv/file": b"content\n"})
    passwd = oci_make.tar({"etc/passwd": b"root:x:0:0::/root:/bin/sh\nweb:x:1000:1001::/srv:/bin/sh\n"})
    shell: dict[str, Any] = {
        "Entrypoint": ["/bin/sh", "-c"],
        "Cmd": ['echo "$COLOUR $PWD $(id -u):$(id -g) $$"; read line < file; echo $line; exit 7'],
        "Env": ["COLOUR=green", "PATH=/bin"],
        "User": "web",
        "WorkingDir": "/srv",
    }
    oci_make.layout(root, "shell", [programs, passwd], shell)
    return root


@pytest.fixture(scope="module")
def machine(installed_host: Lab, layout: Path) -> Iterator[Lab]:
    """The installed host with the images `static` and `shell`."""
    made = ("static", "shell")
    installed_host.put(layout, f"{HOME}/layout", owner="1000:1000")
    for name in made:
        user.banger(installed_host, "image", "import", f"{HOME}/layout", "--image", name, "--name", name)
    yield installed_host
    user.banger(installed_host, "image", "delete", *made)
    installed_host.run(["rm", "-r", f"{HOME}/layout"])
    assert user.leftovers(installed_host) == ""


def test_a_single_static_program(machine: Lab) -> None:
    ended = user.banger(machine, "vm", "run", "--rm", "--image", "static", *user.SMALL)
    assert ended.text == "all alone\n"


def test_a_shell_without_init_runs_as_its_author_meant(machine: Lab) -> None:
    ended = user.banger(machine, "vm", "run", "--rm", "--image", "shell", *user.SMALL, check=False)
    first, second = ended.text.splitlines()
    assert (first.split()[:3], second, ended.status) == (["green", "/srv", "1000:1001"], "content", 7)
