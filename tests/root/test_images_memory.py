# SPDX-License-Identifier: MIT
"""What making an image takes of memory: bounded, whatever is in it. In a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest

from tests.style import tree
from tests.unit import tars

MAX_MIB = 150
MEASURED = """
import platform, sys
from pathlib import Path
from banger.images import assemble, bundle, records

place = Path(sys.argv[1])
layers = tuple(
    bundle.Layer(path, bundle.Compression.GZIP, "sha256:" + path.name, path.stat().st_size)
    for path in sorted(place.glob("layer*"))
)
assemble.assemble(
    records.Images(place / "images"),
    bundle.Bundle("test", "", platform.machine(), layers),
    name="measured", guest_binary=place / "guest", kernel="none", headroom_mib=16,
)
lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(lines["VmHWM"].split()[0]) // 1024)
"""


def many_files(path: Path, count: int) -> None:
    """A layer of small files, each with attributes."""
    with path.open("wb") as out:
        compressor = zlib.compressobj(1, wbits=31)
        for number in range(count):
            directory = b"usr/share/directory-%d" % (number // 100)
            said = tars.pax((b"mtime", b"1700000000.5"), (b"SCHILY.xattr.user.note", b"%d" % number))
            out.write(compressor.compress(said + tars.file(directory + b"/a-file-%d" % number, b"small")))
        out.write(compressor.compress(tars.END) + compressor.flush())


def large_files(path: Path, count: int, mib: int) -> None:
    block = bytes(range(1, 256)) * 4112
    size = mib << 20
    with path.open("wb") as out:
        compressor = zlib.compressobj(1, wbits=31)
        for number in range(count):
            out.write(compressor.compress(tars.header(b"large-%d" % number, size=size)))
            for at in range(0, size, len(block)):
                out.write(compressor.compress(block[: size - at]))
        out.write(compressor.compress(tars.END) + compressor.flush())


@pytest.mark.timeout(180)
def test_memory_is_bounded() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="banger-memory-") as name:
        place = Path(name)
        (place / "guest").write_bytes(b"\x7fELF")
        many_files(place / "layer1", 120_000)
        large_files(place / "layer2", 2, 96)
        measured = subprocess.run(
            [sys.executable, "-c", MEASURED, name],
            cwd=tree.ROOT,
            env={"PYTHONPATH": str(tree.ROOT / "src")},
            check=True,
            capture_output=True,
            timeout=150,
        )
    assert int(measured.stdout) <= MAX_MIB
