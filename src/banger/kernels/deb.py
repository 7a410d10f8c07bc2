# SPDX-License-Identifier: MIT
"""Opens a distribution's kernel package: the boot image and the modules, nothing else.

A .deb is an `ar` archive around a compressed tar. Nothing in it is executed. Used by the kernel importer.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import zstandard

from banger import run
from banger.contract import errors

_MAGIC: Final = b"!<arch>\n"
_HEADER_BYTES: Final = 60
_WANTED = re.compile(r"^\./(?:usr/)?(boot/vmlinu[xz]-[^/]+|boot/config-[^/]+|lib/modules/[^/]+/.+)$")


def extract_kernel(package: Path, target: Path) -> None:
    """Puts `boot/` and `lib/modules/` of a package below `target`: plain files with plain modes only."""
    with (
        package.open("rb") as file,
        _data_tar(file) as stream,
        tarfile.open(fileobj=stream, mode="r|") as archive,
    ):
        for member in archive:
            run.check_cancelled()
            match = _WANTED.match(member.name)
            if match is None or not member.isreg() or ".." in member.name.split("/"):
                continue
            path = target / match[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            source = archive.extractfile(member)
            assert source is not None  # noqa: S101  # a regular member always has content
            with path.open("wb") as out:
                shutil.copyfileobj(source, out)


@contextlib.contextmanager
def _data_tar(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """The data member, unpacked while it is read."""
    if file.read(len(_MAGIC)) != _MAGIC:
        raise errors.BadRequestError("not a Debian package")
    while len(header := file.read(_HEADER_BYTES)) == _HEADER_BYTES:
        name = header[:16].decode(errors="replace").strip().rstrip("/")
        size = int(header[48:58])
        if name.startswith("data.tar"):
            yield _unpacked(io.BytesIO(file.read(size)), name)
            return
        file.seek(size + size % 2, io.SEEK_CUR)
    raise errors.BadRequestError("the package holds no data")


def _unpacked(data: IO[bytes], name: str) -> IO[bytes]:
    match name.rsplit(".", 1)[-1]:
        case "xz" | "lzma":
            return lzma.LZMAFile(data)
        case "zst":
            return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(data))
        case "gz":
            return gzip.GzipFile(fileobj=data)  # type: ignore[return-value]
        case "bz2":
            return bz2.BZ2File(data)
        case "tar":
            return data
        case _:
            raise errors.BadRequestError(f"unknown compression of a package: {name}")
