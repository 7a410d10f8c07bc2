# SPDX-License-Identifier: MIT
"""Packs of a guest that are small on their way and large where they are unpacked."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from banger import archive
from banger.contract import errors
from banger.workspace import receiving, repository, snapshot
from tests.contract import repositories

MIB = 1 << 20
_REF_DELTA, _BLOB = 7, 3


def _header(kind: int, size: int) -> bytes:
    first, size = kind << 4 | size & 15, size >> 4
    return bytes([first | 0x80]) + _number(size) if size else bytes([first])


def _number(value: int) -> bytes:
    out = b""
    while value >= 128:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _sum(data: bytes) -> hashlib._Hash:
    return hashlib.sha1(data, usedforsecurity=False)


def bomb(base: bytes, size: int) -> tuple[bytes, bytes]:
    """A pack of a blob of 1 MiB and of one that repeats it, and a tree of both as `git mktree` takes it."""
    repeat = bytes([0x80 | 0x40, 0x10])
    delta = _number(len(base)) + _number(size) + repeat * (size // MIB)
    of_base = _sum(b"blob %d\0" % len(base) + base)
    pack = b"PACK" + struct.pack(">II", 2, 2) + _header(_BLOB, len(base)) + zlib.compress(base)
    pack += _header(_REF_DELTA, len(delta)) + of_base.digest() + zlib.compress(delta)
    whole = _sum(b"blob %d\0" % size)
    for _ in range(size // MIB if size < 1 << 30 else 0):
        whole.update(base)
    tree = f"100644 blob {of_base.hexdigest()}\tbase\n100644 blob {whole.hexdigest()}\tlarge\n"
    return pack + _sum(pack).digest(), tree.encode()


@pytest.fixture
def here(tmp_path: Path) -> repository.Repository:
    repositories.plain(tmp_path / "here")
    return repository.find(tmp_path / "here")


def test_a_pack_that_unpacks_to_more_than_the_host_has_is_refused(here: repository.Repository) -> None:
    pack, _ = bomb(bytes(MIB), 3 << 30)
    with snapshot.scratch(here) as scratch, pytest.raises(errors.OperationFailedError) as caught:
        scratch.take_in([pack])
    assert "Out of memory" in caught.value.message
    assert "2 GiB" in caught.value.hint


def test_what_lands_is_no_larger_than_what_was_sent(here: repository.Repository) -> None:
    pack, entries = bomb(os.urandom(MIB), 64 * MIB)
    made = here.top.with_name("made.git")
    repositories.git(here.top, "clone", "-q", "--bare", ".", str(made))
    repositories.git(made, "index-pack", "--stdin", stdin=pack)
    tree = repositories.git(made, "mktree", stdin=entries).decode().strip()
    head = repositories.git(made, "commit-tree", tree, "-p", "main", "-m", "large").decode().strip()
    base = repositories.git(made, "rev-parse", "main").decode().strip()
    sent = repositories.git(
        made, "pack-objects", "--revs", "--stdout", "-q", stdin=f"{head}\n^{base}\n".encode()
    )
    assert len(sent) < 2 * MIB
    before = _used(here.objects)
    with snapshot.scratch(here) as scratch:
        receiving.land(scratch, [sent], base=base, head=head, branch="banger/web", force=False)
    assert _used(here.objects) - before < 4 * MIB


def _used(path: Path) -> int:
    return int(subprocess.run(["du", "-sb", path], capture_output=True, check=True).stdout.split()[0])


def test_a_pack_without_end_leaves_room_on_the_disk(
    here: repository.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_KEPT_BYTES", 1 << 60)
    found = os.statvfs_result((4096, 4096, 1000, 49, 49, 100, 100, 100, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: found)

    def endless() -> bytes:
        raise AssertionError("a second piece was asked for")

    with snapshot.scratch(here) as scratch, pytest.raises(errors.NoSpaceError, match="no space left"):
        scratch.take_in(piece if piece else endless() for piece in (bytes(1000), b""))
