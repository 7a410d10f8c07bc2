# SPDX-License-Identifier: MIT
"""A distribution's kernel package on an installed host: imported, and booted."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.kernels import catalog
from lab import cache
from lab.session import Lab
from tests.lab import user

pytestmark = pytest.mark.timeout(600)

PACKAGE = f"/home/{user.NAME}/linux-image.deb"


@pytest.fixture(scope="module")
def package() -> Iterator[Path]:
    """Debian 12's kernel package, verified by apt; any version will do, so it is kept."""
    source = catalog.find("debian-6.1", "x86_64").source
    assert isinstance(source, catalog.Package)

    def build(stage: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            fetched = catalog.download(source, Path(scratch), "x86_64")
            shutil.copy(fetched.path, stage / "linux-image.deb")

    entry = cache.Cache(cache.default_root(), "package", 1).ensure(cache.key_of([str(source)]), build)
    yield entry.path / "linux-image.deb"
    entry.close()


@pytest.fixture
def host(installed_host: Lab, package: Path) -> Iterator[Lab]:
    """The installed host with the package in its user's home; the daemon has a /tmp of its own."""
    installed_host.put(package, PACKAGE)
    installed_host.run(["chmod", "644", PACKAGE])
    yield installed_host
    user.banger(installed_host, "kernel", "delete", "mine", check=False)
    installed_host.run(["rm", "-f", PACKAGE])


def test_a_package_is_imported_and_boots(host: Lab) -> None:
    user.banger(host, "kernel", "import", PACKAGE, "--name", "mine")
    kernel = json.loads(user.banger(host, "kernel", "show", "mine", "--json").text)
    assert (kernel["kind"], kernel["checked_by"]) == ("initrd", "config file")
    assert (kernel["lacks"], kernel["unknown"]) == ([], [])
    words = ("--rm", "--kernel", "mine", *user.TINY, "--", "uname", "-r")
    assert user.banger(host, "vm", "run", *words).text == f"{kernel['version']}\n"
