# SPDX-License-Identifier: MIT
"""What a client asks to be done about images and kernels; what these are is in `resources`."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from banger.contract import resources

RECIPE_CHARACTERS: Final = 256 << 10


class PullImage(resources.Body, frozen=True, kw_only=True):
    """`reference`: a name of the catalog, or an image of a registry. `name` absent: as the reference."""

    reference: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
    name: str | None = None
    disk_size_mib: resources.DiskMib | None = None
    """Absent: as large as its content, with room to grow."""


class ImportImage(resources.Body, frozen=True, kw_only=True):
    """`path`: an OCI layout, an archive of one or of `docker save`, or a tar of a root file system."""

    path: str
    name: str
    image: str = ""
    """Which one, where the archive holds several."""
    disk_size_mib: resources.DiskMib | None = None


class PromoteImage(resources.Body, frozen=True, kw_only=True):
    """Gives an image a name of its own, which no later pull or build of the old name changes."""

    name: str


class PruneCache(resources.Body, frozen=True, kw_only=True):
    dry_run: bool = False


class PrunedCache(resources.Resource, frozen=True, kw_only=True):
    """What was removed, or would be: layers by digest, and packages that recipes were built of."""

    blobs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    size_bytes: int = 0
    dry_run: bool = False


class BuildImage(resources.Body, frozen=True, kw_only=True):
    """`recipe` names one that comes with banger; or `definition` is a recipe of the user's own, as TOML."""

    recipe: str = ""
    definition: Annotated[str, msgspec.Meta(max_length=RECIPE_CHARACTERS)] | None = None
    name: str | None = None


class RegisterImage(resources.Body, frozen=True, kw_only=True):
    """`path`: a directory with `rootfs.ext4` and `image.json`, readable by the owner; it is copied."""

    path: str
    name: str | None = None


class ImportKernel(resources.Body, frozen=True, kw_only=True):
    path: str
    name: str


class PullKernel(resources.Body, frozen=True, kw_only=True):
    name: str
