# SPDX-License-Identifier: MIT
"""Files with several names, replaced while they are packed: no name is given another's content."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import archive
from banger.contract import guest
from banger.owner import guest as guests
from tests.contract import agent

MIB = 1 << 20
REPLACE = """
import os, sys
source, names = sys.argv[1], sys.argv[2:]
print(flush=True)
while True:
    for kept in ("one", "other"):
        for name in names:
            os.link(f"{source}/{kept}", f"{source}.new")
            os.rename(f"{source}.new", f"{source}/{name}")
"""


@pytest.fixture(scope="module", params=agent.KINDS)
def client(request: pytest.FixtureRequest) -> Iterator[guests.GuestClient]:
    """A client of a running agent."""
    with agent.running(request.param) as path:
        yield guests.GuestClient(lambda: asyncio.open_unix_connection(str(path)))


def contents(data: bytes) -> dict[str, bytes]:
    """By name, as they are once it is unpacked."""
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            if info.islnk():
                found[info.name] = found[info.linkname]
            elif file := tar.extractfile(info):
                found[info.name] = file.read()
    return found


@contextlib.contextmanager
def replacing(source: Path, names: list[str]) -> Iterator[None]:
    """Each of these names is of one file and then of the other, again and again."""
    argv = [sys.executable, "-c", REPLACE, str(source), *names]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        try:
            yield
        finally:
            process.kill()


async def test_a_name_that_is_replaced_while_it_is_packed(
    client: guests.GuestClient, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("one", "other"):
        (source / name).write_text(name)
    names = [f"name{number}" for number in range(30)]
    with replacing(source, names):
        for _ in range(100):
            async with client.get(guest.GetSpec(str(source))) as stream:
                found = contents(b"".join([piece async for piece in stream]))
            assert (found["source/one"], found["source/other"]) == (b"one", b"other")


def with_number(directory: Path, number: int, text: str) -> Path:
    """A file with two names that has an inode's number which is free; where no file system gives it, any."""
    for count in range(5000):
        path = directory / f"candidate{count}"
        path.write_text(text)
        if path.stat().st_ino == number:
            break
    os.link(path, directory / "candidate")
    return path


async def test_a_number_that_is_another_file_s_by_now(client: guests.GuestClient, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        (source / f"name{number}").touch()
    first, big, last = os.listdir(source)
    (source / first).write_text("old")
    os.truncate(source / big, 64 * MIB)
    os.link(source / first, tmp_path / "again")
    async with client.get(guest.GetSpec(str(source))) as stream:
        pieces = aiter(stream)
        data = await anext(pieces)
        number = (source / first).stat().st_ino
        (tmp_path / "again").unlink()
        (source / first).unlink()
        with_number(tmp_path, number, "new").rename(source / last)
        data += b"".join([piece async for piece in pieces])
    found = contents(data)
    assert (found[f"source/{first}"], found[f"source/{last}"]) == (b"old", b"new")


@pytest.mark.parametrize("names", [1, 2])
def test_a_number_that_is_another_file_s_by_now_on_the_way_in(tmp_path: Path, names: int) -> None:
    first, again, middle, last = (tmp_path / name for name in ("first", "again", "middle", "last"))
    first.write_text("old")
    middle.mkdir()
    os.link(first, again)
    packing = archive.packed([(path.name, str(path)) for path in (first, middle, last)])
    data = b""
    while b"middle" not in data:
        data += next(packing)
    number = first.stat().st_ino
    first.unlink()
    again.unlink()
    with_number(tmp_path, number, "new").rename(last)
    if names == 1:
        (tmp_path / "candidate").unlink()
    data += b"".join(packing)
    assert contents(data) == {"first": b"old", "last": b"new"}
