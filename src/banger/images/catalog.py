# SPDX-License-Identifier: MIT
"""Images that are known by a plain name: those that ship with banger, and those that this host adds.

Each entry has a kind, a source and what the source must be: a recipe by the sha256 of its text, an image of
a registry by its digest. What is not that is refused. Used by the daemon.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import posixpath
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from banger import artefacts
from banger.contract import decoding, errors, given_names, requests
from banger.images import recipe, reference

_SHIPPED: Final = "catalog.toml"
_MAX_BYTES: Final = 1 << 20

Name = Annotated[str, msgspec.Meta(pattern=given_names.ARTEFACT_NAME_PATTERN)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
Summary = Annotated[str, msgspec.Meta(max_length=200)]
Arch = Literal["x86_64", "aarch64"]


class RecipeEntry(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="recipe"
):
    """`source`: a recipe that ships with banger by its name, or a file by its absolute path."""

    name: Name
    source: str
    sha256: Sha256
    summary: Summary = ""
    arch: Arch | None = None

    def lacks(self, program: str) -> bool:
        """Certainly: of a recipe of ours that takes a few packages as they are, without what these need."""
        if self.source.startswith("/"):
            return False
        made = recipe.parse(self.text())
        named = {*made.packages, *(name for links in made.tree.links for name in links.names)}
        paths = (*(each.path for each in made.tree.file), *(each.path for each in made.tree.link))
        named |= set(map(posixpath.basename, paths))
        return made.variant == "extract" and program not in named

    def text(self) -> bytes:
        """The recipe, verified. Raises NotFoundError, or OperationFailedError for another one."""
        if self.source.startswith("/"):
            try:
                with open(self.source, "rb") as file:
                    data = file.read(requests.RECIPE_CHARACTERS + 1)
            except OSError as error:
                hint = artefacts.unread(Path(self.source), error)
                raise errors.NotFoundError(
                    f"cannot read {self.source}: {error.strerror}", hint=hint
                ) from error
        else:
            data = recipe.shipped(self.source)
        found = hashlib.sha256(data).hexdigest()
        if found != self.sha256:
            raise errors.OperationFailedError(
                f"the recipe {self.source} is not the one that the catalog knows: its sha256 is {found}",
                hint=f"look at what changed, then put the sha256 of today's into the entry {self.name!r}",
            )
        return data


class OciEntry(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="oci"
):
    """`source`: a reference; `digest`: of the manifest or index that it means."""

    name: Name
    source: str
    digest: str
    summary: Summary = ""
    arch: Arch | None = None

    def __post_init__(self) -> None:
        try:
            found = reference.parse(self.source)
            reference.parse_digest(self.digest)
        except errors.BadRequestError as error:
            raise ValueError(error.message) from None
        if found.digest and found.digest != self.digest:
            raise ValueError(f"{self.source} names another digest than the entry")

    def pinned(self) -> reference.Reference:
        found = reference.parse(self.source)
        return reference.Reference(found.host, found.path, found.tag, reference.parse_digest(self.digest))


Entry = RecipeEntry | OciEntry


class _Catalog(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    image: tuple[Entry, ...] = ()


class Catalog:
    """What ships with banger, and over it what a file of this host says; a missing file says nothing."""

    def __init__(self, extension: Path | None = None) -> None:
        self._extension = extension

    def entries(self, arch: str) -> tuple[Entry, ...]:
        """By name. Read each time: who edits the file need not restart anything."""
        shipped = importlib.resources.files(__package__).joinpath(_SHIPPED).read_bytes()
        found = {entry.name: entry for entry in _parse(shipped, _SHIPPED, arch)}
        if self._extension is not None:
            found |= {entry.name: entry for entry in _extension(self._extension, arch)}
        return tuple(found[name] for name in sorted(found))

    def find(self, name: str, arch: str) -> Entry | None:
        return next((entry for entry in self.entries(arch) if entry.name == name), None)


def _extension(path: Path, arch: str) -> tuple[Entry, ...]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise errors.BadRequestError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise errors.BadRequestError(f"{path} is larger than 1 MiB")
    return _parse(data, str(path), arch)


def _parse(data: bytes, what: str, arch: str) -> tuple[Entry, ...]:
    try:
        found = decoding.toml(data, _Catalog).image
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise errors.BadRequestError(f"{what}: {error}", hint="docs/images.md says what it holds") from error
    twice = {entry.name for entry in found if [each.name for each in found].count(entry.name) > 1}
    if len({(entry.name, entry.arch) for entry in found}) != len(found):
        raise errors.BadRequestError(f"{what}: two entries have one name: {', '.join(sorted(twice))}")
    return tuple(entry for entry in found if entry.arch in (None, arch))
