# SPDX-License-Identifier: MIT
"""A copy into a directory whose owner in the guest changes it meanwhile gives them nothing of others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.contract import errors, guest
from banger.owner import guest as guests
from tests.contract import agent
from tests.contract.test_guest_files import archive, member, pieces

SOMEBODY = 1000
MEMBERS = 500
TRIES = 25


@pytest.fixture(scope="module", params=agent.KINDS)
def client(request: pytest.FixtureRequest) -> Iterator[guests.GuestClient]:
    """A client of an agent that is root."""
    with agent.running(request.param) as path:
        yield guests.GuestClient(lambda: asyncio.open_unix_connection(str(path)))


@contextlib.contextmanager
def replaced(target: Path, victim: Path) -> Iterator[None]:
    """Another name of the victim takes the target's place, again and again."""
    done, name = threading.Event(), target.with_name("name")

    def replace() -> None:
        while not done.is_set():
            with contextlib.suppress(FileExistsError):
                os.link(victim, name)
            if os.path.lexists(target):
                name.rename(target)

    replacing = threading.Thread(target=replace)
    replacing.start()
    try:
        yield
    finally:
        done.set()
        replacing.join()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.FIFOTYPE])
async def test_no_file_of_others_changes_its_owner(
    client: guests.GuestClient, tmp_path: Path, kind: bytes
) -> None:
    """As the kernel is by itself, anybody may give any file another name."""
    victim, directory = tmp_path / "victim", tmp_path / "directory"
    victim.touch()
    directory.mkdir()
    made = member(
        "made", kind, uid=SOMEBODY, gid=SOMEBODY, linkname="nowhere" if kind == tarfile.SYMTYPE else ""
    )
    data = archive(*[(made, b"")] * MEMBERS)
    with replaced(directory / "made", victim):
        for _ in range(TRIES):
            with contextlib.suppress(errors.OperationFailedError):
                await client.put(guest.PutSpec(str(directory)), pieces(data, 1 << 16))
            assert victim.stat().st_uid == os.getuid()
