# SPDX-License-Identifier: MIT
"""Kernel files: whatever they are packed in, what is booted is found; what cannot be loaded is refused."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import zstandard
from hypothesis import strategies

from banger import run
from banger.contract import errors
from banger.kernels import build_config, elf, inspect, payload
from tests.unit import kernel_samples as samples

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "zstd": lambda data: zstandard.ZstdCompressor(write_content_size=False).compress(data),
    "lz4": samples.lz4_frame,
}
PACKED = samples.bzimage(gzip.compress(samples.vmlinux()), len(samples.vmlinux()))
SEGMENT = 64
"""Where the program header of a sample begins."""


def boot_image(data: bytes) -> bytes:
    return b"".join(inspect.boot_image(data, 1 << 24))


def patched(data: bytes, offset: int, layout: str, *values: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(layout, changed, offset, *values)
    return bytes(changed)


# --- compression ---


@pytest.mark.parametrize("name", PACKERS)
def test_every_compression(name: str) -> None:
    data = os.urandom(3000) + bytes(9 << 20) + b"abcdefgh" * 5000
    assert payload.decompress(PACKERS[name](data)) == data


@pytest.mark.parametrize("name", PACKERS)
def test_bombs_and_stumps_are_refused(name: str) -> None:
    packed = PACKERS[name](bytes(1 << 20) + os.urandom(4000))
    with pytest.raises(errors.BadRequestError, match="more than"):
        payload.decompress(packed, limit_bytes=1 << 18)
    if name != "lz4":  # its legacy frame has no end mark
        with pytest.raises(errors.BadRequestError, match="damaged"):
            payload.decompress(packed[: len(packed) // 2])


@pytest.mark.parametrize("name", PACKERS)
def test_no_piece_is_large_whatever_was_packed(name: str) -> None:
    """The bound on memory: a gigabyte of zeros is a few kilobytes in most of these."""
    packed = PACKERS[name](bytes(40 << 20))
    assert max(len(piece) for piece in payload.chunks(packed)) <= 8 << 20


def test_xz_that_asks_for_gigabytes_of_memory_is_refused() -> None:
    small = lzma.compress(b"x" * 4096, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}])
    # The dictionary's size is one byte of the block header; its check sum is made to match.
    block = bytearray(small[12 : 12 + (small[12] + 1) * 4])
    block[block.index(16, 2)] = 36
    block[-4:] = struct.pack("<I", zlib.crc32(bytes(block[:-4])))
    with pytest.raises(errors.BadRequestError, match="emory"):
        payload.decompress(small[:12] + bytes(block) + small[12 + len(block) :])


@pytest.mark.parametrize(("head", "said"), [(b"\x89LZO....", "LZO"), (b"hello", "68656c6c")])
def test_unknown_compression_is_named(head: bytes, said: str) -> None:
    with pytest.raises(errors.BadRequestError, match=said):
        payload.decompress(head)


@hypothesis.given(strategies.sampled_from(sorted(PACKERS)), strategies.data())
def test_damaged_compressed_data_is_refused_cleanly(name: str, data: strategies.DataObject) -> None:
    packed = bytearray(PACKERS[name](b"kernel" * 200))
    for _ in range(data.draw(strategies.integers(1, 4))):
        packed[data.draw(strategies.integers(0, len(packed) - 1))] = data.draw(strategies.integers(0, 255))
    with contextlib.suppress(errors.BadRequestError):
        assert len(payload.decompress(bytes(packed), limit_bytes=1 << 20)) <= 1 << 20


# --- what is packed in what ---


@pytest.mark.parametrize("name", PACKERS)
def test_vmlinuz_gives_the_elf_inside(name: str) -> None:
    found = boot_image(samples.bzimage(PACKERS[name](samples.vmlinux()), len(samples.vmlinux())))
    assert found == samples.vmlinux()
    assert inspect.look(found) == inspect.Kernel("x86_64", samples.VERSION, 0x1000000 + len(found) - 4096)


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("wrap", [bytes, samples.zboot])
def test_arm64_images_are_found_in_what_they_come_in(name: str, wrap: Callable[[bytes], bytes]) -> None:
    found = boot_image(wrap(PACKERS[name](samples.arm64_image())))
    assert found == samples.arm64_image()
    kernel = inspect.look(found)
    assert (kernel.machine, kernel.version) == ("aarch64", samples.VERSION)
    assert kernel.end > len(found)


@pytest.mark.parametrize("data", [samples.vmlinux(), samples.arm64_image()])
def test_what_is_not_packed_is_taken_as_it_is(data: bytes) -> None:
    assert boot_image(data) == data


CANNOT_BE_LOADED = {
    "nothing": (b"", "neither"),
    "text": (b"hello", "neither"),
    "a program for EFI": (b"MZ" + bytes(1000), "EFI program"),
    "a stump of an ELF file": (b"\x7fELF", "not a 64-bit"),
    "a 32-bit kernel": (patched(samples.vmlinux(), 4, "B", 1), "32-bit"),
    "a big-endian kernel": (patched(samples.vmlinux(), 5, "B", 2), "big-endian"),
    "another machine's kernel": (patched(samples.vmlinux(), 18, "<H", 243), "ELF machine 243"),
    "an ELF for arm64": (patched(samples.vmlinux(), 18, "<H", 183), "flat Image"),
    "a module": (patched(samples.vmlinux(), 16, "<H", 1), "kernel module"),
    "a core dump": (patched(samples.vmlinux(), 16, "<H", 4), "nothing to load"),
    "no program header": (patched(samples.vmlinux(), 56, "<H", 0), "nothing to load"),
    "program headers outside": (patched(samples.vmlinux(), 32, "<Q", 1 << 60), "outside the file"),
    "65,535 program headers": (patched(samples.vmlinux(1 << 22), 56, "<H", 65535), "segments|outside|after"),
    "sections outside": (patched(samples.vmlinux(), 58, "<HH", 64, 9000), "outside the file"),
    "a segment that ends after the file": (
        patched(samples.vmlinux(), SEGMENT + 32, "<QQ", 1 << 62, 1 << 62),
        "cut",
    ),
    "less memory than bytes": (patched(samples.vmlinux(), SEGMENT + 40, "<Q", 16), "in memory"),
    "an absurd amount of memory": (
        patched(samples.vmlinux(), SEGMENT + 40, "<Q", 1 << 62),
        "belongs at physical address",
    ),
    "a segment at address 0": (
        patched(samples.vmlinux(), SEGMENT + 24, "<Q", 0),
        "belongs at physical address",
    ),
    "an entry point elsewhere": (patched(samples.vmlinux(), 24, "<Q", 0xFFFFFFFF81000000), "entry point"),
    "no version": (elf.wrap(bytes(99), load_address=1 << 24, entry_address=1 << 24), "no Linux version"),
    "a program": (Path("/bin/true").resolve().read_bytes(), "not a kernel"),
    "a vmlinuz cut short": (PACKED[:-20], "cut short"),
    "a vmlinuz of its header alone": (PACKED[:0x240], "cut short"),
    "a payload offset that lies": (patched(PACKED, 0x248, "<I", 0xFFFFFFF0), "cut short"),
    "a payload length that lies": (patched(PACKED, 0x24C, "<I", 0xFFFFFFF0), "cut short"),
    "a payload of nothing": (patched(PACKED, 0x24C, "<I", 0), "cut short"),
    "a payload elsewhere in the file": (patched(PACKED, 0x248, "<I", 0x80), "cut short|compression"),
    "a promised size too small": (PACKED[:-4] + struct.pack("<I", 99), "more than 99"),
    "a promised size too large": (PACKED[:-4] + struct.pack("<I", 1 << 23), "promises 8388608"),
    "an old boot protocol": (patched(PACKED, 0x206, "<H", 0x0204), "too old"),
    "a 32-bit vmlinuz": (patched(PACKED, 0x236, "<H", 0), "32-bit"),
    "a vmlinuz of something else": (samples.bzimage(gzip.compress(b"x" * 99), 99), "no kernel"),
    "gzip of gzip": (gzip.compress(gzip.compress(samples.vmlinux())), "no kernel"),
    "an EFI image cut short": (samples.zboot(gzip.compress(samples.arm64_image()))[:-9], "cut short"),
    "an EFI image of its header alone": (samples.zboot(b"")[:20], "cut short"),
    "a big-endian arm64 image": (patched(samples.arm64_image(), 24, "<Q", 1), "big-endian"),
    "an arm64 image of no size": (patched(samples.arm64_image(), 16, "<Q", 0), "cannot be"),
    "an arm64 image of every size": (patched(samples.arm64_image(), 16, "<Q", 1 << 60), "cannot be"),
}


@pytest.mark.parametrize("name", CANNOT_BE_LOADED)
def test_what_cannot_be_loaded_is_refused_with_the_reason(name: str) -> None:
    data, said = CANNOT_BE_LOADED[name]
    with pytest.raises(errors.BadRequestError, match=said):
        inspect.look(boot_image(data))


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    strategies.sampled_from(
        [samples.vmlinux(100), samples.arm64_image(100), PACKED, samples.zboot(b"\x1f\x8b")]
    ),
    strategies.integers(0, 700),
    strategies.binary(max_size=80),
    strategies.integers(0, 3000),
)
def test_hostile_kernel_files_are_refused_cleanly(sample: bytes, at: int, patch: bytes, cut: int) -> None:
    data = bytearray(sample)
    data[at : at + len(patch)] = patch
    for hostile in (bytes(data), bytes(data[:cut]), patch):
        try:
            inspect.look(boot_image(hostile))
        except errors.BadRequestError:
            continue


# --- ELF ---


def test_wrapped_image_reads_back() -> None:
    parsed = elf.parse(elf.wrap(b"x" * 100, load_address=0x1000000, entry_address=0x1000010))
    (segment,) = parsed.segments
    assert (parsed.machine, parsed.entry) == ("x86_64", 0x1000010)
    assert (segment.physical, segment.size, segment.offset) == (0x1000000, 100, 0x1000)
    assert elf.loaded_end(parsed) == 0x1000000 + 100


def test_entry_outside_the_image_is_refused() -> None:
    with pytest.raises(errors.BadRequestError):
        elf.wrap(b"x" * 16, load_address=0x1000000, entry_address=0x1000010)


def test_symbol_of_a_real_library(tmp_path: Path) -> None:
    source = tmp_path / "lib.c"
    source.write_text('const char KERNEL[] __attribute__((aligned(4096))) = "the kernel";\n')
    run.run(["gcc", "-shared", "-o", str(tmp_path / "lib.so"), str(source)], deadline_s=30)
    parsed = elf.parse((tmp_path / "lib.so").read_bytes())
    assert parsed.symbol("KERNEL") == b"the kernel\0"
    with pytest.raises(errors.BadRequestError, match="no symbol"):
        parsed.symbol("MISSING")


def test_debugging_information_is_dropped_and_the_rest_stays(tmp_path: Path) -> None:
    """A linked file with symbols: what is loaded is the same before and after."""
    source, target = tmp_path / "k.c", tmp_path / "vmlinux"
    source.write_text(
        f'const char banner[] = "Linux version {samples.VERSION} x";\nvoid _start(void) {{}}\n'
    )
    link = ["-nostdlib", "-static", "-g", "-Wl,-Ttext=0x1000000,--build-id=none"]
    run.run(["gcc", *link, "-o", str(target), str(source)], deadline_s=30)
    before = target.read_bytes()
    elf.strip(target)
    after = target.read_bytes()
    old, new = elf.parse(before), elf.parse(after)
    assert len(after) < len(before)
    assert (new.sections, new.segments, new.entry) == ((), old.segments, old.entry)
    for segment in old.segments:
        assert after[segment.offset :][: segment.size][64:] == before[segment.offset :][: segment.size][64:]
    elf.strip(target)
    assert target.read_bytes() == after


@hypothesis.given(
    strategies.binary(max_size=200), strategies.integers(0, 200), strategies.binary(max_size=80)
)
def test_hostile_elf_is_refused_cleanly(head: bytes, position: int, patch: bytes) -> None:
    sample = bytearray(samples.vmlinux(100))
    sample[position : position + len(patch)] = patch
    for data in (head, b"\x7fELF\x02\x01" + head, bytes(sample)):
        try:
            elf.parse(data).symbol("KERNEL")
        except errors.BadRequestError:
            continue


# --- build configuration ---


def test_build_configuration_is_read_from_the_image() -> None:
    packed = gzip.compress(b"CONFIG_EXT4_FS=y\nCONFIG_VIRTIO_BLK=m\n# CONFIG_LZ4 is not set\n")
    found = build_config.embedded(samples.vmlinux() + b"IKCFG_ST" + packed + b"IKCFG_ED")
    assert found == {"EXT4_FS": "y", "VIRTIO_BLK": "m"}
    assert build_config.embedded(samples.vmlinux()) is None


@pytest.mark.parametrize(
    "packed",
    [
        b"\x1f\x8bnothing",
        gzip.compress(bytes(64 << 20)),
        gzip.compress(b"no option\n"),
        gzip.compress(b"x")[:-6],
    ],
    ids=["damaged", "bomb", "empty", "cut"],
)
def test_an_embedded_configuration_that_is_none_is_not_believed(packed: bytes) -> None:
    assert build_config.embedded(samples.vmlinux() + b"IKCFG_ST" + packed) is None


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config").write_bytes(b"\xff\xfe\0hello\n")
    with pytest.raises(errors.BadRequestError, match="no kernel configuration"):
        build_config.read(tmp_path / "config")
