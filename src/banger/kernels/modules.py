# SPDX-License-Identifier: MIT
"""Which module files a guest kernel needs to reach its root disk, in the order they must be loaded.

Reads a `lib/modules/<version>` directory: as depmod left it, or straight out of a package, when the modules'
own words about what they depend on are read instead. Used by the initrd builder.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Final

from banger.contract import errors
from banger.kernels import payload

# The order matters where modules.dep knows no dependency: the bus before the drivers on it.
NEEDED: Final[tuple[str, ...]] = (
    "virtio_ring",
    "virtio",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "ext4",
    "vmw_vsock_virtio_transport",
)
OPTIONAL: Final[tuple[str, ...]] = ("overlay",)
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
_SUFFIX = re.compile(r"\.ko(\.(xz|zst|gz))?$")


@dataclasses.dataclass(frozen=True, slots=True)
class Module:
    name: str
    path: Path

    def read(self) -> bytes:
        """The module itself, unpacked: the guest's loader takes plain ELF."""
        data = self.path.read_bytes()
        return data if data.startswith(b"\x7fELF") else payload.decompress(data)


def module_name(path: str) -> str:
    return _SUFFIX.sub("", path.rsplit("/", 1)[-1]).replace("-", "_")


def closure(
    directory: Path, needed: Sequence[str] = NEEDED, optional: Sequence[str] = OPTIONAL
) -> list[Module]:
    """The modules and all they depend on, each after its dependencies. Built-in ones need no file."""
    index = _read_dep_file(directory) or _index_files(directory)
    builtin = {module_name(line) for line in _lines(directory / "modules.builtin")}
    ordered: dict[str, Module] = {}
    for name in needed:
        if name in index:
            _visit(name, index, builtin, ordered, ())
        elif name not in builtin:
            raise errors.BadRequestError(
                f"the kernel has no module {name!r}, neither built in nor as a file in {directory.name}",
                hint="import a kernel that is built for virtual machines",
            )
    for name in optional:
        if name in index:
            _visit(name, index, builtin, ordered, ())
    return list(ordered.values())


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """A module file; `below` is None when only the module itself can tell what it depends on."""

    module: Module
    below: tuple[str, ...] | None

    def dependencies(self) -> tuple[str, ...]:
        return self.below if self.below is not None else _own_word(self.module.read())


def _visit(
    name: str,
    index: Mapping[str, _Entry],
    builtin: Set[str],
    ordered: dict[str, Module],
    above: tuple[str, ...],
) -> None:
    if name in ordered or (name in builtin and name not in index):
        return
    if name in above or name not in index:
        raise errors.BadRequestError(f"module {name!r} is missing or depends on itself")
    for each in index[name].dependencies():
        _visit(each, index, builtin, ordered, (*above, name))
    ordered[name] = index[name].module


def _read_dep_file(directory: Path) -> dict[str, _Entry]:
    """From modules.dep, which names for each file those it needs, the deepest last."""
    index: dict[str, _Entry] = {}
    for line in _lines(directory / "modules.dep"):
        path, _, below = line.partition(":")
        name = module_name(path)
        names = tuple(module_name(each) for each in reversed(below.split()))
        index[name] = _Entry(Module(name, _inside(directory, path)), names)
    return index


def _index_files(directory: Path) -> dict[str, _Entry]:
    index: dict[str, _Entry] = {}
    for path in sorted((directory / "kernel").rglob("*.ko*")):
        if _SUFFIX.search(path.name) and not path.is_symlink():
            index[module_name(path.name)] = _Entry(Module(module_name(path.name), path), None)
    return index


def _own_word(module: bytes) -> tuple[str, ...]:
    """The `depends=` line of a module's .modinfo section."""
    match = _DEPENDS.search(module)
    listed = match[1].decode(errors="replace") if match else ""
    return tuple(module_name(each) for each in listed.split(",") if each)


def _lines(path: Path) -> Iterator[str]:
    return iter(path.read_text().splitlines()) if path.exists() else iter(())


def _inside(directory: Path, relative: str) -> Path:
    path = (directory / relative).resolve()
    if not path.is_relative_to(directory.resolve()):
        raise errors.BadRequestError(f"modules.dep names a file outside its directory: {relative}")
    return path
