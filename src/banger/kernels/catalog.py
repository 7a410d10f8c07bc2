# SPDX-License-Identifier: MIT
"""The kernels that can be pulled: where each comes from, how it is verified, how it becomes one that boots.

Those that ship with banger are in `catalog.toml`; a host may have its own in a directory of such files; they
go before ours of the same name. Used by the daemon and by the lab; unprivileged.
"""

from __future__ import annotations

import hashlib
import importlib.resources
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec

from banger import artefacts, pinned, toml_file
from banger.contract import errors, given_names
from banger.kernels import records

if TYPE_CHECKING:
    from banger import debian

Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
# They become part of a line of apt's source list, and an argument.
Suite = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9-]{0,30}$(?!\n)")]
PackageName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9+.-]{1,126}$(?!\n)")]
_MIB: Final = 1 << 20


class Library(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="library"):
    """A flat kernel image that a library carries as data. The library is read, never loaded."""

    library: pinned.PinnedFile
    symbol: str
    trailing_bytes: int
    load_address: int
    entry_address: int
    vmlinux_sha256: Sha256


class Package(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="package"):
    """A distribution's kernel: the package, or what the package depends on, whose name has the version."""

    suite: Suite
    package: PackageName


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="file"):
    """Whatever `kernel import` takes as a file, pinned."""

    version: str
    sha256: Sha256
    size_bytes: Annotated[int, msgspec.Meta(ge=1)]
    sources: Annotated[tuple[pinned.Source, ...], msgspec.Meta(min_length=1)]
    licence: str = ""

    def __post_init__(self) -> None:
        for source in self.sources:
            if isinstance(source, pinned.Url) and not source.url.startswith("https://"):
                raise ValueError(f"{source.url!r} is not an https address")
            if isinstance(source, pinned.LocalFile) and not source.path.startswith("/"):
                raise ValueError(f"{source.path!r} is not an absolute path")


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: Annotated[str, msgspec.Meta(pattern=given_names.ARTEFACT_NAME_PATTERN)]
    summary: str
    arch: Literal["x86_64", "aarch64"]
    source: Library | Package | File


class _Catalog(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kernel: tuple[Entry, ...]


def entries(arch: str, directory: Path | None = None) -> tuple[Entry, ...]:
    """What `kernel list --available` shows for an architecture: the host's own first, then ours."""
    own: dict[str, Entry] = {}
    for path in sorted(directory.glob("*.toml")) if directory is not None else ():
        for entry in _of_arch(_read(path), arch, str(path)):
            if entry.name in own:
                raise errors.BadRequestError(
                    f"{path}: kernel.name: {entry.name!r} is in another file of {directory} already",
                    hint="give one of the two another name",
                )
            own[entry.name] = entry
    text = importlib.resources.files(__package__).joinpath("catalog.toml").read_text()
    shipped = _of_arch(toml_file.parse(text, _Catalog, what="catalog.toml", hint=""), arch, "catalog.toml")
    return (*own.values(), *(entry for entry in shipped if entry.name not in own))


def _read(path: Path) -> _Catalog:
    hint = "correct the file, or take it away"
    try:
        return toml_file.read(path, _Catalog, hint=hint)
    except OSError as error:
        raise errors.BadRequestError(f"{path}: cannot be read: {error.strerror}", hint=hint) from error


def _of_arch(catalog: _Catalog, arch: str, what: str) -> list[Entry]:
    found = [entry for entry in catalog.kernel if entry.arch == arch]
    twice = {entry.name for entry in found if sum(each.name == entry.name for each in found) > 1}
    if twice:
        raise errors.BadRequestError(f"{what}: kernel.name: {', '.join(sorted(twice))} is there twice")
    return found


def find(name: str, arch: str, directory: Path | None = None) -> Entry:
    known = entries(arch, directory)
    for entry in known:
        if entry.name == name:
            return entry
    listed = ", ".join(entry.name for entry in known) or "none"
    raise errors.NotFoundError(f"the catalog has no kernel {name!r} for {arch}", hint=f"it has: {listed}")


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
    from banger.kernels import importer

    with artefacts.scratch_directory(cache_dir) as scratch:
        match entry.source:
            case Library(library=library):
                fetched = pinned.fetch(library, cache_dir, local_dirs=local_dirs, on_line=on_line)
                path = scratch / records.VMLINUX
                path.write_bytes(extract(entry.source, fetched.path.read_bytes()))
                source = f"catalog: {library.name}, {library.licence}"
            case Package():
                package = download(entry.source, scratch, entry.arch, mirror=mirror, on_line=on_line)
                path, source = package.path, f"catalog: Debian package {package.name} {package.version}"
            case File():
                file = _pinned(entry, entry.source)
                path = pinned.fetch(file, cache_dir, local_dirs=local_dirs, on_line=on_line).path
                source = " ".join(f"catalog: {entry.name} {file.version} {file.licence}".split())
        return importer.import_path(
            kernels,
            path,
            name=entry.name,
            guest_binary=guest_binary,
            source=source,
            arch=entry.arch,
            on_line=on_line,
        )


def _pinned(entry: Entry, file: File) -> pinned.PinnedFile:
    return pinned.PinnedFile(
        name=entry.name,
        version=file.version,
        arch=entry.arch,
        sha256=file.sha256,
        size_bytes=file.size_bytes,
        licence=file.licence,
        sources=file.sources,
    )


def extract(embedded: Library, library: bytes) -> bytes:
    """The vmlinux around the image in the library; its sha256 is pinned too."""
    from banger.kernels import elf

    bundle = elf.parse(library).symbol(embedded.symbol)
    image = bundle[: len(bundle) - embedded.trailing_bytes]
    vmlinux = elf.wrap(image, load_address=embedded.load_address, entry_address=embedded.entry_address)
    found = hashlib.sha256(vmlinux).hexdigest()
    if found != embedded.vmlinux_sha256:
        raise errors.OperationFailedError(
            f"the kernel in {embedded.library.name} has sha256 {found}, not the pinned one"
        )
    return vmlinux


def download(
    package: Package,
    scratch: Path,
    arch: str,
    *,
    mirror: str = "",
    on_line: Callable[[str], None] | None = None,
) -> debian.Package:
    """The package itself or, for a package that only depends on the newest kernel, that kernel's package."""
    from banger import debian

    say = on_line or _silent
    say(f"reading the archive's index of {package.suite}")
    apt = debian.Apt(scratch / "apt", debian.sources(package.suite, mirror=mirror), arch)
    apt.update()
    real = [name for name in apt.depends(package.package) if name.startswith("linux-image-")]
    wanted = apt.listed(real[0] if real else package.package)
    say(f"downloading {wanted.name} {wanted.version} ({wanted.size_bytes // _MIB} MiB)")
    return apt.download(wanted.name)


def _silent(_: str) -> None:
    pass
