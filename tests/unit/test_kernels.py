# SPDX-License-Identifier: MIT
"""Kernels: read as data, unpacked, given an initrd, published whole."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import struct
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import zstandard
from hypothesis import strategies

from banger import run
from banger.contract import errors
from banger.kernels import catalog, cpio, elf, importer, initrd, inspect, lz4, modules, payload, records
from tests.unit import kernel_samples as samples

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "zstd": lambda data: zstandard.ZstdCompressor(write_content_size=False).compress(data),
    "lz4": samples.lz4_frame,
}


@pytest.fixture
def kernels(tmp_path: Path) -> records.Kernels:
    return records.Kernels(tmp_path / "kernels")


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    path = tmp_path / "guest"
    path.write_bytes(b"\x7fELF guest binary")
    return path


def unpack_cpio(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Reads a newc archive by the kernel's own description of it."""
    found: dict[str, tuple[int, bytes]] = {}
    position = 0
    while True:
        assert data[position : position + 6] == b"070701"
        numbers = [int(data[position + 6 + 8 * i : position + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = numbers[1], numbers[6], numbers[11]
        start = position + 110
        name = data[start : start + name_size - 1].decode()
        assert data[start + name_size - 1] == 0
        content = -(-(start + name_size) // 4) * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, data[content : content + size])
        position = -(-(content + size) // 4) * 4


# --- ELF ---


def test_wrapped_image_reads_back() -> None:
    parsed = elf.parse(elf.wrap(b"x" * 100, load_address=0x1000000, entry_address=0x1000010))
    (segment,) = parsed.segments
    assert (parsed.machine, parsed.entry) == ("x86_64", 0x1000010)
    assert (segment.physical, segment.size, segment.offset) == (0x1000000, 100, 0x1000)


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


# --- compression ---


@pytest.mark.parametrize("name", PACKERS)
def test_every_compression(name: str) -> None:
    data = os.urandom(3000) + bytes(100_000) + b"abcdefgh" * 5000
    assert payload.decompress(PACKERS[name](data)) == data


@pytest.mark.parametrize("name", PACKERS)
def test_bombs_and_stumps_are_refused(name: str) -> None:
    packed = PACKERS[name](bytes(1 << 20) + os.urandom(4000))
    with pytest.raises(errors.BadRequestError):
        payload.decompress(packed, limit_bytes=1 << 18)
    if name != "lz4":  # its legacy frame has no end mark
        with pytest.raises(errors.BadRequestError):
            payload.decompress(packed[: len(packed) // 2])


def test_unknown_compression_is_named() -> None:
    with pytest.raises(errors.BadRequestError, match="894c5a4f"):
        payload.decompress(b"\x89LZO....")


@hypothesis.given(
    strategies.lists(strategies.binary(max_size=40) | strategies.sampled_from([b"a" * 300, b"ab" * 200])),
    strategies.integers(16, 500),
)
def test_lz4_round_trip(pieces: list[bytes], block_bytes: int) -> None:
    data = b"".join(pieces)
    assert lz4.decompress(samples.lz4_frame(data, block_bytes), limit_bytes=1 << 20) == data


@hypothesis.given(strategies.binary(max_size=100))
def test_hostile_lz4_is_refused_cleanly(data: bytes) -> None:
    try:
        unpacked = lz4.decompress(lz4.MAGIC + struct.pack("<I", len(data)) + data, limit_bytes=10_000)
    except errors.BadRequestError:
        return
    assert len(unpacked) <= 10_000 + len(data)


# --- inspection ---


@pytest.mark.parametrize("name", PACKERS)
def test_vmlinuz_gives_the_elf_inside(name: str) -> None:
    found = inspect.inspect(samples.bzimage(PACKERS[name](samples.vmlinux())))
    assert found.vmlinux == samples.vmlinux()
    assert (found.version, found.machine) == (samples.VERSION, "x86_64")


def test_vmlinux_is_taken_as_it_is() -> None:
    assert inspect.inspect(samples.vmlinux()).vmlinux == samples.vmlinux()


@pytest.mark.parametrize("data", [b"", b"hello", b"\x7fELF", samples.bzimage(b"")[:-10]])
def test_what_is_no_kernel_is_refused(data: bytes) -> None:
    with pytest.raises(errors.BadRequestError):
        inspect.inspect(data)


def test_a_program_is_no_kernel() -> None:
    with pytest.raises(errors.BadRequestError, match="not a kernel"):
        inspect.inspect(Path("/bin/true").resolve().read_bytes())


def test_a_cut_vmlinuz_is_refused() -> None:
    whole = samples.bzimage(gzip.compress(samples.vmlinux()))
    with pytest.raises(errors.BadRequestError, match="cut short"):
        inspect.inspect(whole[:-20])


def test_build_configuration_is_read() -> None:
    config = gzip.compress(b"CONFIG_EXT4_FS=y\nCONFIG_VIRTIO_BLK=m\n# CONFIG_LZ4 is not set\n")
    data = samples.vmlinux() + b"IKCFG_ST" + config + b"IKCFG_ED"
    found = inspect.inspect(data)
    assert (found.builds_in("CONFIG_EXT4_FS"), found.builds_in("CONFIG_VIRTIO_BLK")) == (True, False)
    assert inspect.inspect(samples.vmlinux()).builds_in("CONFIG_EXT4_FS") is None


# --- modules and initrd ---


@pytest.mark.parametrize("with_dep_file", [True, False])
def test_modules_come_after_what_they_need(tmp_path: Path, *, with_dep_file: bool) -> None:
    found = modules.closure(samples.module_tree(tmp_path, with_dep_file=with_dep_file))
    names = [module.name for module in found]
    for path, below in samples.MODULES.items():
        name = Path(path).stem
        assert all(names.index(each) < names.index(name) for each in below)
    assert names.index("virtio_mmio") < names.index("virtio_blk")
    assert "ext4" not in names


def test_a_missing_module_is_named(tmp_path: Path) -> None:
    directory = samples.module_tree(tmp_path)
    (directory / "kernel/drivers/block/virtio_blk.ko").unlink()
    with pytest.raises(errors.BadRequestError, match="virtio_blk"):
        modules.closure(directory)


def test_a_dependency_cycle_is_refused(tmp_path: Path) -> None:
    directory = samples.module_tree(tmp_path)
    (directory / "kernel/drivers/virtio/virtio_ring.ko").write_bytes(
        samples.module("virtio_ring", ["virtio"])
    )
    with pytest.raises(errors.BadRequestError, match="depends on itself"):
        modules.closure(directory)


def test_modules_dep_cannot_point_outside(tmp_path: Path) -> None:
    directory = samples.module_tree(tmp_path)
    (tmp_path / "virtio_ring.ko").write_bytes(b"\x7fELF")
    (directory / "modules.dep").write_text("../../../virtio_ring.ko:\n")
    with pytest.raises(errors.BadRequestError, match="outside"):
        modules.closure(directory)


def test_initrd_holds_modules_in_order_and_the_guest_as_init(tmp_path: Path, guest: Path) -> None:
    directory = samples.module_tree(tmp_path)
    packed = directory / "kernel/drivers/virtio/virtio.ko"
    packed.with_name("virtio.ko.xz").write_bytes(lzma.compress(packed.read_bytes()))
    packed.unlink()
    load = modules.closure(directory)
    data = initrd.build(guest, load)
    files = unpack_cpio(gzip.decompress(data))
    listed = files["banger-modules"][1].decode().splitlines()
    assert listed == [f"/modules/{module.name}.ko" for module in load]
    assert all(files[path.lstrip("/")][1].startswith(b"\x7fELF") for path in listed)
    assert files["init"] == (0o100755, guest.read_bytes())
    assert files["dev/console"][0] == 0o020600
    assert data == initrd.build(guest, load)


@hypothesis.given(
    strategies.dictionaries(
        strategies.text(strategies.characters(min_codepoint=48, max_codepoint=122), min_size=1, max_size=30),
        strategies.binary(max_size=50),
        max_size=8,
    )
)
def test_cpio_reads_back(files: dict[str, bytes]) -> None:
    entries = [cpio.Entry.file(name, data) for name, data in files.items()]
    archive = cpio.pack(entries)
    assert len(archive) % 512 == 0
    assert unpack_cpio(archive) == {name: (0o100644, data) for name, data in files.items()}


@pytest.mark.parametrize("path", ["", "/etc", "a\0b"])
def test_cpio_refuses_bad_paths(path: str) -> None:
    with pytest.raises(ValueError, match="not a path"):
        cpio.pack([cpio.Entry.file(path, b"")])


# --- import ---


def make_package(root: Path) -> Path:
    """A real .deb, as a distribution's kernel comes."""
    samples.module_tree(root / "pkg")
    (root / "pkg/boot").mkdir()
    (root / f"pkg/boot/vmlinuz-{samples.VERSION}").write_bytes(
        samples.bzimage(gzip.compress(samples.vmlinux()))
    )
    (root / "pkg/boot/System.map").write_text("ignored")
    (root / "pkg/DEBIAN").mkdir()
    (root / "pkg/DEBIAN/control").write_text(
        "Package: linux-image-test\nVersion: 1\nArchitecture: amd64\n"
        "Maintainer: n <n@example.org>\nDescription: x\n"
    )
    run.run(["dpkg-deb", "--build", "-Zxz", str(root / "pkg"), str(root / "k.deb")], deadline_s=30)
    return root / "k.deb"


def test_a_package_becomes_a_kernel_with_initrd(
    tmp_path: Path, kernels: records.Kernels, guest: Path
) -> None:
    made = importer.import_path(kernels, make_package(tmp_path), name="debian-test", guest_binary=guest)
    assert (made.kind, made.version, made.arch) == ("initrd", samples.VERSION, "x86_64")
    assert kernels.vmlinux(made.id).read_bytes() == samples.vmlinux()
    ready = kernels.initrd(made.id)
    assert ready is not None
    assert hashlib.sha256(ready.read_bytes()).hexdigest() == made.initrd_sha256
    assert made.guest_sha256 == hashlib.sha256(guest.read_bytes()).hexdigest()
    assert kernels.find("debian-test") == kernels.find(made.id) == made


def test_a_vmlinux_boots_directly(tmp_path: Path, kernels: records.Kernels, guest: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(samples.vmlinux())
    made = importer.import_path(kernels, tmp_path / "vmlinux", name="mine", guest_binary=guest)
    assert (made.kind, made.modules, kernels.initrd(made.id)) == ("direct", (), None)


def test_a_published_kernel_can_be_imported_elsewhere(
    tmp_path: Path, kernels: records.Kernels, guest: Path
) -> None:
    first = importer.import_path(kernels, make_package(tmp_path), name="debian-test", guest_binary=guest)
    elsewhere = records.Kernels(tmp_path / "elsewhere")
    moved = importer.import_path(elsewhere, kernels.path(first.id), name="moved", guest_binary=guest)
    assert (moved.kind, moved.initrd_sha256) == ("initrd", first.initrd_sha256)
    assert (moved.guest_sha256, moved.modules, moved.source) == (
        first.guest_sha256,
        first.modules,
        first.source,
    )
    assert moved.id != first.id


@pytest.mark.parametrize("name", ["Has-Upper", "", "-x", "a/b", "x" * 64])
def test_bad_names_are_refused(tmp_path: Path, kernels: records.Kernels, guest: Path, name: str) -> None:
    (tmp_path / "vmlinux").write_bytes(samples.vmlinux())
    with pytest.raises(errors.BadRequestError):
        importer.import_path(kernels, tmp_path / "vmlinux", name=name, guest_binary=guest)
    assert kernels.records() == []


def test_a_failed_import_leaves_nothing(tmp_path: Path, kernels: records.Kernels, guest: Path) -> None:
    package = make_package(tmp_path)
    guest.unlink()
    with pytest.raises(FileNotFoundError):
        importer.import_path(kernels, package, name="debian-test", guest_binary=guest)
    assert list((tmp_path / "kernels").iterdir()) == []


@pytest.mark.parametrize("files", [[], ["vmlinux", "vmlinuz"]])
def test_a_directory_must_hold_one_kernel(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).write_bytes(samples.vmlinux())
    with pytest.raises(errors.BadRequestError):
        importer.find_parts(tmp_path)


# --- catalog ---


def test_the_catalog_offers_both_kinds() -> None:
    entries = {entry.name: entry for entry in catalog.entries("x86_64")}
    assert set(entries) == {"generic-6.12", "debian-6.1"}
    for entry in entries.values():
        assert (entry.embedded is None) != (entry.package is None)
    assert catalog.entries("riscv64") == ()


def test_an_unknown_kernel_names_the_known() -> None:
    with pytest.raises(errors.NotFoundError) as caught:
        catalog.find("nope", "x86_64")
    assert "generic-6.12" in caught.value.hint


def test_a_library_with_another_kernel_is_refused(tmp_path: Path) -> None:
    embedded = catalog.find("generic-6.12", "x86_64").embedded
    assert embedded is not None
    source = tmp_path / "lib.c"
    source.write_text("char KERNEL_BUNDLE[0x2000] = {1};\n")
    run.run(["gcc", "-shared", "-o", str(tmp_path / "lib.so"), str(source)], deadline_s=30)
    with pytest.raises(errors.OperationFailedError, match="not the pinned"):
        catalog.extract(embedded, (tmp_path / "lib.so").read_bytes())
