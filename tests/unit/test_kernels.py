# SPDX-License-Identifier: MIT
"""Kernels imported: from wherever they are, checked whether they can boot, published whole or not at all."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from banger import run
from banger.contract import errors
from banger.kernels import importer, records
from tests.unit import kernel_samples as samples

PACKED = samples.bzimage(gzip.compress(samples.vmlinux()), len(samples.vmlinux()))
Import = Callable[..., records.Kernel]


@pytest.fixture
def kernels(tmp_path: Path) -> records.Kernels:
    return records.Kernels(tmp_path / "kernels")


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    path = tmp_path / "guest"
    path.write_bytes(b"\x7fELF guest binary")
    return path


@pytest.fixture
def import_(kernels: records.Kernels, guest: Path) -> Import:
    """Imports under the name `mine` for an x86_64 host."""

    def work(path: Path, arch: str = "x86_64") -> records.Kernel:
        return importer.import_path(kernels, path, name="mine", guest_binary=guest, arch=arch)

    return work


@pytest.fixture
def refused(import_: Import, tmp_path: Path) -> Callable[..., str]:
    """Imports what must be refused, and leaves nothing; what was said, with the hint."""

    def work(path: Path, arch: str = "x86_64") -> str:
        with pytest.raises(errors.BadRequestError) as caught:
            import_(path, arch)
        assert list((tmp_path / "kernels").iterdir()) == []
        return f"{caught.value.message} | {caught.value.hint}"

    return work


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory as a distribution's package unpacks: drivers are modules, a configuration says so."""
    top = tmp_path / "tree"
    samples.module_tree(top)
    (top / "boot").mkdir()
    (top / f"boot/vmlinuz-{samples.VERSION}").write_bytes(bare())
    (top / f"boot/config-{samples.VERSION}").write_bytes(samples.config())
    return top


def bare() -> bytes:
    """A vmlinuz whose drivers are not built in."""
    image = samples.vmlinux(names=samples.WITHOUT_DRIVERS + b"\0ext4\0")
    return samples.bzimage(gzip.compress(image), len(image))


def make_package(top: Path, target: Path, compression: str = "xz") -> Path:
    """A real .deb, as a distribution's kernel comes."""
    shutil.copytree(top, target / "pkg")
    (target / "pkg/boot/System.map").write_text("ignored")
    (target / "pkg/DEBIAN").mkdir()
    (target / "pkg/DEBIAN/control").write_text(
        "Package: linux-image-test\nVersion: 1\nArchitecture: amd64\n"
        "Maintainer: n <n@example.org>\nDescription: x\n"
    )
    run.run(
        ["dpkg-deb", "--build", f"-Z{compression}", str(target / "pkg"), str(target / "k.deb")],
        deadline_s=30,
    )
    return target / "k.deb"


# --- from wherever it is ---


def test_a_vmlinux_boots_directly(tmp_path: Path, kernels: records.Kernels, import_: Import) -> None:
    (tmp_path / "vmlinux").write_bytes(samples.vmlinux())
    made = import_(tmp_path / "vmlinux")
    assert (made.kind, made.modules, kernels.initrd(made.id)) == ("direct", (), None)
    assert (made.checked_by, made.lacks, made.loaded_end > 0x1000000) == ("names in the image", (), True)
    assert "proc" in made.unknown
    assert {path.name for path in kernels.path(made.id).iterdir()} == {"vmlinux", "kernel.json"}


@pytest.mark.parametrize("compression", ["xz", "zstd", "gzip", "none"])
def test_a_package_becomes_a_kernel_with_initrd(
    tmp_path: Path, tree: Path, kernels: records.Kernels, import_: Import, guest: Path, compression: str
) -> None:
    made = import_(make_package(tree, tmp_path, compression))
    assert (made.kind, made.version, made.arch) == ("initrd", samples.VERSION, "x86_64")
    assert (made.checked_by, made.lacks, made.unknown) == ("config file", ("overlay",), ())
    ready = kernels.initrd(made.id)
    assert ready is not None
    assert hashlib.sha256(ready.read_bytes()).hexdigest() == made.initrd_sha256
    assert made.guest_sha256 == hashlib.sha256(guest.read_bytes()).hexdigest()
    assert kernels.find("mine") == kernels.find(made.id) == made


def test_image_and_modules_may_be_in_two_packages_and_below_usr(
    tmp_path: Path, tree: Path, import_: Import
) -> None:
    both = tmp_path / "both"
    both.mkdir()
    (tree / "usr").mkdir()
    (tree / "lib").rename(tree / "usr/lib")
    for name, other in (("boot", "usr"), ("usr", "boot")):
        part = tmp_path / name
        shutil.copytree(tree, part / "tree")
        shutil.rmtree(part / "tree" / other)
        (part / "tree/boot").mkdir(exist_ok=True)
        shutil.move(make_package(part / "tree", part), both / f"{name}.deb")
    assert import_(both).kind == "initrd"


def test_a_host_s_own_kernel_is_imported_with_what_lies_beside_it(tree: Path, import_: Import) -> None:
    made = import_(tree / f"boot/vmlinuz-{samples.VERSION}")
    assert (made.kind, made.checked_by) == ("initrd", "config file")


def test_a_directory_with_usual_links_is_one_kernel(tree: Path, import_: Import) -> None:
    (tree / "vmlinuz").symlink_to(f"boot/vmlinuz-{samples.VERSION}")
    (tree / "usr").mkdir()
    (tree / "lib").rename(tree / "usr/lib")
    (tree / "lib").symlink_to("usr/lib")
    (tree / f"lib/modules/{samples.VERSION}/build").symlink_to("/usr/src/none")
    assert import_(tree).kind == "initrd"


def test_an_initrd_that_came_with_the_kernel_is_taken_and_its_content_unknown(
    tmp_path: Path, kernels: records.Kernels, import_: Import
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/vmlinuz").write_bytes(bare())
    (tmp_path / "own/initrd").write_bytes(b"an initrd")
    made = import_(tmp_path / "own")
    ready = kernels.initrd(made.id)
    assert ready is not None
    assert ready.read_bytes() == b"an initrd"
    assert {"virtio_mmio", "virtio_blk", "network"} <= set(made.unknown)


def test_an_arm64_image_is_for_arm64_hosts(tmp_path: Path, import_: Import) -> None:
    (tmp_path / "Image.gz").write_bytes(gzip.compress(samples.arm64_image()))
    made = import_(tmp_path / "Image.gz", "aarch64")
    assert (made.arch, made.kind, made.vmlinux_bytes) == ("aarch64", "direct", len(samples.arm64_image()))


def test_a_published_kernel_can_be_imported_elsewhere(
    tmp_path: Path, tree: Path, kernels: records.Kernels, import_: Import, guest: Path
) -> None:
    first = import_(tree)
    elsewhere = records.Kernels(tmp_path / "elsewhere")
    moved = importer.import_path(
        elsewhere, kernels.path(first.id), name="moved", guest_binary=guest, arch="x86_64"
    )
    changed = {name for name in first.__struct_fields__ if getattr(first, name) != getattr(moved, name)}
    assert changed == {"id", "name", "created_at", "source"}
    ready = elsewhere.initrd(moved.id)
    assert ready is not None
    assert hashlib.sha256(ready.read_bytes()).hexdigest() == first.initrd_sha256


def test_a_record_that_is_of_other_files_is_not_believed(
    tmp_path: Path, tree: Path, kernels: records.Kernels, import_: Import, guest: Path
) -> None:
    first = kernels.path(import_(tree).id)
    said = json.loads((first / records.RECORD).read_bytes())
    (first / records.RECORD).write_text(
        json.dumps({**said, "initrd_sha256": "0" * 64, "lacks": ["everything"]})
    )
    elsewhere = records.Kernels(tmp_path / "elsewhere")
    moved = importer.import_path(elsewhere, first, name="moved", guest_binary=guest, arch="x86_64")
    assert (moved.checked_by, moved.modules) == ("names in the image", ())
    assert "everything" not in moved.lacks


def test_a_record_is_believed_nothing_that_can_be_seen_or_is_of_elsewhere(
    tmp_path: Path, tree: Path, kernels: records.Kernels, import_: Import, guest: Path
) -> None:
    """Whoever made the directory wrote it."""
    first = import_(tree)
    path = kernels.path(first.id)
    said = json.loads((path / records.RECORD).read_bytes())
    lies = {"source": "catalog: Debian package linux-image-6.1", "version": "9.9", "loaded_end": 1}
    (path / records.RECORD).write_text(json.dumps({**said, **lies, "vmlinux_bytes": 1, "initrd_bytes": 1}))
    elsewhere = records.Kernels(tmp_path / "elsewhere")
    moved = importer.import_path(elsewhere, path, name="moved", guest_binary=guest, arch="x86_64")
    assert moved.checked_by == first.checked_by
    assert moved.source == f"imported from {path}"
    for field in ("version", "loaded_end", "vmlinux_bytes", "initrd_bytes"):
        assert getattr(moved, field) == getattr(first, field), field


# --- what cannot boot ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("EXT4_FS=n", "without ext4 (CONFIG_EXT4_FS)"),
        ("VIRTIO_MMIO=n", "without virtio_mmio (CONFIG_VIRTIO_MMIO)"),
        ("VIRTIO_BLK=n", "without virtio_blk"),
        ("VIRTIO_VSOCKETS=n", "without vmw_vsock_virtio_transport (CONFIG_VIRTIO_VSOCKETS)"),
        (
            "ACPI=n",
            "without ACPI or virtio_mmio.device= (CONFIG_ACPI or CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES)",
        ),
        ("DEVTMPFS=n", "without devtmpfs"),
        ("64BIT=n", "without 64-bit"),
        ("BLK_DEV_INITRD=n", "without initrd (CONFIG_BLK_DEV_INITRD)"),
        ("RD_GZIP=n", "without gzip initrd"),
        ("EXT4_FS=n UNIX=n PROC_FS=n", "without ext4 (CONFIG_EXT4_FS), proc (CONFIG_PROC_FS), unix sockets"),
        ("EXT4_FS=m", "ext4: built as modules, which did not come with it"),
    ],
)
def test_a_kernel_that_cannot_boot_is_refused_with_every_reason(
    tree: Path, refused: Callable[..., str], changes: str, said: str
) -> None:
    (tree / f"boot/config-{samples.VERSION}").write_bytes(samples.config(changes))
    assert said in refused(tree)


def test_devices_on_the_command_line_do_instead_of_acpi(tree: Path, import_: Import) -> None:
    config = tree / f"boot/config-{samples.VERSION}"
    config.write_bytes(samples.config("ACPI=n VIRTIO_MMIO_CMDLINE_DEVICES=y"))
    assert import_(tree).kind == "initrd"


def test_what_a_guest_will_not_have_is_told(tree: Path, import_: Import) -> None:
    config = tree / f"boot/config-{samples.VERSION}"
    config.write_bytes(samples.config("VIRTIO_NET=n SERIAL_8250_CONSOLE=n"))
    assert import_(tree).lacks == ("network", "overlay", "serial console")


def test_the_configuration_in_the_image_is_believed_before_the_one_beside_it(
    tree: Path, refused: Callable[..., str]
) -> None:
    carried = b"IKCFG_ST" + gzip.compress(samples.config("EXT4_FS=n"))
    image = samples.vmlinux(names=samples.NAMES + carried)
    (tree / f"boot/vmlinuz-{samples.VERSION}").write_bytes(samples.bzimage(gzip.compress(image), len(image)))
    assert "without ext4" in refused(tree)


def test_without_a_configuration_the_lists_of_modules_tell(
    tree: Path, import_: Import, refused: Callable[..., str]
) -> None:
    (tree / f"boot/config-{samples.VERSION}").unlink()
    (tree / f"lib/modules/{samples.VERSION}/kernel/drivers/block/virtio_blk.ko").unlink()
    assert "it is built without virtio_blk |" in refused(tree)
    samples.module_tree(tree)
    made = import_(tree)
    assert (made.kind, made.checked_by, "network" in made.lacks) == ("initrd", "module lists", False)


def test_drivers_that_did_not_come_with_the_kernel_are_named(
    tree: Path, refused: Callable[..., str]
) -> None:
    shutil.rmtree(tree / "lib")
    said = refused(tree)
    assert "virtio_mmio, virtio_blk, vmw_vsock_virtio_transport: built as modules" in said
    assert "lib/modules/VERSION" in said
    (tree / f"boot/config-{samples.VERSION}").unlink()
    assert "without virtio_mmio, virtio_blk, vmw_vsock_virtio_transport |" in refused(tree)


@pytest.mark.parametrize(
    ("name", "data", "arch", "said"),
    [
        ("Image", samples.arm64_image(), "x86_64", "it is for aarch64, and this host is x86_64"),
        ("vmlinux", samples.vmlinux(), "aarch64", "it is for x86_64, and this host is aarch64"),
        ("vmlinuz", PACKED[:-100], "x86_64", "cut short"),
        ("vmlinux", b"", "x86_64", "neither"),
    ],
)
def test_what_this_host_cannot_boot_is_refused(
    tmp_path: Path, refused: Callable[..., str], name: str, data: bytes, arch: str, said: str
) -> None:
    (tmp_path / name).write_bytes(data)
    assert said in refused(tmp_path / name, arch)


# --- bad input ---


@pytest.mark.parametrize("name", ["Has-Upper", "", "-x", "a/b", "x" * 64])
def test_bad_names_are_refused(tmp_path: Path, kernels: records.Kernels, guest: Path, name: str) -> None:
    (tmp_path / "vmlinux").write_bytes(samples.vmlinux())
    with pytest.raises(errors.BadRequestError):
        importer.import_path(kernels, tmp_path / "vmlinux", name=name, guest_binary=guest)
    assert kernels.records() == []


def test_a_failed_import_leaves_nothing(tmp_path: Path, tree: Path, import_: Import, guest: Path) -> None:
    guest.unlink()
    with pytest.raises(FileNotFoundError):
        import_(make_package(tree, tmp_path))
    assert list((tmp_path / "kernels").iterdir()) == []


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, import_: Import) -> None:
    (tmp_path / "vmlinux").write_bytes(samples.vmlinux(4 << 20))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(errors.NoSpaceError, match="no space left for kernel"):
            import_(tmp_path / "vmlinux")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "kernels").iterdir()) == []


@pytest.mark.parametrize("files", [[], ["vmlinux", "vmlinuz"], ["boot/vmlinuz-1", "boot/vmlinuz-2"]])
def test_a_directory_must_hold_one_kernel(
    tmp_path: Path, refused: Callable[..., str], files: list[str]
) -> None:
    (tmp_path / "own/boot").mkdir(parents=True)
    for name in files:
        (tmp_path / "own" / name).write_bytes(samples.vmlinux())
    assert ("more than one kernel" if files else "holds no kernel") in refused(tmp_path / "own")


@pytest.mark.parametrize("name", ["vmlinux", "initrd", "config", "modules", "kernel.json"])
def test_no_link_of_a_directory_leads_to_a_file_of_ours(
    tmp_path: Path, refused: Callable[..., str], name: str
) -> None:
    """A directory from elsewhere would carry the owner's files into the guest that it boots."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "own").mkdir()
    if name != "vmlinux":
        (tmp_path / "own/vmlinux").write_bytes(samples.vmlinux())
    (tmp_path / "own" / name).symlink_to(tmp_path / "secret")
    assert "leads out of" in refused(tmp_path / "own")


def test_links_in_a_circle_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/vmlinux").symlink_to("vmlinuz")
    (tmp_path / "own/vmlinuz").symlink_to("vmlinux")
    assert "own" in refused(tmp_path / "own")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path, refused: Callable[..., str]) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "is not a file" in refused(tmp_path / "fifo")
    assert "is not a file" in refused(Path("/dev/zero"))


def test_a_kernel_that_is_root_s_to_read_says_what_to_do(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ubuntu has its own in /boot; root, whose tests these may be, reads all."""
    opened = os.open
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(samples.vmlinux())

    def not_permitted(path: Path, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == kernel:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opened(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", not_permitted)
    said = refused(kernel)
    assert "Permission denied" in said
    assert "chmod a+r" in said


def test_a_host_s_own_kernel_whose_modules_are_hidden_says_what_to_do(
    tree: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its unit hides them from the daemon, by ProtectKernelModules=; root would read them."""
    status, hidden = os.stat, tree / "lib/modules" / samples.VERSION

    def not_permitted(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if hidden in Path(path).parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return status(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(os, "stat", not_permitted)
    said = refused(tree / f"boot/vmlinuz-{samples.VERSION}")
    assert f"cannot read the modules of {tree}/boot/vmlinuz-{samples.VERSION}" in said
    assert f"cp -r {hidden} ~/host/lib/modules`, then import ~/host" in said


@pytest.mark.parametrize(
    ("path", "hint"),
    [("/var/tmp/no-kernel", "does not see"), ("/tmp/no/kernel", "does not see"), ("/no", "daemon")],
)
def test_what_is_not_there_is_not_found(import_: Import, path: str, hint: str) -> None:
    with pytest.raises(errors.NotFoundError, match="there is no file") as caught:
        import_(Path(path))
    assert hint in caught.value.hint
