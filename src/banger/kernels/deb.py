# SPDX-License-Identifier: MIT
"""Opens a distribution's kernel package: the boot image, its configuration and the modules, nothing else.

A .deb is an `ar` archive around a compressed tar. Nothing in it is executed. Used by the kernel importer.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import io
import lzma
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, cast

import zstandard

from banger import artefacts
from banger.contract import errors
from banger.kernels import files
from banger.tarstream import hole, reader

MAGIC: Final = b"!<arch>\n"
MAX_UNPACKED_BYTES: Final = 4 << 30
MAX_SKIPPED: Final = 16
MAX_MEMBERS: Final = 200_000
_HEADER_BYTES: Final = 60
_MEMORY_BYTES: Final = 192 << 20
_WINDOW_BYTES: Final = 1 << 27
_PIECE: Final = 1 << 16
_WANTED = re.compile(r"(?:\./)?(?:usr/)?(boot/vmlinu[xz]-[^/]+|boot/config-[^/]+|lib/modules/[^/]+/.+)")


def extract_kernel(package: Path, target: Path) -> None:
    """Puts `boot/` and `lib/modules/` of a package below `target`: plain files with plain modes only."""
    left = MAX_UNPACKED_BYTES
    with files.opened(package) as file, _data_tar(file) as stream:
        for number, member in enumerate(reader.entries(_pieces(stream))):
            if number >= MAX_MEMBERS:
                raise errors.BadRequestError(f"{package.name} has more than {MAX_MEMBERS} members")
            left -= member.size
            if left < 0:
                raise errors.BadRequestError(
                    f"{package.name} unpacks to more than {MAX_UNPACKED_BYTES >> 30} GiB"
                )
            if stat.S_ISREG(member.mode) and not member.hard_link:
                artefacts.keep_room(target.parent, f"what {package.name} holds", member.size)
                _take(member, target)


def _pieces(stream: IO[bytes]) -> Iterator[bytes]:
    while piece := stream.read(_PIECE):
        yield piece


def _take(member: reader.Entry, target: Path) -> None:
    name = member.name.decode(errors="replace")
    match = _WANTED.fullmatch(name)
    if match is None or {"..", "."} & set(match[1].split("/")):
        return
    path = target / match[1]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        files.write(_content(member), path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
            raise
        raise errors.BadRequestError(
            f"the package has a file that cannot be made: {name[:200]!r}: {error.strerror}"
        ) from error


def _content(member: reader.Entry) -> Iterator[bytes]:
    for piece in member.content:
        if isinstance(piece, hole.Hole):
            raise errors.BadRequestError("the package has a sparse file, which no package has")
        yield bytes(piece)


@contextlib.contextmanager
def _data_tar(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """The data member, unpacked while it is read."""
    if file.read(len(MAGIC)) != MAGIC:
        raise errors.BadRequestError("not a Debian package")
    for _ in range(MAX_SKIPPED):
        header = file.read(_HEADER_BYTES)
        size = header[48:58].strip()
        if len(header) < _HEADER_BYTES or header[58:] != b"`\n" or not size.isdigit():
            break
        name = header[:16].decode(errors="replace").strip().rstrip("/")
        if name.startswith("data.tar"):
            part = _Part(file, int(size))
            with _as_refusals(), _unpacked(cast(IO[bytes], part), name) as stream:
                yield stream
            return
        file.seek(int(size) + int(size) % 2, io.SEEK_CUR)
    raise errors.BadRequestError("the package holds no data: it is damaged, or not a Debian package")


@contextlib.contextmanager
def _as_refusals() -> Iterator[None]:
    try:
        yield
    except (lzma.LZMAError, zstandard.ZstdError, zlib.error, EOFError) as error:
        raise errors.BadRequestError(f"the package is damaged: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise errors.BadRequestError(f"the package is damaged: {error}") from error


class _Part(io.RawIOBase):
    """The next bytes of a file, as a file of their own."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = size

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data


class _Xz(io.RawIOBase):
    """xz or lzma unpacked with a bound on memory, which the standard library's file object does not have."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._stream = lzma.LZMADecompressor(memlimit=_MEMORY_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # narrower on purpose
        while not self._stream.eof:
            piece = self._source.read(_PIECE) if self._stream.needs_input else b""
            if self._stream.needs_input and not piece:
                raise EOFError("it is cut short")
            if data := self._stream.decompress(piece, len(buffer)):
                buffer[: len(data)] = data
                return len(data)
        return 0


def _unpacked(data: IO[bytes], name: str) -> IO[bytes]:
    match name.rsplit(".", 1)[-1]:
        case "xz" | "lzma":
            return io.BufferedReader(_Xz(data))
        case "bz2":
            return bz2.BZ2File(data)
        case "zst":
            unpacker = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
            return io.BufferedReader(unpacker.stream_reader(data))
        case "gz":
            return gzip.GzipFile(fileobj=data)  # type: ignore[return-value]
        case "tar":
            return data
        case _:
            raise errors.BadRequestError(f"unknown compression of a package: {name}")
