# SPDX-License-Identifier: MIT
"""Recipes: what an image is made of, as data; and the root file system of its packages, which is kept.

Who makes that is the caller's to say: here, in this process, or in a unit of its own, as a uid that owns
nothing. Used by the image builder.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import os
import re
import stat
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from banger import artefacts
from banger.contract import building, decoding, errors, given_names, requests
from banger.images import base

if TYPE_CHECKING:
    from banger.images import edit

BUILDER_VERSION: Final = 2
_OS_RELEASE: Final = b"usr/lib/os-release"
_MAX_OS_RELEASE_BYTES: Final = 1 << 16
_CODENAME: Final = re.compile(rb"^VERSION_CODENAME=\"?([a-z]+)\"?$", re.MULTILINE)
_MOVING_SUITES: Final = ("oldoldstable", "oldstable", "stable", "testing", "unstable", "sid", "experimental")
"""Names that mean another codename each few years."""
_CHUNK: Final = 1 << 20
_MAX_NAME_BYTES: Final = 255
_SYSTEMD_UNITS: Final = "/etc/systemd/system"
_KEPT: Final = "recipes"
_ARCHIVE: Final = ".tar"
_EXTENDS: Final = "extends"
_MORE_PACKAGES: Final = "more_packages"
_TREE: Final = "tree"

Name = Annotated[str, msgspec.Meta(pattern=given_names.ARTEFACT_NAME_PATTERN)]
Line = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f]{0,200}$(?!\n)")]
Unit = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9@:_.-]{1,200}\.[a-z]+$(?!\n)")]
OnHost = Annotated[str, msgspec.Meta(pattern=r"^(~/|/)[^\x00]{1,4000}$(?!\n)")]
"""Absolute, or in the owner's home."""
# In the image; `..` is refused where they are used.
InImage = Annotated[str, msgspec.Meta(pattern=r"^/[^\x00]{1,4000}$(?!\n)")]
Permissions = Annotated[int, msgspec.Meta(ge=0, le=0o7777)]


class Directory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: InImage
    mode: Permissions = 0o755


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """With a text of the recipe's, or with what a file of this host holds when the image is built."""

    path: InImage
    content: str | None = None
    mode: Permissions = 0o644
    source: OnHost | None = None

    def __post_init__(self) -> None:
        if (self.content is None) == (self.source is None):
            raise ValueError(f"{self.path} wants `content` or `source`, one of them")

    def check_source(self) -> None:
        """Raises BadRequestError for a source that cannot be taken, before a build takes minutes.

        It may be on a file system that does not answer.
        """
        if self.source is not None:
            os.close(_open(self.source))

    def pieces(self) -> Iterator[bytes]:
        if self.source is None:
            yield (self.content or "").removeprefix("\n").encode()
            return
        with open(_open(self.source), "rb") as file:
            while piece := file.read(_CHUNK):
                yield piece


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: InImage
    target: Annotated[str, msgspec.Meta(pattern=r"^[^\x00]{1,4000}$(?!\n)")]


class Links(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Many links in one directory to one target, as a program with many names has them."""

    directory: InImage
    target: Annotated[str, msgspec.Meta(pattern=r"^[^\x00]{1,4000}$(?!\n)")]
    names: tuple[Annotated[str, msgspec.Meta(pattern=r"^[^\x00/]{1,255}$(?!\n)")], ...]


class TreeSteps(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Edits of the unpacked system, applied in the order of these fields."""

    remove: tuple[InImage, ...] = ()
    directory: tuple[Directory, ...] = ()
    file: tuple[File, ...] = ()
    link: tuple[Link, ...] = ()
    links: tuple[Links, ...] = ()
    mask: tuple[Unit, ...] = ()

    def __post_init__(self) -> None:
        """What the edits would refuse is said before a build takes minutes."""
        made = [directory.path for directory in self.directory]
        made += [file.path for file in self.file] + [link.path for link in self.link]
        made += [f"{many.directory}/{name}" for many in self.links for name in many.names]
        for path in (*self.remove, *made):
            parts = [part for part in path.split("/") if part]
            too_long = any(len(os.fsencode(part)) > _MAX_NAME_BYTES for part in parts)
            if not parts or parts[-1] == "." or ".." in parts or too_long:
                raise ValueError(f"{path[:200]} is no path in an image")

    def check_sources(self) -> None:
        for file in self.file:
            file.check_source()

    def apply(self, edits: edit.Edits) -> None:
        from banger.images.mkfs import filesystem

        for pattern in self.remove:
            edits.remove(pattern)
        for directory in self.directory:
            edits.mkdir(directory.path, filesystem.Attributes(stat.S_IFDIR | directory.mode))
        for file in self.file:
            edits.write(file.path, file.pieces(), permissions=file.mode)
        for link in self.link:
            edits.symlink(link.path, link.target)
        for many in self.links:
            for name in many.names:
                edits.symlink(f"{many.directory}/{name}", many.target)
        for unit in self.mask:
            edits.symlink(f"{_SYSTEMD_UNITS}/{unit}", "/dev/null")


def _open(source: str) -> int:
    """A descriptor of a file of this host. Raises BadRequestError for one that there is not."""
    try:
        # Looked at before it is opened: a pipe would be waited for, and a device may do something then.
        found = os.open(os.path.expanduser(source), os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(found).st_mode):
                raise errors.BadRequestError(f"the recipe's source {source} is not a file")
            return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(found)
    except OSError as error:
        raise errors.BadRequestError(
            f"the recipe's source {source} cannot be read: {error.strerror}",
            hint=artefacts.unread(Path(source), error),
        ) from error


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: Name
    summary: Line
    suite: building.Suite
    variant: building.Variant
    kernel: Name
    headroom_mib: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
    packages: building.Packages
    exclude_paths: tuple[building.Glob, ...] = ()
    include_paths: tuple[building.Glob, ...] = ()
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
    return parse(shipped(name))


def parse(text: bytes) -> Recipe:
    """A recipe as text. With `extends` it is what it says over what a shipped one says."""
    if len(text) > requests.RECIPE_CHARACTERS:
        raise errors.BadRequestError(f"the recipe is larger than {requests.RECIPE_CHARACTERS >> 10} KiB")
    said: dict[str, object] = {}
    try:
        said = _extended(text)
        return decoding.convert(said, Recipe)
    except (ValueError, msgspec.ValidationError, RecursionError) as error:
        wrong = _unfit_package(said) or str(error)
        raise errors.BadRequestError(
            f"the recipe cannot be read: {wrong}", hint="docs/images.md says what a recipe holds"
        ) from error


def _unfit_package(said: dict[str, object]) -> str:
    """What is no package's name: its place in the list, the base's before it, would tell nobody."""
    packages = said.get("packages")
    for each in packages if isinstance(packages, list) else ():
        try:
            decoding.convert(each, building.Package)
        except msgspec.ValidationError:
            return f"{each!r} is not the name of a package, perhaps with =VERSION"
    return ""


def _extended(text: bytes) -> dict[str, object]:
    said: dict[str, object] = tomllib.loads(text.decode())
    base = said.pop(_EXTENDS, None)
    if base is not None:
        if not isinstance(base, str):
            raise errors.BadRequestError("`extends` names no recipe")
        extended = _extended(shipped(base))
        said = extended | said | _both_trees(extended.get(_TREE), said.get(_TREE))
    more = said.pop(_MORE_PACKAGES, ())
    packages = said.get("packages", [])
    if isinstance(more, list) and isinstance(packages, list):
        said["packages"] = [*packages, *more]
    elif more != ():
        raise errors.BadRequestError(f"`{_MORE_PACKAGES}` is no list")
    return said


def _both_trees(base: object, own: object) -> dict[str, object]:
    """The base's steps and then one's own: what takes the build's ssh keys away is among the base's.

    Empty unless both have steps; what is wrong with one's own is said by who reads the whole.
    """
    if not isinstance(base, dict) or not isinstance(own, dict):
        return {}
    steps: dict[str, object] = dict(base)
    for kind, more in own.items():
        before = steps.get(kind)
        steps[kind] = [*before, *more] if isinstance(before, list) and isinstance(more, list) else more
    return {_TREE: steps}


def shipped(name: str) -> bytes:
    """The text of a recipe that ships with banger."""
    if name not in available():
        raise errors.NotFoundError(
            f"there is no recipe {name!r}", hint=f"there are: {', '.join(available())}"
        )
    return importlib.resources.files(__package__).joinpath("recipes", f"{name}.toml").read_bytes()


def base_archive(
    recipe: Recipe,
    *,
    arch: str,
    cache_dir: Path,
    mirror: str = "",
    on_line: Callable[[str], None] | None = None,
    make: base.Make = base.make,
) -> Path:
    """The root file system as a tar, from the cache or made now; owners in it are right whoever we are."""
    kept = cache_dir / _KEPT / f"{recipe.name}-{recipe.base_key(arch, mirror)}{_ARCHIVE}"
    if kept.exists():
        return kept
    wanted = building.Base(
        arch=arch,  # type: ignore[arg-type]  # whoever makes it knows which there are
        suite=recipe.suite,
        variant=recipe.variant,
        packages=recipe.packages,
        exclude_paths=recipe.exclude_paths,
        include_paths=recipe.include_paths,
        mirror=mirror,
    )
    kept.parent.mkdir(parents=True, exist_ok=True)
    base.require_room(kept.parent)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".build-") as scratch:
        made = Path(scratch) / "root.tar"
        make(wanted, made, on_line)
        _require_suite(made, recipe.suite)
        artefacts.sync(made)  # nothing looks at it again: half of one would be built from for ever
        made.replace(kept)
    return kept


def _require_suite(archive: Path, suite: str) -> None:
    """Raises UnavailableError when a system is of another suite: that is signed too, and apt only warns.

    One that does not say of which it is, since the recipe has no such package, is taken as it is.
    """
    from banger.tarstream import hole, reader

    if suite in _MOVING_SUITES:
        return
    with archive.open("rb") as file:
        for entry in reader.entries(iter(functools.partial(file.read, _CHUNK), b"")):
            if entry.name.removeprefix(b"./") != _OS_RELEASE or not stat.S_ISREG(entry.mode):
                continue
            text = bytearray()
            for piece in entry.content:
                text += b"" if isinstance(piece, hole.Hole) else piece[:_MAX_OS_RELEASE_BYTES]
                if len(text) > _MAX_OS_RELEASE_BYTES:  # packages may have put anything there
                    break
            found = _CODENAME.search(text)
            if found is not None and found[1].decode() != suite.partition("-")[0]:
                raise errors.UnavailableError(
                    f"the package sources gave {found[1].decode()}, and not {suite}",
                    hint="use another mirror, or the host's own package sources",
                )
            return


def kept_archives(cache_dir: Path) -> list[Path]:
    """What builds of the same packages begin with."""
    return sorted((cache_dir / _KEPT).glob(f"*{_ARCHIVE}"))
