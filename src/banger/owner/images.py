# SPDX-License-Identifier: MIT
"""The image service: what VMs can be made from, built and registered as operations."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from banger import guest_binary, run
from banger.contract import errors, names, resources
from banger.images import ext4, publish, recipe, records
from banger.owner import locks, operations, store

_PROGRAMS: Final = ("/usr/bin", "/usr/local/bin", "/bin")


class ImageService:
    """Publication is one rename; deleting refuses while a VM is made from the image."""

    def __init__(
        self, root: Path, cache: Path, store: store.Store, operations: operations.Operations
    ) -> None:
        self._images = records.Images(root)
        self._cache = cache
        self._store = store
        self._operations = operations
        self._making: locks.Shared[records.Image] = locks.Shared()

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

    def may_have(self, image_id: str, program: str) -> bool:
        """False when the image's usual directories certainly lack it; blocking."""
        rootfs = self._images.rootfs(image_id)
        try:
            if not ext4.exists(rootfs, "/usr/bin"):
                return True
            return any(ext4.exists(rootfs, f"{place}/{program}") for place in _PROGRAMS)
        except errors.BangerError:  # it will be seen in the guest
            return True

    def build(self, body: resources.BuildImage) -> resources.Operation:
        """Raises ConflictError while another image is made under that name; the same is made once."""
        own = body.definition
        if (own is None) == (not body.recipe):
            raise errors.BadRequestError("an image is built from a recipe's name or from a definition")
        wanted = recipe.load(body.recipe) if own is None else recipe.parse(own.encode())
        name = names.parse_artefact_name(body.name or wanted.name, "an image")

        async def make(progress: operations.Progress) -> records.Image:
            arch = platform.machine()
            return await run.in_thread(
                publish.build,
                self._images,
                wanted,
                arch=arch,
                cache_dir=self._cache,
                guest_binary=guest_binary.path(arch),
                name=name,
                on_line=progress.line(),
            )

        return self._make("image.build", name, wanted, f"building {name}", make)

    def register(self, body: resources.RegisterImage) -> resources.Operation:
        """Raises ConflictError while another image is made under that name; the same is made once."""
        if body.name is not None:
            names.parse_artefact_name(body.name, "an image")

        async def make(progress: operations.Progress) -> records.Image:
            path = Path(body.path)
            return await run.in_thread(publish.register, self._images, path, name=body.name or "")

        # Without a name it is known only to what lies there.
        name = body.name or body.path
        return self._make("image.register", name, body.path, f"copying {body.path}", make)

    def _make(
        self,
        kind: str,
        name: str,
        what: object,
        detail: str,
        make: Callable[[operations.Progress], Awaitable[records.Image]],
    ) -> resources.Operation:
        self._making.check(name, what)

        async def work(progress: operations.Progress) -> resources.Image:
            progress.stage(resources.Stage.BUILD_IMAGE, detail)
            made = await self._making.make(
                name, what, lambda: make(progress), operation=progress.op_id, on_wait=progress.note
            )
            return self._view(made)

        return self._operations.start(kind, name, work)

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
