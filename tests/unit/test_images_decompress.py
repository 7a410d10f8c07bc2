# SPDX-License-Identifier: MIT
"""Blobs as bounded streams: what comes out, what is refused, and that no thread stays behind."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import zstandard
from hypothesis import strategies

from banger import run
from banger.contract import errors
from banger.images import bundle, decompress

PLENTY = 1 << 40
CONTENT = b"".join(b"%d is a line of text\n" % number for number in range(60_000)) + bytes(700_000)
SKIPPABLE = b"\x5a\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"index"


def zstd(data: bytes, level: int = 3, **options: object) -> bytes:
    return zstandard.ZstdCompressor(level=level, **options).compress(data)  # type: ignore[arg-type]


def out_of(data: bytes, compression: bundle.Compression) -> bytes:
    return b"".join(decompress.decompressed(io.BytesIO(data), compression))


COMPRESS: dict[bundle.Compression, Callable[[bytes], bytes]] = {
    bundle.Compression.NONE: bytes,
    bundle.Compression.GZIP: gzip.compress,
    bundle.Compression.ZSTD: zstd,
}


SHORT = {
    bundle.Compression.GZIP: gzip.compress(CONTENT[:4000]),
    bundle.Compression.ZSTD: zstd(CONTENT[:4000], write_checksum=True),
}


@pytest.fixture
def layer_of(tmp_path: Path) -> Callable[..., bundle.Layer]:
    def make(data: bytes, compression: bundle.Compression, diff_id: str = "") -> bundle.Layer:
        path = tmp_path / "blob"
        path.write_bytes(data)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        return bundle.Layer(path, compression, digest, len(data), diff_id)

    return make


def read(layer: bundle.Layer, max_bytes: int = PLENTY) -> bytes:
    with decompress.opened(layer, max_bytes=max_bytes) as pieces:
        return b"".join(pieces)


@pytest.mark.parametrize("compression", bundle.Compression)
def test_the_content_comes_out(
    compression: bundle.Compression, layer_of: Callable[..., bundle.Layer]
) -> None:
    diff_id = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    assert read(layer_of(COMPRESS[compression](CONTENT), compression, diff_id)) == CONTENT


@pytest.mark.parametrize("compression", [bundle.Compression.GZIP, bundle.Compression.ZSTD])
def test_a_file_of_many_parts_is_one(compression: bundle.Compression) -> None:
    parts = [CONTENT[:10], b"", CONTENT[10:500_000], b"", CONTENT[500_000:]]
    data = b"".join(COMPRESS[compression](part) for part in parts)
    assert out_of(data, compression) == CONTENT


def test_skippable_frames_are_skipped() -> None:
    data = SKIPPABLE + zstd(CONTENT) + SKIPPABLE + zstd(b"end") + SKIPPABLE
    assert out_of(data, bundle.Compression.ZSTD) == CONTENT + b"end"


@pytest.mark.parametrize(
    "options",
    [{"write_checksum": True}, {"write_content_size": False}, {"level": 9}, {"level": 1}],
    ids=str,
)
def test_every_kind_of_frame(options: dict[str, object]) -> None:
    for data in (CONTENT, CONTENT[:100], bytes(1 << 20), b""):
        assert out_of(zstd(data, **options), bundle.Compression.ZSTD) == data  # type: ignore[arg-type]


@pytest.mark.parametrize("compression", [bundle.Compression.GZIP, bundle.Compression.ZSTD])
@hypothesis.given(cut=strategies.integers(0, 2000))
@hypothesis.settings(max_examples=60, deadline=None)
def test_a_cut_blob_is_no_short_one(compression: bundle.Compression, cut: int) -> None:
    data = (
        zstd(CONTENT[:4000], write_checksum=True) if compression == "zstd" else gzip.compress(CONTENT[:4000])
    )
    with pytest.raises(errors.BadRequestError):
        out_of(data[: min(cut, len(data) - 1)], compression)


@pytest.mark.parametrize("behind", [b"x", b"\0" * 40, b"PK\x03\x04" * 10, b"\x1f\x8b"])
@pytest.mark.parametrize("compression", [bundle.Compression.GZIP, bundle.Compression.ZSTD])
def test_nothing_may_follow(compression: bundle.Compression, behind: bytes) -> None:
    with pytest.raises(errors.BadRequestError):
        out_of(COMPRESS[compression](CONTENT) + behind, compression)


@pytest.mark.parametrize("compression", [bundle.Compression.GZIP, bundle.Compression.ZSTD])
@pytest.mark.parametrize("data", [b"", b"x" * 100, SKIPPABLE])
def test_what_is_something_else_is_refused(compression: bundle.Compression, data: bytes) -> None:
    with pytest.raises(errors.BadRequestError):
        out_of(data, compression)


@pytest.mark.parametrize("compression", [bundle.Compression.GZIP, bundle.Compression.ZSTD])
def test_a_flipped_bit_is_found(compression: bundle.Compression) -> None:
    whole = SHORT[compression]
    for at in range(0, len(whole), len(whole) // 200):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        try:
            result = out_of(bytes(damaged), compression)
        except errors.BadRequestError:
            continue
        # Some bits say nothing of the content, such as gzip's time.
        assert result == CONTENT[:4000]


@pytest.mark.parametrize("compression", [bundle.Compression.GZIP, bundle.Compression.ZSTD])
def test_pieces_stay_small_whatever_comes_out(compression: bundle.Compression) -> None:
    bomb = COMPRESS[compression](bytes(32 << 20))
    assert len(bomb) < 100_000
    for piece in decompress.decompressed(io.BytesIO(bomb), compression):
        assert len(piece) <= decompress.PIECE_BYTES


@pytest.mark.parametrize("compression", bundle.Compression)
def test_a_bomb_ends_at_the_limit(
    compression: bundle.Compression, layer_of: Callable[..., bundle.Layer]
) -> None:
    layer = layer_of(COMPRESS[compression](bytes(8 << 20)), compression)
    assert len(read(layer, 8 << 20)) == 8 << 20
    with pytest.raises(errors.BadRequestError, match="come out of the layer"):
        read(layer, (8 << 20) - 1)


def test_a_large_window_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    whole = compressor.compress(CONTENT) + compressor.flush()
    with pytest.raises(errors.BadRequestError):
        out_of(whole, bundle.Compression.ZSTD)


@pytest.mark.parametrize("compression", bundle.Compression)
def test_another_content_than_announced_is_refused(
    compression: bundle.Compression, layer_of: Callable[..., bundle.Layer]
) -> None:
    layer = layer_of(COMPRESS[compression](CONTENT), compression, f"sha256:{'0' * 64}")
    with pytest.raises(errors.BadRequestError, match="and not sha256:000"):
        read(layer)


def test_an_unknown_digest_is_refused(layer_of: Callable[..., bundle.Layer]) -> None:
    with pytest.raises(errors.BadRequestError, match="unknown algorithm"):
        read(layer_of(b"x", bundle.Compression.NONE, "md5:0"))


def test_who_stops_early_leaves_no_thread(layer_of: Callable[..., bundle.Layer]) -> None:
    before = threading.active_count()
    layer = layer_of(gzip.compress(bytes(64 << 20)), bundle.Compression.GZIP)
    with decompress.opened(layer, max_bytes=PLENTY) as pieces:
        next(pieces)
    assert threading.active_count() == before
    with decompress.opened(layer, max_bytes=PLENTY):
        pass
    assert threading.active_count() == before


def test_thousands_of_tiny_members_cost_no_more_than_their_bytes() -> None:
    member = zlib.compress(b"", wbits=31)
    tiny = member * 20_000
    assert out_of(tiny + gzip.compress(b"end"), bundle.Compression.GZIP) == b"end"


EMPTY = {bundle.Compression.GZIP: gzip.compress(b""), bundle.Compression.ZSTD: SKIPPABLE}


@pytest.mark.parametrize("compression", EMPTY)
async def test_a_blob_of_which_nothing_comes_out_can_be_cancelled(
    layer_of: Callable[..., bundle.Layer], compression: bundle.Compression
) -> None:
    """To go through all of this one takes a minute."""
    layer = layer_of(EMPTY[compression] * ((64 << 20) // len(EMPTY[compression])), compression)
    before, begun, loop = set(threading.enumerate()), asyncio.Event(), asyncio.get_running_loop()

    def work() -> None:
        with decompress.opened(layer, max_bytes=PLENTY) as pieces:
            loop.call_soon_threadsafe(begun.set)
            next(pieces)

    working = asyncio.create_task(run.in_thread(work))
    await begun.wait()
    working.cancel()
    done, _ = await asyncio.wait([working], timeout=15)
    assert done
    assert working.cancelled()
    for thread in set(threading.enumerate()) - before:
        thread.join(15)  # it has said its last, and ends
        assert not thread.is_alive()
