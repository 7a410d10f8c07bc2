# SPDX-License-Identifier: MIT
"""The image service: what VMs can be made from, built and registered as operations."""

from __future__ import annotations

import platform
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from banger import artefacts, guest_binary, run
from banger.contract import errors, given_names, requests, resources
from banger.images import base, catalog, ext4, lookup, recipe, records, reference
from banger.owner import builder, locks, operations, store

_PROGRAMS: Final = ("/usr/bin", "/usr/local/bin", "/bin")
_HOME: Final = "/root"
Make = Callable[[operations.Progress], Awaitable[records.Image]]


@dataclass(frozen=True, slots=True)
class Making:
    """An image that could be made: as an operation of its own, or as the beginning of another one."""

    kind: str
    name: str
    kernel: str
    work: Callable[[operations.Progress], Awaitable[resources.Image]]


class ImageService:
    """Publication is one rename; deleting refuses while a VM is made from the image."""

    def __init__(
        self,
        root: Path,
        cache: Path,
        store: store.Store,
        operations: operations.Operations,
        catalog: catalog.Catalog,
        *,
        default: str,
        make_base: base.Make = base.make,
    ) -> None:
        """`default` means the image of VMs for which none is named; `make_base` runs what packages bring."""
        self.records = records.Images(root)
        self._catalog = catalog
        self._default = default
        self._make_base = make_base
        self._cache = cache
        self._store = store
        self._operations = operations
        self._making: locks.Shared[records.Image] = locks.Shared()
        self._builds = 0

    def list(self, ref: str = "") -> list[resources.Image]:
        """All of them, or the one that `ref` means, if there is one."""
        found = self.records.records()
        if ref:
            meant = lookup.find(found, ref)
            return [self._view(meant)] if meant is not None else []
        default = self._default_id(found)
        return [self._view(image, default) for image in found]

    def get(self, ref: str) -> resources.Image:
        return self._view(self.find(ref))

    def knows(self, ref: str) -> bool:
        return lookup.find(self.records.records(), ref) is not None

    def find(self, ref: str) -> records.Image:
        """By id, name, reference or digest. Raises NotFoundError with how to get the image."""
        found = lookup.find(self.records.records(), ref)
        if found is None:
            raise errors.NotFoundError(f"there is no image {ref!r}", hint=self._how_to_get(ref))
        return found

    def _how_to_get(self, ref: str) -> str:
        """A bare word that nobody knows is likelier mistyped than a repository of the default registry."""
        if ref in recipe.available():
            return f"build it: `banger image build {ref}`; what there is: `banger image list`"
        offered = self._offered()
        if ref in offered or reference.is_explicit(ref):
            return f"pull it: `banger image pull {ref}`; what there is: `banger image list`"
        close = lookup.close([*(image.name for image in self.records.records()), *offered], ref)
        meant = f"did you mean {', '.join(close)}? " if close else ""
        return (
            f"{meant}`banger image list --available` shows what there is; "
            f"`banger image pull {ref}` asks a registry"
        )

    def _offered(self) -> Sequence[str]:
        """Nothing where the host's own part of the catalog cannot be read: that is said elsewhere."""
        try:
            return [entry.name for entry in self._catalog.entries(platform.machine())]
        except errors.BangerError:
            return ()

    def name(self, image_id: str) -> str:
        """For showing; the id itself when the image is gone."""
        try:
            return self.records.read(image_id).name
        except (errors.BangerError, OSError):  # no more files can be opened: a VM is shown all the same
            return image_id

    def may_have(self, image_id: str, program: str) -> bool:
        """False when all directories where it would be found certainly lack it; blocking."""
        rootfs = self.records.rootfs(image_id)
        try:
            said = dict(item.partition("=")[::2] for item in self.records.read(image_id).run.env)
            places = dict.fromkeys((*_PROGRAMS, *filter(None, said.get("PATH", "").split(":"))))
            # What an image has in /root comes with the work disk, and is not in this file.
            if any(f"{place}/".startswith(f"{_HOME}/") for place in places):
                return True
            if not any(ext4.exists(rootfs, place) for place in places):
                return True
            return any(ext4.exists(rootfs, f"{place}/{program}") for place in places)
        except errors.BangerError:  # it will be seen in the guest
            return True

    async def build(self, body: requests.BuildImage) -> resources.Operation:
        """Raises ConflictError while another image is made under that name; the same is made once."""
        # A recipe of dots alone takes minutes to read: not in the loop.
        return self.begin(self.building(body, await run.in_thread(_recipe, body)))

    def building(self, body: requests.BuildImage, wanted: recipe.Recipe) -> Making:
        name = given_names.parse_artefact_name(body.name or wanted.name, "an image")

        from banger.images import publish

        async def make(progress: operations.Progress) -> records.Image:
            progress.stage(resources.Stage.BUILD_IMAGE, f"building {name}")
            await run.in_thread(wanted.tree.check_sources)
            arch = platform.machine()
            self._builds += 1
            try:
                return await run.in_thread(
                    publish.build,
                    self.records,
                    wanted,
                    arch=arch,
                    cache_dir=self._cache,
                    guest_binary=guest_binary.path(arch),
                    name=name,
                    on_line=progress.line(),
                    make=self._make_base,
                )
            finally:
                self._builds -= 1

        return self.making("image.build", name, wanted, make, kernel=wanted.kernel)

    def can_build(self) -> bool:
        """Whether who makes root file systems of packages is there."""
        return not isinstance(self._make_base, builder.Builder) or self._make_base.is_there()

    def register(self, body: requests.RegisterImage) -> resources.Operation:
        """Raises ConflictError while another image is made under that name; the same is made once."""
        if body.name is not None:
            given_names.parse_artefact_name(body.name, "an image")

        from banger.images import publish

        async def make(progress: operations.Progress) -> records.Image:
            progress.stage(resources.Stage.BUILD_IMAGE, f"copying {body.path}")
            path = Path(body.path)
            return await run.in_thread(publish.register, self.records, path, name=body.name or "")

        # Without a name it is known only to what lies there.
        return self.begin(self.making("image.register", body.name or body.path, body.path, make))

    def promote(self, ref: str, body: requests.PromoteImage) -> resources.Operation:
        """A copy under a name of its own: the blocks are shared where the file system can do that."""
        image = self.find(ref)
        name = given_names.parse_artefact_name(body.name, "an image")

        from banger.images import publish

        async def make(progress: operations.Progress) -> records.Image:
            progress.stage(resources.Stage.BUILD_IMAGE, f"copying {image.name}")
            return await run.in_thread(publish.promote, self.records, image, name=name)

        return self.begin(self.making("image.promote", name, image.id, make))

    def making(self, kind: str, name: str, what: object, make: Make, *, kernel: str = "") -> Making:
        """Done once for all who ask for the same under that name at the same time."""

        async def work(progress: operations.Progress) -> resources.Image:
            async def whole() -> records.Image:
                with self.records.whole(self._store.names_using_image):
                    return await make(progress)

            made = await self._making.make(
                name, what, whole, operation=progress.op_id, on_wait=progress.note
            )
            return self._view(made)

        self._making.check(name, what)
        return Making(kind, name, kernel, work)

    def begin(self, making: Making) -> resources.Operation:
        return self._operations.start(making.kind, making.name, making.work)

    def delete(self, ref: str) -> None:
        """Raises ConflictError while VMs are made from it."""
        image_id = ref if self.records.is_broken(ref) else self.find(ref).id
        users = self._store.names_using_image(image_id)
        if users:
            raise errors.ConflictError(
                f"image {self.name(image_id)} is used by {', '.join(users)}", hint="delete these VMs first"
            )
        self.records.delete(image_id)

    def prunable(self) -> tuple[Path, ...]:
        """What packages recipes were built of. Nothing during a build, which may be about to read it."""
        return () if self._builds else tuple(recipe.kept_archives(self._cache))

    def _default_id(self, images: Sequence[records.Image]) -> str:
        found = lookup.find(images, self._default)
        return found.id if found is not None else ""

    def _view(self, image: records.Image, default_id: str | None = None) -> resources.Image:
        """`default_id`, for who shows many and has asked once."""
        if default_id is None:
            default_id = self._default_id(self.records.records())
        return resources.Image(
            is_default=image.id == default_id,
            id=image.id,
            name=image.name,
            tags=image.tags,
            arch=image.arch,
            size_bytes=image.size_bytes,
            source=image.source,
            created_at=artefacts.moment(image.created_at),
            has_init=image.has_init,
            has_shell=image.has_shell,
            default_kernel=image.kernel,
            used_by=self._store.names_using_image(image.id),
            stored_bytes=image.stored_bytes,
            reference=image.reference,
            digest=image.digest,
            layers_bytes=sum(layer.size_bytes for layer in image.layers),
            run=resources.ImageRun(
                entrypoint=image.run.entrypoint,
                command=image.run.command,
                env=image.run.env,
                user=image.run.user,
                working_dir=image.run.working_dir,
                exposed_ports=image.run.exposed_ports,
            ),
        )


def _recipe(body: requests.BuildImage) -> recipe.Recipe:
    if (body.definition is None) == (not body.recipe):
        raise errors.BadRequestError("an image is built from a recipe's name or from a definition")
    return recipe.load(body.recipe) if body.definition is None else recipe.parse(body.definition.encode())
