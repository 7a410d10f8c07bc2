# SPDX-License-Identifier: MIT
"""The seed takes no more of the host's disk than it was given."""

from __future__ import annotations

from pathlib import Path

import pytest

from banger.contract import errors
from banger.images import seed
from banger.images.mkfs import filesystem
from tests.unit.tars import file, pax, put, tar

SPARSE = (
    pax((b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.size", b"%d" % (1 << 43))),
    file(b"root/huge", b"x"),
)


@pytest.mark.parametrize(
    ("members", "least_bytes"),
    [([file(b"root/%d" % number, b"x") for number in range(200)], 1), (SPARSE, 0)],
    ids=["many files", "one of holes"],
)
def test_a_seed_ends_where_there_is_no_more_room(
    members: list[bytes], least_bytes: int, tmp_path: Path
) -> None:
    archive = tmp_path / "seed.tar"
    with filesystem.Filesystem(tmp_path / "fs.ext4") as fs:
        put(fs, [tar(*members)])
        home = fs.lookup(fs.ROOT, b"root") or 0
        with pytest.raises(errors.NoSpaceError, match=r"in /root does not fit into the 48\.8 KiB"):
            seed.pack(fs, home, archive, max_bytes=50_000)
    assert least_bytes <= archive.stat().st_size <= 50_000
