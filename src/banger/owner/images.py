# SPDX-License-Identifier: MIT
"""The image service: what VMs can be made from, built and registered as operations."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path

from banger import guest_binary, run
from banger.contract import errors, resources
from banger.images import publish, recipe, records
from banger.owner import locks, operations, store


class ImageService:
    """Publication is one rename; deleting refuses while a VM is made from the image."""

    def __init__(
        self, root: Path, cache: Path, store: store.Store, operations: operations.Operations
    ) -> None:
        self._images = records.Images(root)
        self._cache = cache
        self._store = store
        self._operations = operations
        self._building = locks.Lifecycle()

    def sweep(self) -> None:
        """Removes what a crash left half made; only before anything is being made."""
        self._images.sweep()

    def list(self) -> list[resources.Image]:
        return [self._view(image) for image in self._images.records()]

    def get(self, ref: str) -> resources.Image:
        return self._view(self._images.find(ref))

    def find(self, ref: str) -> records.Image:
        """Raises NotFoundError with how to get the image."""
        try:
            return self._images.find(ref)
        except errors.NotFoundError as error:
            error.hint = f"build it: `banger image build {ref}`" if ref in recipe.available() else error.hint
            raise

    def name(self, image_id: str) -> str:
        """For showing; the id itself when the image is gone."""
        try:
            return self._images.read(image_id).name
        except errors.BangerError:
            return image_id

    def build(self, body: resources.BuildImage) -> resources.Operation:
        wanted = recipe.load(body.recipe)
        name = body.name or wanted.name

        async def work(progress: operations.Progress) -> resources.Image:
            progress.stage(resources.Stage.BUILD_IMAGE, f"building {name}")
            async with self._building.hold(name, progress.op_id):
                arch = platform.machine()
                made = await run.in_thread(
                    publish.build,
                    self._images,
                    wanted,
                    arch=arch,
                    cache_dir=self._cache,
                    guest_binary=guest_binary.path(arch),
                    name=name,
                    on_line=progress.line(),
                )
            return self._view(made)

        return self._operations.start("image.build", name, work)

    def register(self, body: resources.RegisterImage) -> resources.Operation:
        async def work(progress: operations.Progress) -> resources.Image:
            progress.stage(resources.Stage.BUILD_IMAGE, f"copying {body.path}")
            path = Path(body.path)
            return self._view(
                await run.in_thread(publish.register, self._images, path, name=body.name or "")
            )

        return self._operations.start("image.register", body.name or body.path, work)

    def delete(self, ref: str) -> None:
        """Raises ConflictError while VMs are made from it."""
        image = self._images.find(ref)
        users = self._store.names_using_image(image.id)
        if users:
            raise errors.ConflictError(
                f"image {image.name} is used by {', '.join(users)}", hint="delete these VMs first"
            )
        self._images.delete(image.id)

    def _view(self, image: records.Image) -> resources.Image:
        return resources.Image(
            id=image.id,
            name=image.name,
            tags=image.tags,
            arch=image.arch,
            size_bytes=image.size_bytes,
            source=image.source,
            created_at=datetime.datetime.fromisoformat(image.created_at),
            has_init=image.has_init,
            default_kernel=image.kernel,
            used_by=self._store.names_using_image(image.id),
        )
