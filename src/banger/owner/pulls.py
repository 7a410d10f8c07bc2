# SPDX-License-Identifier: MIT
"""Images from elsewhere: pulled from a registry, imported from this host, or whatever the catalog knows.

The work is done once for all who ask for the same at the same time; what has not changed is not made again.
"""

from __future__ import annotations

import dataclasses
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from banger import guest_binary, pinned, run
from banger.contract import errors, given_names, requests, resources, sizes
from banger.images import blobs, bundle, catalog, recipe, records, reference
from banger.owner import images, operations

if TYPE_CHECKING:
    from banger.images import pull

DEFAULT_KERNEL: Final = "generic-6.12"
_HEADROOM_MIB: Final = 1024
_MIB: Final = 1 << 20
_IMPORTS: Final = "imports"


class PullService:
    """Makes images for the image service."""

    def __init__(
        self,
        images: images.ImageService,
        cache: Path,
        settings: Callable[[], pull.Settings],
        catalog: catalog.Catalog,
    ) -> None:
        self._images = images
        self._cache = cache
        self._settings = settings
        self._catalog = catalog
        self._blobs = blobs.Blobs(cache / "blobs")

    def sweep(self) -> None:
        """Removes what a crash left of imports; only before anything is being imported."""
        shutil.rmtree(self._cache / _IMPORTS, ignore_errors=True)

    def available(self) -> list[resources.Image]:
        """What the catalog could get that is not here."""
        entries = self._catalog.entries(platform.machine())
        return [_offered(entry) for entry in entries if not self._images.knows(entry.name)]

    def pull(self, body: requests.PullImage) -> resources.Operation:
        """A name of the catalog, or a reference. Raises BadRequestError for what is neither."""
        return self._images.begin(self._pulling(body))

    def _pulling(self, body: requests.PullImage) -> images.Making:
        entry = self._catalog.find(body.reference, platform.machine())
        if isinstance(entry, catalog.RecipeEntry):
            if body.disk_size_mib is not None:
                raise errors.BadRequestError(f"{entry.name} is built from a recipe, which says its size")
            text = entry.text()
            built = requests.BuildImage(definition=text.decode(), name=body.name or entry.name)
            return self._images.building(built, recipe.parse(text))
        if entry is not None:
            return self._pull(entry.pinned(), body.name or entry.name, body.disk_size_mib)
        wanted = reference.parse(body.reference)
        name = given_names.parse_artefact_name(body.name, "an image") if body.name else wanted.familiar
        return self._pull(wanted, name, body.disk_size_mib)

    def import_path(self, body: requests.ImportImage) -> resources.Operation:
        """Of a layout, an archive or a tar that the owner can read."""
        name = given_names.parse_artefact_name(body.name, "an image")
        path = Path(body.path)
        if not path.is_absolute():
            raise errors.BadRequestError(f"{body.path!r} is not an absolute path")

        async def make(progress: operations.Progress) -> records.Image:
            progress.stage(resources.Stage.IMPORT_IMAGE, f"reading {path.name}")
            return await run.in_thread(self._import, path, name, body, progress.line())

        return self._images.begin(self._images.making("image.import", name, body, make))

    def how_to_obtain(self, ref: str) -> images.Making | None:
        """For an image that is not here but could be. A plain word is looked up in the catalog alone: a
        mistyped name is not a reason to ask a registry.
        """
        known = self._catalog.find(ref, platform.machine()) is not None
        if not known and not reference.is_explicit(ref):
            return None
        return self._pulling(requests.PullImage(reference=ref))

    def will_lack(self, ref: str, program: str) -> bool:
        """Certainly, and known before it is made."""
        entry = self._catalog.find(ref, platform.machine())
        return isinstance(entry, catalog.RecipeEntry) and entry.lacks(program)

    def prune(self, *, dry_run: bool) -> requests.PrunedCache:
        """Runs in the loop: no pull or build may take something into use meanwhile."""
        found = self._blobs.prune(dry_run=dry_run)
        packages = self._images.prunable()
        size_bytes = found.size_bytes + sum(path.stat().st_blocks * 512 for path in packages)
        for path in () if dry_run else packages:
            path.unlink()
        return requests.PrunedCache(
            blobs=found.names,
            packages=tuple(path.name for path in packages),
            size_bytes=size_bytes,
            dry_run=dry_run,
        )

    def _pull(self, wanted: reference.Reference, name: str, disk_size_mib: int | None) -> images.Making:
        async def make(progress: operations.Progress) -> records.Image:
            progress.stage(resources.Stage.PULL_IMAGE, f"asking for {wanted.familiar}")
            return await self._pulled(wanted, name, disk_size_mib, progress)

        what = (wanted, disk_size_mib)
        return self._images.making("image.pull", name, what, make, kernel=DEFAULT_KERNEL)

    async def _pulled(
        self,
        wanted: reference.Reference,
        name: str,
        disk_size_mib: int | None,
        progress: operations.Progress,
    ) -> records.Image:
        from banger.images import pull

        guest = guest_binary.path(platform.machine())
        async with pull.opened(wanted, self._settings(), self._blobs, progress) as puller:
            digest = await puller.digest()
            here = await run.in_thread(self._unchanged, wanted, name, digest, disk_size_mib, guest)
            if here is not None:
                progress.note(f"{name} is up to date")
                return here
            progress.stage(resources.Stage.PULL_IMAGE, f"pulling {wanted.familiar}")
            async with puller.bundle(platform.machine(), digest) as found:
                progress.stage(resources.Stage.BUILD_IMAGE, f"making {name}")
                try:
                    tags = (wanted.familiar,) if wanted.tag else ()
                    return await run.in_thread(
                        self._assemble, found, name, disk_size_mib, guest, progress.line(), tags=tags
                    )
                except errors.BadRequestError as error:
                    if "layer" in error.fields:  # else the layers are not at fault: a disk that is too small
                        self._blobs.forget(reference.Digest(layer.digest) for layer in found.layers)
                    raise

    def _unchanged(
        self,
        wanted: reference.Reference,
        name: str,
        digest: reference.Digest,
        disk_size_mib: int | None,
        guest: Path,
    ) -> records.Image | None:
        """The image that a pull would make again, byte for byte."""
        for image in reversed(self._images.records.records()):
            if image.name == name:
                same = image.reference == str(wanted) and image.digest == digest
                sized = disk_size_mib is None or image.size_bytes == disk_size_mib * _MIB
                current = same and sized and image.guest_sha256 == pinned.sha256_of_path(guest)
                return image if current else None
        return None

    def _import(
        self, path: Path, name: str, body: requests.ImportImage, on_line: Callable[[str], None]
    ) -> records.Image:
        from banger.images import sources

        arch = platform.machine()
        scratch = self._cache / _IMPORTS
        with sources.opened(path, arch=arch, scratch=scratch, wanted=body.image) as found:
            on_line(sizes.counted(len(found.layers), "layer"))
            unclaimed = dataclasses.replace(found, reference="")  # only a registry says what that means
            return self._assemble(
                unclaimed,
                name,
                body.disk_size_mib,
                guest_binary.path(arch),
                on_line,
                source=f"imported {path}",
            )

    def _assemble(
        self,
        found: bundle.Bundle,
        name: str,
        disk_size_mib: int | None,
        guest: Path,
        on_line: Callable[[str], None],
        *,
        source: str = "",
        tags: tuple[str, ...] = (),
    ) -> records.Image:
        from banger.images import assemble

        return assemble.assemble(
            self._images.records,
            found,
            name=name,
            guest_binary=guest,
            kernel=DEFAULT_KERNEL,
            headroom_mib=_HEADROOM_MIB,
            size_bytes=disk_size_mib * _MIB if disk_size_mib is not None else None,
            source=source or found.reference,
            tags=tags,
            on_line=on_line,
        )


def _offered(entry: catalog.Entry) -> resources.Image:
    is_recipe = isinstance(entry, catalog.RecipeEntry)
    source = f"recipe {entry.source}" if is_recipe else entry.source
    return resources.Image(
        id="",
        name=entry.name,
        arch=entry.arch or platform.machine(),
        size_bytes=0,
        source=entry.summary or source,
        available=True,
    )
