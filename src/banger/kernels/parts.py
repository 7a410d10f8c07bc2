# SPDX-License-Identifier: MIT
"""Where the parts of a kernel are: in a directory, in packages, or beside a file. Used by the importer.

Looks where distributions, a kernel's own build and banger itself put things. Links are followed only where
they stay inside: a directory made by somebody else must not name a file of ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from banger import artefacts
from banger.contract import errors
from banger.kernels import deb, files, records

MAX_PACKAGES: Final = 16
_IMAGES: Final = (
    "vmlinux",
    "vmlinuz",
    "bzImage",
    "Image",
    "vmlinu[xz]-*",
    "boot/vmlinu[xz]-*",
    "arch/x86/boot/bzImage",
    "arch/arm64/boot/Image",
)
_CONFIGS: Final = ("config", ".config", "config-*", "boot/config-*")
_TREES: Final = ("lib/modules/*", "usr/lib/modules/*", "modules")


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """What was found; only the image is always there."""

    image: Path
    config: Path | None = None
    modules: Path | None = None
    initrd: Path | None = None
    record: Path | None = None


def find(path: Path, scratch: Path) -> Parts:
    """Packages are unpacked below `scratch`. Raises NotFoundError or BadRequestError."""
    if _is_directory(path):
        packages = sorted(path.glob("*.deb"))
        return _in_packages(packages, path, scratch) if packages else _in_directory(path)
    if files.head(path, len(deb.MAGIC)) == deb.MAGIC:
        return _in_packages([path], path, scratch)
    return _beside(path)


def _is_directory(path: Path) -> bool:
    try:
        path.stat()
        return path.is_dir()
    except (FileNotFoundError, NotADirectoryError):
        raise errors.NotFoundError(f"there is no file {path}", hint=artefacts.unseen(path)) from None
    except (OSError, ValueError) as error:
        raise errors.BadRequestError(
            f"cannot read {path}: {error}", hint="the daemon's owner must be able to read it"
        ) from error


def _in_packages(packages: Sequence[Path], said: Path, scratch: Path) -> Parts:
    """Several together: some distributions put image and modules into a package each."""
    if len(packages) > MAX_PACKAGES:
        raise errors.BadRequestError(f"{said} holds more than {MAX_PACKAGES} packages")
    for package in packages:
        deb.extract_kernel(package, scratch)
    if not scratch.exists() or not any(scratch.glob("boot/vmlinu[xz]-*")):
        raise errors.BadRequestError(
            f"{said.name} holds no kernel",
            hint="a package may only depend on another that holds it: import linux-image-VERSION",
        )
    return _in_directory(scratch)


def _in_directory(directory: Path) -> Parts:
    image = _only(directory, "kernel", _found(directory, _IMAGES))
    if image is None:
        raise errors.BadRequestError(
            f"{directory} holds no kernel", hint="it should have vmlinux, vmlinuz or boot/vmlinuz-VERSION"
        )
    version = _version(image)
    configs = [path for path in _found(directory, _CONFIGS) if path.is_file()]
    trees = [path for path in _found(directory, _TREES) if _is_tree(path)]
    initrd = next((path for path in _found(directory, ("initrd",)) if path.is_file()), None)
    record = next(_found(directory, (records.RECORD,)), None)
    return Parts(
        image,
        config=_only(directory, "configuration", _of_version(configs, version)),
        modules=_only(directory, "set of modules", _of_version(trees, version)),
        initrd=initrd,
        record=record,
    )


def _beside(image: Path) -> Parts:
    """`/boot/vmlinuz-VERSION` of a host: its configuration and modules are where the name says."""
    version = _version(image)
    if not version:
        return Parts(image)
    config = image.parent / f"config-{version}"
    roots = (image.parent.parent / top / version for top in ("lib/modules", "usr/lib/modules"))
    try:
        trees = [root for root in roots if image.parent.name == "boot" and _is_tree(root)]
    except PermissionError as error:  # systemd hides them from a daemon: ProtectKernelModules=
        raise errors.BadRequestError(
            f"cannot read the modules of {image}: {error.filename}: {error.strerror}",
            hint=f"copy both: `{_copied(image, version)}`, then import ~/host",
        ) from error
    return Parts(image, config if config.is_file() else None, trees[0] if trees else None)


def _copied(image: Path, version: str) -> str:
    """What a user types to have a host's kernel where the daemon sees all of it."""
    boot, modules = image.parent, image.parent.parent / "lib/modules" / version
    return (
        f"mkdir -p ~/host/boot ~/host/lib/modules && cp {boot}/*-{version} ~/host/boot && "
        f"cp -r {modules} ~/host/lib/modules"
    )


def _found(directory: Path, patterns: Iterable[str]) -> Iterator[Path]:
    """Each once, whatever links lead to it."""
    seen: set[Path] = set()
    for pattern in patterns:
        for path in sorted(directory.glob(pattern)):
            real = files.inside(directory, path.relative_to(directory))
            if real not in seen and real.exists():
                seen.add(real)
                yield real


def _version(image: Path) -> str:
    kind, _, version = image.name.partition("-")
    return version if kind in ("vmlinuz", "vmlinux") else ""


def _is_tree(path: Path) -> bool:
    return (path / "kernel").is_dir() or (path / "modules.dep").is_file()


def _of_version(paths: list[Path], version: str) -> list[Path]:
    named = [path for path in paths if version and path.name.removeprefix("config-") == version]
    return named or paths


def _only(directory: Path, what: str, found: Iterable[Path]) -> Path | None:
    paths = list(found)
    if len(paths) > 1:
        names = ", ".join(str(path) for path in paths[:8])
        raise errors.BadRequestError(
            f"{directory} holds more than one {what}: {names}", hint="name one kernel's file or directory"
        )
    return paths[0] if paths else None
