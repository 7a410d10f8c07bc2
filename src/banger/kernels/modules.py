# SPDX-License-Identifier: MIT
"""Which module files a guest kernel needs to reach its root disk, in the order they must be loaded.

Reads a `lib/modules/<version>` directory, which may be hostile: as depmod left it, or straight out of a
package, when the modules' own words about what they depend on are read instead. Used by the importer.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from banger import run
from banger.contract import errors
from banger.kernels import files, payload

MAX_LIST_BYTES: Final = 8 << 20
MAX_MODULE_BYTES: Final = 64 << 20
MAX_FILES: Final = 50_000
MAX_LOADED: Final = 256
MAX_LOADED_BYTES: Final = 256 << 20
_MAX_DEPTH: Final = 64
_SUFFIX = re.compile(r"\.ko(\.(xz|zst|gz))?$")
_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")
_INFO = re.compile(rb"(?<![ -~])(depends|softdep|alias|vermagic)=([ -~]*)\0")
_PRE = re.compile(r"pre:(.*?)(?:post:|$)")


@dataclasses.dataclass(frozen=True, slots=True)
class Module:
    """`path` is what a list says, and is followed only to where it stays in the directory."""

    name: str
    directory: Path
    path: str

    def read(self) -> bytes:
        """The module itself, unpacked: the guest's loader takes plain ELF."""
        data = files.read(files.inside(self.directory, self.path), MAX_MODULE_BYTES)
        if data.startswith(b"\x7fELF"):
            return data
        try:
            data = payload.decompress(data, limit_bytes=MAX_MODULE_BYTES)
        except errors.BadRequestError as error:
            raise errors.BadRequestError(f"module {self.name}: {error.message}") from error
        if not data.startswith(b"\x7fELF"):
            raise errors.BadRequestError(f"module {self.name} is not an ELF file")
        return data


@dataclasses.dataclass(frozen=True, slots=True)
class Info:
    """What a module says of itself."""

    depends: tuple[str, ...]
    before: tuple[str, ...]
    """Soft dependencies: names or aliases of what should be loaded first, if there is such a thing."""
    aliases: tuple[str, ...]
    version: str
    """The kernel's that it was built for; empty when it does not say."""

    @classmethod
    def of(cls, data: bytes) -> Info:
        said: dict[bytes, list[str]] = {}
        for match in _INFO.finditer(data):
            said.setdefault(match[1], []).append(match[2].decode())
        depends = ",".join(said.get(b"depends", ())).split(",")
        before = [
            name for line in said.get(b"softdep", ()) for part in _PRE.findall(line) for name in part.split()
        ]
        version = " ".join(said.get(b"vermagic", ())).split()
        return cls(
            tuple(module_name(each) for each in depends if each),
            tuple(module_name(each) for each in before),
            tuple(said.get(b"alias", ())),
            version[0] if version else "",
        )


def module_name(path: str) -> str:
    return _SUFFIX.sub("", path.rsplit("/", 1)[-1]).replace("-", "_")


class Tree:
    """The modules of one kernel."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._infos: dict[str, Info] = {}

    def has_file(self, name: str) -> bool:
        return name in self._index

    @functools.cached_property
    def builtin(self) -> frozenset[str]:
        return frozenset(module_name(line) for line in self._lines("modules.builtin"))

    def closure(self, wanted: Sequence[str], version: str) -> list[Module]:
        """The modules and all they depend on, each after its dependencies. Built-in ones need no file."""
        ordered: dict[str, Module] = {}
        for name in wanted:
            self._visit(name, version, ordered, ())
        return list(ordered.values())

    def _visit(self, name: str, version: str, ordered: dict[str, Module], above: tuple[str, ...]) -> None:
        if name in ordered or (name in self.builtin and name not in self._index):
            return
        if name in above or len(above) > _MAX_DEPTH:
            raise errors.BadRequestError(f"module {name!r} depends on itself")
        if name not in self._index:
            needed_by = f", which {above[-1]!r} depends on" if above else ""
            raise errors.BadRequestError(
                f"there is no module {name!r}{needed_by}: it is neither built in nor a file of this kernel",
                hint="import a kernel that is built for virtual machines",
            )
        info = self._info(name)
        if info.version not in ("", version):
            raise errors.BadRequestError(
                f"module {name!r} is for kernel {info.version}, not {version}",
                hint="import the modules that were built with the kernel",
            )
        for soft in self._soft(info, (*above, name)):
            self._visit(soft, version, ordered, (*above, name))
        for each in self._listed_below.get(name, info.depends):
            self._visit(each, version, ordered, (*above, name))
        if len(ordered) >= MAX_LOADED:
            raise errors.BadRequestError(
                f"the kernel needs more than {MAX_LOADED} modules to reach its disk"
            )
        ordered[name] = self._index[name]

    def _soft(self, info: Info, above: tuple[str, ...]) -> Iterator[str]:
        """They may go round in a circle or name what does not exist."""
        for name in info.before:
            found = [name] if name in self._index else self._by_alias(name)
            yield from (each for each in found if each not in above)

    def _by_alias(self, alias: str) -> list[str]:
        """Aliases that soft dependencies use are those of algorithms, such as ext4's `crc32c`."""
        if alias in self.builtin:
            return []
        return [name for name in self._algorithms if self._has_alias(name, alias)]

    def _has_alias(self, name: str, alias: str) -> bool:
        return any(module_name(each) == alias for each in self._info(name).aliases)

    @functools.cached_property
    def _algorithms(self) -> list[str]:
        return [name for name, module in self._index.items() if "crypto" in module.path.split("/")[:-1]]

    def _info(self, name: str) -> Info:
        if name not in self._infos:
            self._infos[name] = Info.of(self._index[name].read())
        return self._infos[name]

    @functools.cached_property
    def _index(self) -> dict[str, Module]:
        listed = [line.partition(":")[0] for line in self._lines("modules.dep")]
        modules = (self._module(path) for path in listed or self._found())
        return {module.name: module for module in modules if _NAME.fullmatch(module.name)}

    @functools.cached_property
    def _listed_below(self) -> dict[str, tuple[str, ...]]:
        """From modules.dep, which names for each file those it needs, the deepest last."""
        rows = (line.partition(":") for line in self._lines("modules.dep"))
        return {
            module_name(path): tuple(module_name(each) for each in reversed(below.split()))
            for path, _, below in rows
        }

    def _module(self, relative: str) -> Module:
        return Module(module_name(relative), self._directory, relative)

    def _found(self) -> Iterator[str]:
        top = files.inside(self._directory, "kernel")
        for count, path in enumerate(top.rglob("*.ko*")):
            run.check_cancelled()
            if count > MAX_FILES:
                raise errors.BadRequestError(f"{self._directory} holds more than {MAX_FILES} modules")
            if _SUFFIX.search(path.name) and not path.is_symlink():
                yield f"kernel/{path.relative_to(top)}"

    def _lines(self, name: str) -> Iterator[str]:
        path = files.inside(self._directory, name)
        if not path.exists():
            return iter(())
        return iter(files.read(path, MAX_LIST_BYTES).decode(errors="replace").splitlines())
