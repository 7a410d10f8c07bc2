# SPDX-License-Identifier: MIT
"""A recipe that is built for real: a mirror's signed packages, by the builder's unit, into a VM that runs.

The lab reaches no mirror, so it is handed a small one that is genuine, and serves it to itself.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from banger.contract import names
from lab import cache, mirror, provision
from lab.session import Lab
from tests.lab import served, user

pytestmark = [pytest.mark.long, pytest.mark.timeout(2100)]
TOOLS: Final = ("mmdebstrap", "fakechroot", "fakeroot", "debian-archive-keyring")
PACKAGES: Final = (
    *("base-files", "base-passwd", "coreutils", "dash", "debianutils", "diffutils", "dpkg"),
    *("grep", "libc-bin", "liblockfile-bin", "sed"),
)
"""The least that dpkg runs packages' scripts with, and one that brings a setgid program."""
RECIPE: Final = f"""
name = "small"
summary = "dpkg, and what it runs scripts with"
suite = "{mirror.SUITE}"
variant = "custom"
kernel = "generic-6.12"
headroom_mib = 64
packages = {json.dumps(PACKAGES)}
exclude_paths = ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"]
"""
PORT: Final = 8080
SOURCE: Final = f"deb http://127.0.0.1:{PORT} {mirror.SUITE} main\n"
PATH: Final = f"/home/{user.NAME}/small.toml"
SAID: Final = """
stat -c '%a %u %g' /usr/bin/dotlockfile
dpkg-query -W -f '${db:Status-Status}\\n' liblockfile-bin
readlink /bin/sh
"""


@pytest.fixture
def host_with_a_mirror(new_name: Callable[[str], str], no_lab_left: None) -> Iterator[Lab]:
    """An installed host that has what builds need, from the only package source that it has: its own."""
    handed = mirror.ensure(cache.default_root(), (*PACKAGES, *TOOLS))
    with (
        contextlib.closing(handed),
        provision.installed(new_name("mirror"), artefacts=handed.path) as lab,
        served.directory(lab, "/artefacts", PORT),
    ):
        lab.write("/etc/apt/sources.list", SOURCE.encode())
        lab.write("/etc/apt/apt.conf.d/90-mirror", b'Acquire::Languages "none";\n')
        lab.run(["apt-get", "update", "-qq", "--error-on=any"], timeout_s=300)
        lab.run(
            ["apt-get", "install", "-qq", "--yes", "--no-install-recommends", *TOOLS],
            env={"DEBIAN_FRONTEND": "noninteractive"},
            timeout_s=600,
        )
        yield lab


def test_a_recipe_is_built_of_a_mirror_s_packages_and_its_vm_runs(host_with_a_mirror: Lab) -> None:
    host = host_with_a_mirror
    host.write(PATH, RECIPE.encode())
    said = user.banger(host, "image", "build", PATH, timeout_s=1900)
    assert "installing essential packages" in said.text + said.error_text
    log = host.run(
        ["journalctl", "-u", "bangerd-build@*", "-o", "json", "--output-fields=_UID,MESSAGE"]
    ).text
    [uid] = {int(line["_UID"]) for line in map(json.loads, log.splitlines()) if '"built"' in line["MESSAGE"]}
    assert uid in names.BUILD_UIDS
    ran = user.banger(host, "vm", "run", "--rm", "--image", "small", *user.SMALL, "--", "sh", "-c", SAID)
    assert ran.text.split() == ["2755", "0", "8", "installed", "dash"]
