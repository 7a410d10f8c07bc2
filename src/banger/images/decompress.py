# SPDX-License-Identifier: MIT
"""A layer's blob as the tar inside it: a bounded stream of pieces, checked to its last byte.

gzip by igzip, zstd, or plain. Decompressing and hashing go on in a thread of their own while the pieces are
used, and hold a few pieces at most. Used by `flatten` and for archives that are read once.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import IO, Final, cast

import zstandard
from isal import igzip_lib

from banger import run
from banger.contract import errors
from banger.images import bundle

PIECE_BYTES: Final = 1 << 18
MAX_WINDOW_BYTES: Final = 64 << 20
"""What a zstd frame may ask for. No common writer goes beyond 8 MiB unless told to."""
_FIRST_BYTES: Final = 1 << 12
_PIECES_AHEAD: Final = 8
_LOOK_S: Final = 0.5
"""How often who waits for a piece looks whether that is cancelled."""
_CUT: Final = "the blob is cut short"
_DAMAGED_HINT: Final = "pull or import it again"


@contextlib.contextmanager
def opened(layer: bundle.Layer, *, max_bytes: int) -> Iterator[Iterator[bytes]]:
    """The pieces of the layer's tar. Taking the last one raises when the whole is not what it should be."""
    stopped = threading.Event()

    def check() -> None:
        if stopped.is_set():
            raise _End

    with layer.path.open("rb") as blob:
        out = decompressed(blob, layer.compression, check=check)
        with _read_ahead(_verified(out, layer.diff_id, max_bytes), stopped) as ahead:
            yield ahead


def decompressed(
    blob: IO[bytes], compression: bundle.Compression, *, check: Callable[[], None] = run.check_cancelled
) -> Iterator[bytes]:
    """Pieces of at most `PIECE_BYTES`, whatever the input says; a blob that is cut or goes on is refused.

    `check` is called between two reads, and may raise: a blob of which nothing comes out is gone through
    to its end.
    """
    return _DECOMPRESSORS[compression](_Checked(blob, check))


@dataclass(frozen=True, slots=True)
class _Checked:
    blob: IO[bytes]
    check: Callable[[], None]

    def read(self, size: int = -1) -> bytes:
        self.check()
        return self.blob.read(size)


def _plain(blob: _Checked) -> Iterator[bytes]:
    while piece := blob.read(PIECE_BYTES):
        yield piece


def _gzip(blob: _Checked) -> Iterator[bytes]:
    """All members of the file, as seekable variants of gzip have thousands of them."""
    rest = blob.read(PIECE_BYTES)
    if not rest:
        raise _damaged(_CUT)
    while rest:
        rest = yield from _gzip_member(blob, rest)
        rest = rest or blob.read(PIECE_BYTES)


def _gzip_member(blob: _Checked, rest: bytes) -> Generator[bytes, None, bytes]:
    """Gives back the input behind the member.

    What is fed grows while the member goes on: each end copies what was fed in vain, and a blob of tiny
    members would else be nothing but copying.
    """
    member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
    view, fed = memoryview(rest), _FIRST_BYTES
    while not member.eof:
        given: bytes | memoryview = b""
        if member.needs_input:
            if not view:
                view = memoryview(blob.read(PIECE_BYTES))
            given, view = view[:fed], view[fed:]
            fed = min(2 * fed, PIECE_BYTES)
            if not given:
                raise _damaged(_CUT)
        try:
            piece = member.decompress(given, PIECE_BYTES)
        except igzip_lib.IsalError as error:  # type: ignore[misc]  # its stub says instance
            raise _damaged(f"not a whole gzip file: {error}") from error
        if piece:
            yield piece
    return member.unused_data + bytes(view)


def _zstd(blob: _Checked) -> Iterator[bytes]:
    source = _Frames(blob)
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    with _stream_reader(decompressor, source) as reader:
        while True:
            try:
                piece = reader.read(PIECE_BYTES)
            except zstandard.ZstdError as error:
                raise _damaged(f"not a whole zstd file: {error}") from error
            if not piece:
                break
            yield piece
    source.check_end()


def _stream_reader(
    decompressor: zstandard.ZstdDecompressor, source: _Frames
) -> zstandard.ZstdDecompressionReader:
    # Of a file it only ever asks `read`.
    return decompressor.stream_reader(
        cast(IO[bytes], source), read_size=PIECE_BYTES, read_across_frames=True
    )


_DECOMPRESSORS: Final[dict[bundle.Compression, Callable[[_Checked], Iterator[bytes]]]] = {
    bundle.Compression.NONE: _plain,
    bundle.Compression.GZIP: _gzip,
    bundle.Compression.ZSTD: _zstd,
}


class _Frames:
    """Follows zstd's frames and blocks by their lengths: the library takes a cut file for a short one."""

    _MAGIC: Final = 0xFD2FB528
    _SKIPPABLE: Final = 0x184D2A50
    _DICTIONARY_BYTES: Final = (0, 1, 2, 4)
    _CONTENT_SIZE_BYTES: Final = (0, 2, 4, 8)
    _RLE: Final = 1

    def __init__(self, blob: _Checked) -> None:
        self._blob = blob
        self._skip = 0
        self._head = b""
        self._wanted = 4
        self._next: Callable[[int], None] = self._magic
        self._checksum_bytes = 0
        self._whole_frames = 0

    def read(self, size: int = -1) -> bytes:
        data = self._blob.read(size)
        at = 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip -= step
            else:
                step = min(self._wanted - len(self._head), len(data) - at)
                self._head += data[at : at + step]
                if len(self._head) == self._wanted:
                    head, self._head = self._head, b""
                    self._next(int.from_bytes(head, "little"))
            at += step
        return data

    def check_end(self) -> None:
        between = self._next == self._magic and not self._head and not self._skip
        if not between or not self._whole_frames:
            raise _damaged(_CUT)

    def _expect(self, wanted: int, after: Callable[[int], None], *, skip: int = 0) -> None:
        self._wanted, self._next, self._skip = wanted, after, skip

    def _magic(self, value: int) -> None:
        if value == self._MAGIC:
            self._expect(1, self._descriptor)
        elif value & ~0xF == self._SKIPPABLE:
            self._expect(4, self._skippable)
        else:
            raise _damaged("not a zstd file, or something follows it")

    def _skippable(self, length: int) -> None:
        self._expect(4, self._magic, skip=length)

    def _descriptor(self, flags: int) -> None:
        single_segment = flags >> 5 & 1
        self._checksum_bytes = 4 * (flags >> 2 & 1)
        rest = self._CONTENT_SIZE_BYTES[flags >> 6] or single_segment
        rest += self._DICTIONARY_BYTES[flags & 3] + (1 - single_segment)
        self._expect(3, self._block, skip=rest)

    def _block(self, header: int) -> None:
        stored = 1 if header >> 1 & 3 == self._RLE else header >> 3
        if header & 1:
            self._whole_frames += 1
            self._expect(4, self._magic, skip=stored + self._checksum_bytes)
        else:
            self._expect(3, self._block, skip=stored)


def _verified(pieces: Iterator[bytes], diff_id: str, max_bytes: int) -> Iterator[bytes]:
    """Passes on what is within the limit; the end must have the digest that was announced."""
    algorithm, _, wanted = diff_id.partition(":")
    if diff_id and algorithm not in ("sha256", "sha512"):
        raise errors.BadRequestError(f"the layer's diff id {diff_id!r} has an unknown algorithm")
    digest = hashlib.new(algorithm, usedforsecurity=True) if diff_id else None
    left = max_bytes
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            raise errors.BadRequestError(
                f"more than {max_bytes} bytes come out of the layer",
                hint="there is no room for more; is this image meant to be that large?",
            )
        if digest is not None:
            digest.update(piece)
        yield piece
    if digest is not None and digest.hexdigest() != wanted:
        raise _damaged(f"its content is {algorithm}:{digest.hexdigest()} and not {diff_id}")


class _End(Exception):
    """No piece comes any more."""


@contextlib.contextmanager
def _read_ahead(pieces: Iterator[bytes], stopped: threading.Event) -> Iterator[Iterator[bytes]]:
    """Has the next pieces made while one is used; the thread is gone when the block is left."""
    ready: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()
    room = threading.Semaphore(_PIECES_AHEAD)

    def work() -> None:
        try:
            for piece in pieces:
                ready.put(piece)
                room.acquire()
                if stopped.is_set():
                    return
        except BaseException as error:
            ready.put(error)
        else:
            ready.put(_End())

    def taken() -> Iterator[bytes]:
        while not isinstance(piece := _awaited(ready), BaseException):
            room.release()
            yield piece
        if not isinstance(piece, _End):
            raise piece

    thread = threading.Thread(target=work, name="decompress", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        stopped.set()
        room.release()
        thread.join()


def _awaited(ready: queue.SimpleQueue[bytes | BaseException]) -> bytes | BaseException:
    """The next one, for which a blob of which nothing comes out has one wait."""
    while True:
        with contextlib.suppress(queue.Empty):
            return ready.get(timeout=_LOOK_S)
        run.check_cancelled()


def _damaged(reason: str) -> errors.BadRequestError:
    return errors.BadRequestError(reason, hint=_DAMAGED_HINT)
