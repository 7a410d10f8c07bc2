# SPDX-License-Identifier: MIT
"""Recipes: what an image is made of, as data; and the root file system that mmdebstrap makes of one.

The packages come from the distribution's signed archive. mmdebstrap runs as whoever we are: as root, or
else with fakechroot, which needs neither privileges nor user namespaces. Used by the image builder.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import msgspec

from banger import debian, run
from banger.contract import errors
from banger.images import tree as trees

BUILDER_VERSION: Final = 1
_BUILD_DEADLINE_S: Final = 1800.0
# fakeroot tries the real chown first; in a user namespace (PrivateUsers=) that fails as it does not expect.
_FAKEROOT: Final = {"FAKEROOTDONTTRYCHOWN": "1"}
_SYSTEMD_UNITS: Final = "/etc/systemd/system"

Mode = Literal["root", "fakechroot"]


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str
    content: str
    mode: int = 0o644


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str
    target: str


class TreeSteps(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Edits of the unpacked system, applied in the order of these fields."""

    remove: tuple[str, ...] = ()
    file: tuple[File, ...] = ()
    link: tuple[Link, ...] = ()
    mask: tuple[str, ...] = ()

    def apply(self, tree: trees.Tree) -> None:
        for pattern in self.remove:
            for path in tree.glob(pattern):
                tree.remove(path)
        for file in self.file:
            tree.makedirs(os.path.dirname(file.path))
            tree.write(file.path, file.content.removeprefix("\n").encode(), permissions=file.mode)
        for link in self.link:
            tree.makedirs(os.path.dirname(link.path))
            tree.symlink(link.path, link.target)
        if self.mask:
            tree.makedirs(_SYSTEMD_UNITS)
        for unit in self.mask:
            tree.symlink(f"{_SYSTEMD_UNITS}/{unit}", "/dev/null")


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    summary: str
    suite: str
    variant: str
    kernel: str
    headroom_mib: int
    packages: tuple[str, ...]
    exclude_paths: tuple[str, ...] = ()
    include_paths: tuple[str, ...] = ()
    tree: TreeSteps = TreeSteps()

    def base_key(self, arch: str, mirror: str) -> str:
        """Names what mmdebstrap makes; tree steps are applied later and do not change it."""
        made_of = (BUILDER_VERSION, arch, mirror, self.suite, self.variant, self.packages)
        made_of += (self.exclude_paths, self.include_paths)  # type: ignore[assignment]
        return hashlib.sha256(msgspec.json.encode(made_of)).hexdigest()[:32]


def available() -> list[str]:
    files = importlib.resources.files(__package__).joinpath("recipes").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load(name: str) -> Recipe:
    """A recipe that ships with banger, by name."""
    if name not in available():
        raise errors.NotFoundError(
            f"there is no recipe {name!r}", hint=f"there are: {', '.join(available())}"
        )
    return parse(importlib.resources.files(__package__).joinpath("recipes", f"{name}.toml").read_bytes())


def parse(text: bytes) -> Recipe:
    try:
        return msgspec.toml.decode(text, type=Recipe)
    except msgspec.DecodeError as error:
        raise errors.BadRequestError(f"the recipe cannot be read: {error}") from error


def base_archive(
    recipe: Recipe,
    *,
    arch: str,
    cache_dir: Path,
    mirror: str = "",
    on_line: Callable[[str], None] | None = None,
) -> Path:
    """The root file system as a tar, from the cache or made now; owners in it are right whoever we are."""
    kept = cache_dir / "recipes" / f"{recipe.name}-{recipe.base_key(arch, mirror)}.tar"
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    run.require("mmdebstrap")
    sources = debian.sources(recipe.suite, mirror=mirror)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".build-") as scratch:
        made = Path(scratch) / "root.tar"
        run.run(
            [*_command(recipe, arch), recipe.suite, str(made), *sources],
            deadline_s=_BUILD_DEADLINE_S,
            env=run.environment(*debian.APT_ENVIRONMENT, TMPDIR=scratch, HOME=scratch, **_FAKEROOT),
            on_line=on_line,
        )
        made.replace(kept)
    return kept


def mode() -> Mode:
    """How this process can make a root file system; fakechroot needs no privilege at all."""
    if os.geteuid() == 0:
        return "root"
    if _has("fakechroot") and _has("fakeroot"):
        return "fakechroot"
    raise errors.MissingToolError(
        "building an image as an ordinary user needs fakechroot and fakeroot",
        hint="install the packages fakechroot and fakeroot",
    )


def _command(recipe: Recipe, arch: str) -> list[str]:
    paths = [f"--dpkgopt=path-exclude={path}" for path in recipe.exclude_paths]
    paths += [f"--dpkgopt=path-include={path}" for path in recipe.include_paths]
    return [
        "mmdebstrap",
        f"--mode={mode()}",
        f"--variant={recipe.variant}",
        f"--architectures={debian.ARCHITECTURES[arch]}",
        "--format=tar",
        f"--include={','.join(recipe.packages)}",
        *paths,
    ]


def _has(tool: str) -> bool:
    try:
        run.require(tool)
    except errors.MissingToolError:
        return False
    return True
