# SPDX-License-Identifier: MIT
"""Installing, mending, a failure and uninstalling on this machine's files, in a mount namespace of its own.

systemctl is the real one, told that no systemd runs: it makes and removes links and starts nothing. Both
services are fakes. What they do when they really run is tested in the lab.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("installation.py")
LAYERS = ("/etc", "/usr/local", "/var/lib", "/var/cache")


@pytest.fixture
def scratch() -> Path:
    """On a file system that overlays can write to."""
    return Path(tempfile.mkdtemp(prefix="b-"))


@pytest.mark.root
@pytest.mark.parametrize(
    "act",
    [
        *("purge", "keep", "fails", "mend-fails", "at-once", "again"),
        *("owner-gone", "goes-back", "stays", "cut-off"),
    ],
)
def test_an_installation_is_exact(act: str, scratch: Path) -> None:
    mounts = " && ".join(
        f"mkdir -p {scratch}/m/{n} && mount -t tmpfs none {scratch}/m/{n} && mkdir {scratch}/m/{n}/u "
        f"{scratch}/m/{n}/w && mount -t overlay -o lowerdir={layer},upperdir={scratch}/m/{n}/u,"
        f"workdir={scratch}/m/{n}/w none {layer}"
        for n, layer in enumerate(LAYERS)
    )
    script = f"{mounts} && mount -t tmpfs none /run && exec {sys.executable} {SCRIPT} {act}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", script],
            capture_output=True,
            text=True,
            timeout=60,
            env=environment,
            check=False,
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
