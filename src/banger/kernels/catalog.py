# SPDX-License-Identifier: MIT
"""The kernels that ship as knowledge: where each comes from, how it is verified, how it becomes a vmlinux.

Used by the daemon (`kernel pull`, `kernel list --available`) and by the lab; unprivileged.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from banger import debian, pinned
from banger.contract import errors
from banger.kernels import elf, importer, records


class Embedded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A flat kernel image that a library carries as data. The library is read, never loaded."""

    library: pinned.PinnedFile
    symbol: str
    trailing_bytes: int
    load_address: int
    entry_address: int
    vmlinux_sha256: str


class Package(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A distribution's kernel: the package, or what the package depends on, whose name has the version."""

    suite: str
    name: str


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Exactly one of `embedded` and `package` is set."""

    name: str
    summary: str
    arch: str
    embedded: Embedded | None = None
    package: Package | None = None


class _Catalog(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kernel: tuple[Entry, ...]


def entries(arch: str) -> tuple[Entry, ...]:
    """What `kernel list --available` shows for an architecture."""
    text = importlib.resources.files(__package__).joinpath("catalog.toml").read_bytes()
    return tuple(entry for entry in msgspec.toml.decode(text, type=_Catalog).kernel if entry.arch == arch)


def find(name: str, arch: str) -> Entry:
    for entry in entries(arch):
        if entry.name == name:
            return entry
    known = ", ".join(entry.name for entry in entries(arch)) or "none"
    raise errors.NotFoundError(f"the catalog has no kernel {name!r} for {arch}", hint=f"it has: {known}")


def pull(
    kernels: records.Kernels,
    entry: Entry,
    *,
    cache_dir: Path,
    guest_binary: Path,
    local_dirs: Sequence[Path] = (),
    mirror: str = "",
    on_line: Callable[[str], None] | None = None,
) -> records.Kernel:
    """Fetches, verifies, unpacks and publishes a kernel of the catalog under its name."""
    with tempfile.TemporaryDirectory(prefix="banger-kernel-") as scratch:
        if entry.embedded is not None:
            path = Path(scratch) / records.VMLINUX
            fetched = pinned.fetch(entry.embedded.library, cache_dir, local_dirs=local_dirs, on_line=on_line)
            path.write_bytes(extract(entry.embedded, fetched.path.read_bytes()))
            source = f"catalog: {entry.embedded.library.name}, {entry.embedded.library.licence}"
        elif entry.package is not None:
            package = download(entry.package, Path(scratch), entry.arch, mirror=mirror)
            path, source = package.path, f"catalog: Debian package {package.name} {package.version}"
        else:
            raise errors.NotFoundError(f"the catalog names no source for kernel {entry.name!r}")
        return importer.import_path(kernels, path, name=entry.name, guest_binary=guest_binary, source=source)


def extract(embedded: Embedded, library: bytes) -> bytes:
    """The vmlinux around the image in the library; its sha256 is pinned too."""
    bundle = elf.parse(library).symbol(embedded.symbol)
    image = bundle[: len(bundle) - embedded.trailing_bytes]
    vmlinux = elf.wrap(image, load_address=embedded.load_address, entry_address=embedded.entry_address)
    found = hashlib.sha256(vmlinux).hexdigest()
    if found != embedded.vmlinux_sha256:
        raise errors.OperationFailedError(
            f"the kernel in {embedded.library.name} has sha256 {found}, not the pinned one"
        )
    return vmlinux


def download(package: Package, scratch: Path, arch: str, *, mirror: str = "") -> debian.Package:
    """The package itself or, for a package that only depends on the newest kernel, that kernel's package."""
    apt = debian.Apt(scratch / "apt", debian.sources(package.suite, mirror=mirror), arch)
    apt.update()
    real = [name for name in apt.depends(package.name) if name.startswith("linux-image-")]
    return apt.download(real[0] if real else package.name)
