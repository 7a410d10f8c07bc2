# SPDX-License-Identifier: MIT
"""From a reference to a bundle whose layers are whole on this disk. Async; used by the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from banger.contract import errors
from banger.images import blobs, bundle, connections, credentials, manifest, reference, registry

_AT_ONCE: Final = 4
_TELL_EVERY_S: Final = 0.4
_DEPTH: Final = 2


class Watch(Protocol):
    """Hears how a pull goes."""

    def progress(self, current: int, total: int, detail: str = "", /) -> None: ...

    def note(self, text: str, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """What the host says of registries."""

    insecure: Collection[str] = ()
    login_files: Collection[Path] = ()
    limits: connections.Limits = field(default_factory=connections.Limits)


class Puller:
    """Everything for one reference; connections live as long as its block."""

    def __init__(
        self, wanted: reference.Reference, registry: registry.Registry, store: blobs.Blobs, watch: Watch
    ) -> None:
        self._wanted = wanted
        self._registry = registry
        self._blobs = store
        self._watch = watch

    async def digest(self) -> reference.Digest:
        """What the reference means now: one request, no more."""
        return await self._registry.digest()

    @contextlib.asynccontextmanager
    async def bundle(self, arch: str, digest: reference.Digest) -> AsyncIterator[bundle.Bundle]:
        """The image with this digest; inside the block its layers stay in the cache."""
        found = await self._manifest(digest, arch)
        config = manifest.parse_config(
            await self._registry.small_blob(found.config), layers=len(found.layers), arch=arch
        )
        with self._blobs.leased(layer.id for layer in found.layers):
            self._blobs.require_space((layer.id, layer.size) for layer in found.layers)
            paths = await self._layers(found.layers)
            yield bundle.Bundle(
                reference=str(self._wanted),
                digest=digest,
                arch=arch,
                layers=tuple(
                    bundle.Layer(
                        path=paths[layer.id],
                        compression=_compression(paths[layer.id]),
                        digest=layer.id,
                        size_bytes=layer.size,
                        diff_id=diff_id,
                    )
                    for layer, diff_id in zip(found.layers, config.diff_ids, strict=True)
                ),
                run=config.run,
            )

    async def _manifest(self, digest: reference.Digest, arch: str) -> manifest.Manifest:
        wanted = str(digest)
        for _ in range(_DEPTH + 1):
            document = await self._registry.document(wanted)
            found = manifest.parse(document.data, document.media_type)
            if isinstance(found, manifest.Manifest):
                return found
            wanted = found.choose(arch).id
        raise errors.BadRequestError(f"{self._wanted.familiar} is an index of indexes of indexes")

    async def _layers(self, layers: tuple[manifest.Descriptor, ...]) -> dict[reference.Digest, Path]:
        """Each distinct one once, a few at a time. The first that fails ends the others."""
        distinct = {layer.id: layer.size for layer in layers}
        meter = _Meter(distinct, self._watch)
        gate = asyncio.Semaphore(_AT_ONCE)

        async def fetch(digest: reference.Digest, size_bytes: int) -> Path:
            async with gate:
                return await self._blobs.fetch(
                    digest,
                    size_bytes,
                    lambda offset: self._registry.blob(digest, offset),
                    lambda current: meter.hear(digest, current),
                )

        try:
            async with asyncio.TaskGroup() as group:
                tasks = {digest: group.create_task(fetch(digest, size)) for digest, size in distinct.items()}
        except BaseExceptionGroup as failed:
            raise _first(failed) from None
        meter.tell()
        return {digest: task.result() for digest, task in tasks.items()}


@contextlib.asynccontextmanager
async def opened(
    wanted: reference.Reference, settings: Settings, store: blobs.Blobs, watch: Watch
) -> AsyncIterator[Puller]:
    """A puller for a reference, with connections of its own."""
    wire = connections.Connections(insecure=settings.insecure, limits=settings.limits, say=watch.note)
    async with wire:
        logins = credentials.Store(tuple(settings.login_files))
        yield Puller(wanted, registry.Registry(wanted, wire, logins, say=watch.note), store, watch)


class _Meter:
    """How far the layers are, each and together; told now and then, not with every byte."""

    def __init__(
        self,
        layers: dict[reference.Digest, int],
        watch: Watch,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sizes = layers
        self._done = dict.fromkeys(layers, 0)
        self._watch = watch
        self._clock = clock
        self._told = 0.0
        self._shown: dict[reference.Digest, int] = {}

    def hear(self, digest: reference.Digest, current: int) -> None:
        self._done[digest] = current
        if self._clock() - self._told >= _TELL_EVERY_S:
            self.tell()

    def tell(self) -> None:
        """The layers that moved, then all together: what is told last is what one line shows."""
        self._told = self._clock()
        for number, (digest, size) in enumerate(self._sizes.items(), 1):
            if self._done[digest] != self._shown.get(digest, 0) and len(self._sizes) > 1:
                name = f"layer {number} of {len(self._sizes)} {digest.partition(':')[2][:12]}"
                self._watch.progress(self._done[digest], size, name)
                self._shown[digest] = self._done[digest]
        self._watch.progress(sum(self._done.values()), sum(self._sizes.values()), "layers")


def _compression(path: Path) -> bundle.Compression:
    with path.open("rb") as file:
        return manifest.compression(file.read(4))


def _first(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    """The others were cancelled because of it, or failed for the same reason."""
    for error in failed.exceptions:
        if isinstance(error, BaseExceptionGroup):
            return _first(error)
        return error
    raise failed
