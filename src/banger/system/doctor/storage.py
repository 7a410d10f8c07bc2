# SPDX-License-Identifier: MIT
"""Probes of disks: room, mounts that break jails, the default image and kernel, sizes and their origin."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from banger import pinned
from banger.contract import errors, resources, sizes
from banger.images import catalog
from banger.images import records as images
from banger.kernels import records as kernels
from banger.system import host
from banger.system.doctor import report
from banger.system.doctor import scene as scenes

SCARCE_BYTES: Final = 2 << 30
TOO_LITTLE_BYTES: Final = 256 << 20
SCARCE_INODES: Final = 10_000
_EXT4_MAGIC_AT: Final = 1024 + 56
_EXT4_MAGIC: Final = b"\x53\xef"
_PUBLISHED: Final = {
    "image": "banger image build debian-bookworm",
    "kernel": "banger kernel pull generic-6.12",
}


@dataclass(frozen=True, slots=True)
class Room:
    """Free bytes and inodes where something grows."""

    path: Path
    what: str

    def __call__(self, scene: scenes.Scene) -> report.Finding:
        scene.settings()
        found = os.statvfs(scene.at(self.path))
        return self.judge(found.f_bavail * found.f_frsize, found.f_favail, inodes=found.f_files)

    def judge(self, free: int, free_inodes: int, *, inodes: int) -> report.Finding:
        """Some file systems count no inodes, and have 0 of 0 free."""
        said = f"{sizes.text_of_bytes(free)} free in {self.path}, for {self.what}"
        remedy = f"free space: delete VMs and images, or put {self.path} on a larger disk"
        if free < TOO_LITTLE_BYTES:
            return report.failed(said, remedy)
        if inodes and free_inodes < SCARCE_INODES:
            return report.warned(f"{free_inodes} inodes free in {self.path}, for {self.what}", remedy)
        return report.warned(said, remedy) if free < SCARCE_BYTES else report.passed(said)


def jail_mount(scene: scenes.Scene) -> report.Finding:
    """Jails hold device nodes and a program."""
    path = scene.settings().helper_dir
    mount, options = _mount_of(scene, path)
    bad = [name for name in ("nodev", "noexec", "ro") if name in options]
    if bad:
        return report.failed(
            f"{path} lies on {mount}, which is mounted {', '.join(bad)}: no VMM can run there",
            f"sudo mount -o remount,dev,exec,rw {mount}, and the same in /etc/fstab",
        )
    return report.passed(f"{path} lies on {mount}, with devices and programs")


def _mount_of(scene: scenes.Scene, path: str) -> tuple[str, set[str]]:
    """The mount point that holds a path, and its options: the last that fits, of the longest ones."""
    best, options = "", set[str]()
    for fields in scene.mounts():
        point = fields[4].replace("\\040", " ")
        holds = path == point or path.startswith(f"{point.rstrip('/')}/")
        if holds and len(point) >= len(best):
            best, options = point, set(fields[5].split(","))
    return best, options


def image(scene: scenes.Scene) -> report.Finding:
    """The default image is here, and as large as its record says."""
    try:
        found = _default_image(scene)
    except errors.NotFoundError as error:
        name = str(scene.defaults()["image"].value)
        said, remedy = f"no image {name!r}, the default", f"banger image build {name}"
        if _comes_by_itself(scene, name):
            return report.warned(f"{said}: the first VM gets it, which takes minutes", remedy)
        return report.failed(said, f"{remedy}; {error.hint}")
    path = _images(scene).rootfs(found.id)
    remedy = f"banger image delete {found.id}, then {_PUBLISHED['image']}"
    if not path.exists():
        return report.failed(f"image {found.name} has lost {scene.shown(path)}", remedy)
    if path.stat().st_size != found.size_bytes:
        return report.failed(
            f"image {found.name} has {path.stat().st_size} bytes instead of {found.size_bytes}", remedy
        )
    with path.open("rb") as file:
        file.seek(_EXT4_MAGIC_AT)
        if file.read(len(_EXT4_MAGIC)) != _EXT4_MAGIC:
            return report.failed(f"image {found.name} holds no ext4", remedy)
    return report.passed(f"{found.name}, {sizes.text_of_bytes(found.stored_bytes)}")


def _comes_by_itself(scene: scenes.Scene, name: str) -> bool:
    """`vm run` gets what the catalog knows, where this host can build it."""
    extension = scene.at(host.CONFIG_TOML.with_name("images.toml"))
    try:
        entry = catalog.Catalog(extension).find(name, scene.viewer.machine)
    except errors.BadRequestError:
        return False
    is_recipe = isinstance(entry, catalog.RecipeEntry)
    return entry is not None and not (is_recipe and scene.program("mmdebstrap") is None)


def kernel(scene: scenes.Scene) -> report.Finding:
    """The kernel that the default image boots is here, byte for byte."""
    wanted = scene.defaults().get("kernel")
    try:
        name = str(wanted.value) if wanted is not None else _default_image(scene).kernel
    except errors.NotFoundError:
        raise scenes.UnseenError(
            "the default image names it, and is not here", "see the row image"
        ) from None
    try:
        found = _kernels(scene).find(name)
    except errors.NotFoundError:
        return report.failed(
            f"no kernel {name!r}, which the default image boots", f"banger kernel pull {name}"
        )
    remedy = f"banger kernel delete {found.id}, then banger kernel pull {name}"
    files = {"vmlinux": found.vmlinux_sha256, "initrd": found.initrd_sha256}
    for file, sha256 in files.items():
        path = _kernels(scene).path(found.id) / file
        if not sha256:
            continue
        if not path.exists():
            return report.failed(f"kernel {name} has lost {scene.shown(path)}", remedy)
        if pinned.sha256_of_path(path) != sha256:
            return report.failed(f"{scene.shown(path)} is not what was imported: another sha256", remedy)
    return report.passed(f"{name}, Linux {found.version}, {found.kind}")


def records(scene: scenes.Scene) -> report.Finding:
    """No image or kernel has a record that cannot be read: it would not be listed."""
    broken = {**_images(scene).broken(), **_kernels(scene).broken()}
    if broken:
        name, why = next(iter(broken.items()))
        return report.warned(
            f"{len(broken)} cannot be read: {why}",
            f"delete the directory {name} in {scene.settings().state_dir}/images or kernels",
        )
    return report.passed(f"{len(_images(scene).records())} images, {len(_kernels(scene).records())} kernels")


def configuration(scene: scenes.Scene) -> report.Finding:
    """config.toml is valid; what a VM gets by default, and from where."""
    try:
        values = scene.defaults()
    except errors.BadRequestError as error:
        return report.failed(error.message, error.hint)
    said = [
        f"{values['vcpus'].value} vCPUs ({values['vcpus'].source})",
        *(
            f"{sizes.text_of_mib(int(values[key].value))} {what} ({values[key].source})"
            for key, what in (("memory_mib", "memory"), ("disk_size_mib", "disk"))
        ),
    ]
    too_much = _too_much(scene, values)
    if too_much:
        return report.warned(
            too_much, f"lower it in {host.CONFIG_TOML}, then: sudo systemctl restart bangerd"
        )
    return report.passed(f"{', '.join(said)}, image {values['image'].value} ({values['image'].source})")


def _too_much(scene: scenes.Scene, values: dict[str, scenes.Effective]) -> str:
    """A size with which no VM starts here, and where it was asked for."""
    asked, together = values["memory_mib"], values.get("vms_memory_mib")
    total_mib = int(together.value) if together else _memory_mib(scene)
    if total_mib and int(asked.value) > total_mib:
        whose = "VMs have {} MiB together (vms_memory_mib)" if together else "the host has {} MiB"
        return f"memory_mib = {asked.value} ({asked.source}), and {whose.format(total_mib)}"
    cpus, has = values["vcpus"], scene.text("/proc/cpuinfo").count("processor\t:")
    if cpus.source is resources.SizeSource.CONFIG and has and int(cpus.value) > has:
        return f"vcpus = {cpus.value} ({cpus.source}), and the host has {has}"
    return ""


def _memory_mib(scene: scenes.Scene) -> int:
    for line in scene.text("/proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) // 1024
    return 0


def _default_image(scene: scenes.Scene) -> images.Image:
    return _images(scene).find(str(scene.defaults()["image"].value))


def _images(scene: scenes.Scene) -> images.Images:
    return images.Images(_readable(scene, "images"))


def _kernels(scene: scenes.Scene) -> kernels.Kernels:
    return kernels.Kernels(_readable(scene, "kernels"))


def _readable(scene: scenes.Scene, name: str) -> Path:
    """The owner's directory. Raises PermissionError for who may not look into it."""
    state = scene.at(scene.settings().state_dir)
    if not state.exists():
        raise scenes.UnseenError(f"{scene.shown(state)} does not exist", "see the row state")
    os.scandir(state).close()
    return state / name
