# SPDX-License-Identifier: MIT
"""A kernel's modules: which are needed, in which order, and the initrd that loads them."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import zstandard
from hypothesis import strategies

from banger.contract import errors
from banger.kernels import cpio, initrd, modules
from tests.unit import kernel_samples as samples

WANTED = ("virtio_mmio", "virtio_blk", "ext4", "vmw_vsock_virtio_transport", "virtio_net")
VIRTIO = "kernel/drivers/virtio"


def closure(directory: Path, wanted: tuple[str, ...] = WANTED) -> list[str]:
    return [module.name for module in modules.Tree(directory).closure(wanted, samples.VERSION)]


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    path = tmp_path / "guest"
    path.write_bytes(b"\x7fELF guest binary")
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The modules as a package holds them, without what depmod makes."""
    return samples.module_tree(tmp_path)


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


# --- order ---


@pytest.mark.parametrize("with_dep_file", [True, False])
def test_modules_come_after_what_they_need(tmp_path: Path, *, with_dep_file: bool) -> None:
    names = closure(samples.module_tree(tmp_path, with_dep_file=with_dep_file))
    for path, below in samples.MODULES.items():
        name = Path(path).stem
        assert all(names.index(each) < names.index(name) for each in below)
    assert names.index("virtio_mmio") < names.index("virtio_blk")
    assert "ext4" not in names


def test_only_what_is_asked_for_is_loaded(tree: Path) -> None:
    assert closure(tree, ("virtio_blk",)) == ["virtio_ring", "virtio", "virtio_blk"]


def test_what_is_built_in_needs_no_file(tree: Path) -> None:
    (tree / VIRTIO / "virtio_ring.ko").unlink()
    (tree / "modules.builtin").write_text("kernel/drivers/virtio/virtio-ring.ko\n")
    assert closure(tree, ("virtio_blk",)) == ["virtio", "virtio_blk"]


@pytest.mark.parametrize("with_dep_file", [True, False])
def test_a_missing_dependency_is_named(tmp_path: Path, *, with_dep_file: bool) -> None:
    directory = samples.module_tree(tmp_path)
    (directory / VIRTIO / "virtio_ring.ko").unlink()
    if with_dep_file:
        (directory / "modules.dep").write_text(
            "kernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio_ring.ko\n"
        )
    with pytest.raises(errors.BadRequestError, match=r"'virtio_ring', which '.*' depends on"):
        closure(directory, ("virtio_blk",))


def test_soft_dependencies_are_loaded_before_by_name_or_alias(tree: Path) -> None:
    """As ext4 and libcrc32c ask for `crc32c`, which is a name of an algorithm and of no module."""
    crypto = tree / "kernel/arch/x86/crypto"
    crypto.mkdir(parents=True)
    aliases = ("alias=crypto-crc32c", "alias=crc32c")
    (crypto / "crc32c-intel.ko").write_bytes(samples.module("crc32c_intel", ["crc"], aliases))
    (crypto / "sha1.ko").write_bytes(samples.module("sha1", []))
    (tree / "kernel/crc.ko").write_bytes(samples.module("crc", []))
    soft = ("softdep=pre: crc32c no_such_thing virtio_ring post: virtio_net",)
    (tree / "kernel/fs.ko").write_bytes(samples.module("fs", [], soft))
    assert closure(tree, ("fs",)) == ["crc", "crc32c_intel", "virtio_ring", "fs"]


def test_soft_dependencies_may_go_round_in_a_circle(tree: Path) -> None:
    for name, other in (("one", "two"), ("two", "one")):
        (tree / f"kernel/{name}.ko").write_bytes(samples.module(name, [], (f"softdep=pre: {other}",)))
    assert closure(tree, ("one",)) == ["two", "one"]


def test_modules_of_another_kernel_are_refused(tree: Path) -> None:
    ring = tree / VIRTIO / "virtio_ring.ko"
    ring.write_bytes(samples.module("virtio_ring", [], version="6.2.0"))
    with pytest.raises(errors.BadRequestError, match=r"'virtio_ring' is for kernel 6.2.0, not 6.1.0-9-test"):
        closure(tree)


# --- hostile trees ---


def test_a_dependency_cycle_is_refused(tree: Path) -> None:
    (tree / VIRTIO / "virtio_ring.ko").write_bytes(samples.module("virtio_ring", ["virtio"]))
    with pytest.raises(errors.BadRequestError, match="depends on itself"):
        closure(tree)


def test_a_cycle_in_modules_dep_is_refused(tree: Path) -> None:
    one, two = (f"kernel/drivers/virtio/{name}.ko" for name in ("virtio_ring", "virtio"))
    (tree / "modules.dep").write_text(f"{one}: {two}\n{two}: {one}\n")
    with pytest.raises(errors.BadRequestError, match="depends on itself"):
        closure(tree, ("virtio_ring",))


def test_a_chain_of_thousands_is_refused(tree: Path) -> None:
    for number in range(2000):
        below = [f"m{number + 1}"] if number < 1999 else []
        (tree / f"kernel/m{number}.ko").write_bytes(samples.module(f"m{number}", below))
    with pytest.raises(errors.BadRequestError, match="depends on itself"):
        closure(tree, ("m0",))


def test_more_modules_than_any_kernel_needs_are_refused(tree: Path) -> None:
    names = [f"m{number}" for number in range(modules.MAX_LOADED + 1)]
    for name in names:
        (tree / f"kernel/{name}.ko").write_bytes(samples.module(name, []))
    (tree / "kernel/all.ko").write_bytes(samples.module("all", names))
    with pytest.raises(errors.BadRequestError, match="more than 256 modules"):
        closure(tree, ("all",))


@pytest.mark.parametrize("path", ["../../../virtio_ring.ko", "/etc/virtio_ring.ko", "kernel/virtio_ring.ko"])
def test_no_list_and_no_link_leads_outside(tmp_path: Path, tree: Path, path: str) -> None:
    outside = tmp_path / "virtio_ring.ko"
    outside.write_bytes(samples.module("virtio_ring", []))
    (tree / "kernel/virtio_ring.ko").symlink_to(outside)
    (tree / "modules.dep").write_text(f"{path}:\n")
    with pytest.raises(errors.BadRequestError, match="leads out of"):
        closure(tree, ("virtio_ring",))


def test_linked_directories_are_not_walked_into(tmp_path: Path, tree: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/secret.ko").write_bytes(samples.module("secret", []))
    (tree / "kernel/more").symlink_to(tmp_path / "elsewhere")
    (tree / "kernel/round").symlink_to(tree / "kernel")
    found = modules.Tree(tree)
    assert not found.has_file("secret")
    assert found.has_file("virtio_ring")


def test_a_list_of_millions_of_lines_is_refused(tree: Path) -> None:
    (tree / "modules.dep").write_bytes(b"kernel/a.ko:\n" * (modules.MAX_LIST_BYTES // 13 + 1))
    with pytest.raises(errors.BadRequestError, match="larger than 8 MiB"):
        closure(tree)


def test_names_that_would_break_the_guest_s_list_are_no_modules(tree: Path) -> None:
    (tree / "kernel/evil\n.ko").write_bytes(samples.module("evil", []))
    (tree / "modules.dep").write_text("kernel/a b.ko:\nkernel/virtio.ko:\n")
    assert not modules.Tree(tree).has_file("a b")


@pytest.mark.parametrize("data", [b"not ELF", lzma.compress(b"not ELF"), lzma.compress(bytes(65 << 20))])
def test_a_module_that_is_none_is_refused(tree: Path, data: bytes) -> None:
    (tree / VIRTIO / "virtio_ring.ko").write_bytes(data)
    with pytest.raises(errors.BadRequestError, match="virtio_ring"):
        closure(tree)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None)
@hypothesis.given(lists=strategies.lists(strategies.binary(max_size=200), min_size=2, max_size=2))
def test_hostile_lists_are_refused_cleanly(tmp_path: Path, lists: list[bytes]) -> None:
    directory = samples.module_tree(tmp_path)
    for name, data in zip(("modules.dep", "modules.builtin"), lists, strict=True):
        (directory / name).write_bytes(data + b"\nkernel/drivers/virtio/virtio.ko:" + data)
    try:
        closure(directory, ("virtio",))
    except errors.BadRequestError:
        return


@hypothesis.given(strategies.binary(max_size=300))
def test_a_hostile_module_s_own_words_are_taken_or_left(data: bytes) -> None:
    info = modules.Info.of(b"\x7fELF\0depends=" + data + b"\0softdep=pre:" + data + b"\0")
    assert all(" " not in name for name in info.before)


# --- initrd ---


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("xz", lzma.compress), ("zst", zstandard.ZstdCompressor().compress), ("gz", gzip.compress)],
)
def test_initrd_holds_modules_in_order_and_the_guest_as_init(
    tree: Path, guest: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    """Unpacked, whatever a distribution packs them in: the guest hands plain ELF to the kernel."""
    packed = tree / VIRTIO / "virtio.ko"
    packed.with_name(f"virtio.ko.{suffix}").write_bytes(pack(packed.read_bytes()))
    packed.unlink()
    load = modules.Tree(tree).closure(WANTED, samples.VERSION)
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
