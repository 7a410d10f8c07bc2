# SPDX-License-Identifier: MIT
"""Manifests, indexes and image configurations: parsed strictly, bounded, docker's schema 2 and OCI alike.

Nothing here fetches anything. What a document may say besides is ignored, as the specification asks.
"""

from __future__ import annotations

import platform as machines
from dataclasses import dataclass
from typing import Annotated, Final, TypeVar

import msgspec

from banger.contract import decoding, errors
from banger.images import bundle, reference

MAX_DOCUMENT_BYTES: Final = 4 << 20
MAX_LAYERS: Final = 512
MAX_LAYER_BYTES: Final = 1 << 40
_MAX_ENTRIES: Final = 4096

DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
ACCEPT: Final = ", ".join((OCI_INDEX, DOCKER_INDEX, OCI_MANIFEST, DOCKER_MANIFEST))
_CONFIGS: Final = frozenset(
    {
        "application/vnd.oci.image.config.v1+json",
        "application/vnd.docker.container.image.v1+json",
        # What registries of 2016 said (distribution/distribution issue 1621); docker takes these too.
        "application/octet-stream",
        "application/json",
        "text/html",
        "",
    }
)
_LAYERS: Final = ("application/vnd.oci.image.layer.v1.tar", "application/vnd.docker.image.rootfs.diff.tar")
_FOREIGN: Final = ("nondistributable", "rootfs.foreign")

ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
_VARIANTS: Final = {"amd64": ("", "v1"), "arm64": ("", "v8")}

_SKIPPABLE: Final = b"\x2a\x4d\x18"
"""After 0x50 to 0x5F: a frame of zstd to be passed over, as pzstd begins with."""

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_LAYER_BYTES)]


class Platform(msgspec.Struct, frozen=True):
    architecture: str = ""
    os: str = ""
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    def suits(self, arch: str) -> bool:
        wanted = ARCHITECTURES.get(arch, arch)
        return (
            self.os == "linux"
            and self.architecture == wanted
            and self.variant in _VARIANTS.get(wanted, ("",))
        )


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """A blob by content. `digest` is checked by whoever decodes."""

    digest: str
    size: Count
    media_type: str = ""
    platform: Platform | None = None
    annotations: dict[str, str] | None = None

    @property
    def id(self) -> reference.Digest:
        return reference.parse_digest(self.digest)


class _Document(msgspec.Struct, frozen=True, rename="camel"):
    """Either kind; which one it is says what it has, for the media type is optional."""

    schema_version: int = 0
    media_type: str = ""
    config: Descriptor | None = None
    layers: Annotated[tuple[Descriptor, ...], msgspec.Meta(max_length=MAX_LAYERS)] | None = None
    manifests: Annotated[tuple[Descriptor, ...], msgspec.Meta(max_length=_MAX_ENTRIES)] | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image of one platform; layers from the lowest up."""

    config: Descriptor
    layers: tuple[Descriptor, ...]

    @property
    def layers_bytes(self) -> int:
        return sum({layer.digest: layer.size for layer in self.layers}.values())


@dataclass(frozen=True, slots=True)
class Index:
    """The same image for several platforms, or several images of a layout."""

    entries: tuple[Descriptor, ...]

    def choose(self, arch: str) -> Descriptor:
        """Raises NotFoundError that lists what there is."""
        suitable = [each for each in self.entries if each.platform is not None and each.platform.suits(arch)]
        if suitable:
            return min(suitable, key=lambda each: each.platform.variant if each.platform else "")
        if len(self.entries) == 1 and self.entries[0].platform is None:
            return self.entries[0]  # its configuration says what it is for
        there = sorted({str(each.platform) for each in self.entries if _is_image(each)})
        raise errors.NotFoundError(
            f"the image has nothing for linux/{ARCHITECTURES.get(arch, arch)}",
            hint=f"it has: {', '.join(there) or 'nothing at all'}",
        )


class _Run(msgspec.Struct, frozen=True, rename="pascal"):
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    env: tuple[str, ...] | None = None
    user: str | None = None
    working_dir: str | None = None
    stop_signal: str | None = None
    exposed_ports: dict[str, msgspec.Raw] | None = None


class _Rootfs(msgspec.Struct, frozen=True):
    diff_ids: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_LAYERS)] = ()


class _Config(msgspec.Struct, frozen=True):
    architecture: str = ""
    os: str = ""
    variant: str = ""
    config: _Run | None = None
    rootfs: _Rootfs = _Rootfs()


@dataclass(frozen=True, slots=True)
class Config:
    """What an image's configuration says that matters here."""

    platform: Platform
    run: bundle.RunConfig
    diff_ids: tuple[str, ...]


def parse(data: bytes, media_type: str = "") -> Manifest | Index:
    """Of a registry or a layout. Raises BadRequestError for anything that is not an image."""
    document = _decode(data, _Document, "manifest")
    kind = document.media_type or media_type
    if document.schema_version == 1:
        raise errors.BadRequestError(
            "the manifest is of docker's schema 1, which nobody has made for years",
            hint="push the image again with a current tool",
        )
    if document.manifests is not None and document.layers is None and document.config is None:
        _refuse_other(kind, (OCI_INDEX, DOCKER_INDEX))
        return Index(tuple(_checked(each) for each in document.manifests))
    if document.config is None or document.layers is None or document.manifests is not None:
        raise errors.BadRequestError("the manifest has neither a configuration with layers nor manifests")
    _refuse_other(kind, (OCI_MANIFEST, DOCKER_MANIFEST))
    if document.config.media_type not in _CONFIGS:
        raise errors.BadRequestError(
            f"this is no image but something else kept in a registry ({document.config.media_type!r})"
        )
    return Manifest(_checked(document.config), tuple(_layer(each) for each in document.layers))


def parse_config(data: bytes, *, layers: int, arch: str) -> Config:
    """Raises BadRequestError when it is for another machine or other layers."""
    found = _decode(data, _Config, "configuration")
    platform = Platform(found.architecture, found.os, found.variant)
    if (found.architecture or found.os) and not platform.suits(arch):
        raise errors.BadRequestError(
            f"the image is for {platform}, this host runs linux/{ARCHITECTURES.get(arch, arch)}"
        )
    diff_ids = found.rootfs.diff_ids
    if len(diff_ids) != layers:
        raise errors.BadRequestError(f"the image has {layers} layers, its configuration {len(diff_ids)}")
    return Config(platform, _run(found.config or _Run()), tuple(map(reference.parse_digest, diff_ids)))


def host_arch() -> str:
    return machines.machine()


def compression(head: bytes) -> bundle.Compression:
    """By its first bytes: media types in the wild are not always true."""
    if head.startswith(b"\x1f\x8b"):
        return bundle.Compression.GZIP
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == _SKIPPABLE and head[0] >> 4 == 5):
        return bundle.Compression.ZSTD
    return bundle.Compression.NONE


def _run(found: _Run) -> bundle.RunConfig:
    text = [*(found.entrypoint or ()), *(found.cmd or ()), *(found.env or ())]
    text += [found.user or "", found.working_dir or ""]
    if any("\0" in each for each in text):
        raise errors.BadRequestError("the image's configuration has a NUL in what it wants to run")
    return bundle.RunConfig(
        entrypoint=found.entrypoint or (),
        command=found.cmd or (),
        env=tuple(each for each in found.env or () if each.partition("=")[0]),
        user=found.user or "",
        working_dir=found.working_dir or "",
        stop_signal=found.stop_signal or "",
        exposed_ports=tuple(sorted(found.exposed_ports or ())),
    )


def _layer(found: Descriptor) -> Descriptor:
    if any(mark in found.media_type for mark in _FOREIGN):
        raise errors.BadRequestError(
            "a layer of the image is not in its registry: it may not be distributed", layer=found.digest
        )
    if not found.media_type.startswith(_LAYERS):
        raise errors.BadRequestError(f"a layer of unknown kind {found.media_type!r}", layer=found.digest)
    if found.media_type.endswith("+encrypted"):
        raise errors.BadRequestError("a layer of the image is encrypted", layer=found.digest)
    return _checked(found)


def _checked(found: Descriptor) -> Descriptor:
    reference.parse_digest(found.digest)
    return found


def _is_image(found: Descriptor) -> bool:
    """Attestations sit in an index as `unknown/unknown`."""
    return found.platform is not None and found.platform.os not in ("", "unknown")


def _refuse_other(kind: str, known: tuple[str, ...]) -> None:
    kind = kind.partition(";")[0].strip()
    if kind and kind not in known and kind not in ("application/json", "application/octet-stream"):
        raise errors.BadRequestError(f"a manifest of media type {kind!r} is not an image")


def _decode(data: bytes, kind: type[T], what: str) -> T:
    if len(data) > MAX_DOCUMENT_BYTES:
        raise errors.BadRequestError(f"the {what} is larger than {MAX_DOCUMENT_BYTES >> 20} MiB")
    try:
        return decoding.json(data, kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise errors.BadRequestError(f"the {what} cannot be read: {error}") from error
