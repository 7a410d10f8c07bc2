# SPDX-License-Identifier: MIT
"""A flush tells when a file system cannot be written, wherever that is mounted."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.contract import errors
from banger.owner import guest as guests
from tests.contract import agent

MIB = 1 << 20


def run(*argv: str | Path) -> None:
    subprocess.run(argv, check=True, timeout=30)


@pytest.fixture(params=["plain", "with blank", "tab\tand \\040"])
def failing_mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A mounted ext4 whose disk takes a few of the bytes that it promises."""
    disk, target = tmp_path / "disk", tmp_path / request.param
    disk.mkdir()
    target.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=2m", "none", disk)
    image = disk / "image"
    image.touch()
    os.truncate(image, 64 * MIB)
    run("mkfs.ext4", "-q", "-O", "^has_journal", "-E", "nodiscard", image)
    run("mount", "-o", "loop", image, target)
    yield target
    run("umount", "-l", target)
    run("umount", "-l", disk)  # whose file the kernel may keep for a moment, for the loop device


@pytest.mark.parametrize("kind", agent.KINDS)
async def test_a_disk_that_cannot_be_written_is_told_wherever_it_is_mounted(
    kind: str, failing_mount: Path
) -> None:
    (failing_mount / "file").write_bytes(bytes(8 * MIB))
    with agent.running(kind) as path:
        client = guests.GuestClient(lambda: asyncio.open_unix_connection(str(path)))
        with pytest.raises(errors.OperationFailedError, match=r"cannot flush .*(I|Input)/(O|output) error"):
            await client.flush(deadline_s=60)
