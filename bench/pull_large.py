# SPDX-License-Identifier: MIT
"""An image that is large both ways: a hundred thousand small files, and a GiB that does not compress."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tests import oci_make
from tests.unit import tars

SMALL_FILES: Final = 100_000
LARGE_FILES: Final = 4
_LARGE_BYTES: Final = 1 << 28
_PIECE: Final = bytes(os.urandom(1 << 20))


def layout(root: Path, tag: str) -> None:
    """Adds it to an OCI layout, and never holds more of it than a piece."""
    made = [_layer(root, pieces) for pieces in (_small(), _large())]
    oci_make.described(root, tag, [stored for stored, _ in made], [diff_id for _, diff_id in made])


def _small() -> Iterator[bytes]:
    for number in range(SMALL_FILES):
        yield tars.file(b"usr/share/d%d/file-%d" % (number // 100, number), b"%d" % number * (number % 40))
    yield tars.END


def _large() -> Iterator[bytes]:
    for number in range(LARGE_FILES):
        yield tars.header(b"srv/large-%d" % number, size=_LARGE_BYTES)
        for _ in range(0, _LARGE_BYTES, len(_PIECE)):
            yield _PIECE
    yield tars.END


def _layer(root: Path, pieces: Iterator[bytes]) -> tuple[dict[str, Any], str]:
    """Its descriptor and its diff id. Deflate does not look back as far as a whole piece: it stays large."""
    outer, inner, size = hashlib.sha256(), hashlib.sha256(), 0
    compressor = zlib.compressobj(1, wbits=31)
    path = oci_make.blobs(root) / "new"
    with path.open("wb") as out:

        def put(data: bytes) -> None:
            nonlocal size
            outer.update(data)
            size += out.write(data)

        for piece in pieces:
            inner.update(piece)
            put(compressor.compress(piece))
        put(compressor.flush())
    path.rename(path.with_name(outer.hexdigest()))
    stored = {
        "mediaType": f"{oci_make.LAYER}+gzip",
        "digest": f"sha256:{outer.hexdigest()}",
        "size": size,
    }
    return stored, f"sha256:{inner.hexdigest()}"
