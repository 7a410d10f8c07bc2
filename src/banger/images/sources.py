# SPDX-License-Identifier: MIT
"""Images that lie on this host, as bundles: an OCI layout (directory or tar), a `docker save` archive, a
plain tar of a root file system. Blocking; used by `image import`.

Every layer is checked against its digest before it is used. What is compressed inside an archive stays so.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Protocol

import msgspec

from banger import artefacts, run
from banger.contract import decoding, errors
from banger.images import archive, bundle, manifest, reference

_CHUNK: Final = 1 << 20
_LAYOUT: Final = "oci-layout"
_INDEX: Final = "index.json"
_DOCKER: Final = "manifest.json"
_REF_NAME: Final = "org.opencontainers.image.ref.name"
_FULL_NAME: Final = "io.containerd.image.name"
_OF_AN_IMAGE: Final = re.compile(
    r"blobs(/.*)?|oci-layout|index\.json|manifest\.json|repositories"
    r"|(sha256:)?[0-9a-f]{64}(\.json|\.tar(\.gz)?|/.*)?"
)


class _Files(Protocol):
    """What a layout's directory and its tar have in common."""

    def __contains__(self, name: str, /) -> bool: ...

    def read(self, name: str, limit: int, /) -> bytes: ...

    def file(self, name: str, /) -> Path: ...


class _Saved(msgspec.Struct, frozen=True, rename="pascal"):
    """An entry of `docker save`'s manifest.json."""

    config: str
    layers: Annotated[tuple[str, ...], msgspec.Meta(max_length=manifest.MAX_LAYERS)]
    repo_tags: tuple[str, ...] | None = None


@contextlib.contextmanager
def opened(path: Path, *, arch: str, scratch: Path, wanted: str = "") -> Iterator[bundle.Bundle]:
    """The image at `path`; of several the one that `wanted` names. To be used inside the block.

    Raises BadRequestError for what is no image, NotFoundError and UnauthorizedError for what cannot be read.
    """
    with artefacts.scratch_directory(scratch) as room:
        yield _read(path, arch, room, wanted)


def _read(path: Path, arch: str, scratch: Path, wanted: str) -> bundle.Bundle:
    with artefacts.readable(path):
        kind = path.stat().st_mode
        files: _Files
        if stat.S_ISDIR(kind):
            files = _Directory(path)
        elif not stat.S_ISREG(kind):
            raise errors.BadRequestError(f"{path} is neither a directory nor a file")
        elif not _OF_AN_IMAGE.fullmatch(archive.first_name(path)):
            return _rootfs(path, arch)
        else:
            room = shutil.disk_usage(scratch).free - artefacts.RESERVE_BYTES
            files = _Tar(archive.Archive(archive.uncompressed(path, scratch, room)), scratch)
        if _LAYOUT in files:
            return _layout(files, path, arch, wanted)
        if _DOCKER in files:
            return _saved(files, path, arch, wanted)
        raise errors.BadRequestError(
            f"{path} is no image: it has neither {_LAYOUT} nor {_DOCKER}",
            hint="give an OCI layout, a `docker save` archive, or a tar of a root file system",
        )


@dataclass(frozen=True, slots=True)
class _Directory:
    root: Path

    def __contains__(self, name: str) -> bool:
        return (self.root / name).is_file()

    def read(self, name: str, limit: int) -> bytes:
        with self.file(name).open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise errors.BadRequestError(f"{name} is larger than {limit} bytes")
        return data

    def file(self, name: str) -> Path:
        """None leads out of the directory but by the user's own links, whatever a manifest.json names."""
        path = self.root / name
        leads_out = name.startswith("/") or ".." in name.split("/")
        if leads_out or not path.is_file():
            raise errors.BadRequestError(f"{self.root} has no {name}")
        return path


@dataclass(frozen=True, slots=True)
class _Tar:
    members: archive.Archive
    scratch: Path

    def __contains__(self, name: str) -> bool:
        return name in self.members

    def read(self, name: str, limit: int) -> bytes:
        return self.members.read(name, limit)

    def file(self, name: str) -> Path:
        target = self.scratch / f"member-{self.members.identity(name)}"
        if not target.exists():
            self.members.extract(name, target)
        return target


def _layout(files: _Files, path: Path, arch: str, wanted: str) -> bundle.Bundle:
    top = manifest.parse(files.read(_INDEX, manifest.MAX_DOCUMENT_BYTES))
    if not isinstance(top, manifest.Index):
        raise errors.BadRequestError(f"{_INDEX} of {path} is not an index")
    chosen = _named(top, path, wanted)
    name = _name(chosen) or wanted
    digest, found = chosen.id, _document(files, chosen)
    for _ in range(2):
        if isinstance(found, manifest.Manifest):
            break
        found = _document(files, found.choose(arch))
    if not isinstance(found, manifest.Manifest):
        raise errors.BadRequestError(f"{path} holds an index of indexes of indexes")
    data = files.read(_blob(found.config.id), manifest.MAX_DOCUMENT_BYTES)
    _require(data, found.config.id)
    config = manifest.parse_config(data, layers=len(found.layers), arch=arch)
    layers = [
        _layer(files.file(_blob(each.id)), each.id, each.size, diff_id)
        for each, diff_id in zip(found.layers, config.diff_ids, strict=True)
    ]
    return bundle.Bundle(_reference(name), digest, arch, tuple(layers), config.run)


def _named(top: manifest.Index, path: Path, wanted: str) -> manifest.Descriptor:
    """A layout may hold several images; one of them is meant."""
    if wanted:
        for each in top.entries:
            if wanted in (each.digest, (each.annotations or {}).get(_REF_NAME)) or _means(
                wanted, _name(each)
            ):
                return each
    elif len(top.entries) == 1:
        return top.entries[0]
    there = ", ".join(_name(each) or each.digest for each in top.entries) or "none"
    what = f"no image {wanted!r}" if wanted else f"{len(top.entries)} images"
    raise errors.BadRequestError(f"{path} holds {what}", hint=f"say which with --image: {there}")


def _name(found: manifest.Descriptor) -> str:
    said = found.annotations or {}
    return said.get(_FULL_NAME) or said.get(_REF_NAME) or ""


def _document(files: _Files, found: manifest.Descriptor) -> manifest.Manifest | manifest.Index:
    data = files.read(_blob(found.id), manifest.MAX_DOCUMENT_BYTES)
    _require(data, found.id)
    return manifest.parse(data, found.media_type)


def _blob(digest: reference.Digest) -> str:
    algorithm, _, name = digest.partition(":")
    return f"blobs/{algorithm}/{name}"


def _saved(files: _Files, path: Path, arch: str, wanted: str) -> bundle.Bundle:
    """`docker save` before it wrote layouts: plain tars, known by the diff ids of the configuration."""
    try:
        entries = decoding.json(files.read(_DOCKER, manifest.MAX_DOCUMENT_BYTES), tuple[_Saved, ...])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise errors.BadRequestError(f"{_DOCKER} of {path} cannot be read: {error}") from error
    entry = _saved_one(entries, path, wanted)
    data = files.read(entry.config, manifest.MAX_DOCUMENT_BYTES)
    config = manifest.parse_config(data, layers=len(entry.layers), arch=arch)
    layers = [
        _layer(files.file(name), None, None, diff_id)
        for name, diff_id in zip(entry.layers, config.diff_ids, strict=True)
    ]
    name = wanted or (entry.repo_tags or ("",))[0]
    return bundle.Bundle(_reference(name), reference.digest_of(data), arch, tuple(layers), config.run)


def _saved_one(entries: tuple[_Saved, ...], path: Path, wanted: str) -> _Saved:
    for each in entries:
        if wanted and any(_means(wanted, tag) for tag in each.repo_tags or ()):
            return each
    if not wanted and len(entries) == 1:
        return entries[0]
    there = ", ".join(tag for each in entries for tag in each.repo_tags or ()) or "none with a name"
    what = f"no image {wanted!r}" if wanted else f"{len(entries)} images"
    raise errors.BadRequestError(f"{path} holds {what}", hint=f"say which with --image: {there}")


def _rootfs(path: Path, arch: str) -> bundle.Bundle:
    """One layer that nobody described."""
    digest, size_bytes = _hashed(path, None)
    layer = bundle.Layer(path, _compression(path), digest, size_bytes)
    return bundle.Bundle("", digest, arch, (layer,))


def _layer(path: Path, digest: reference.Digest | None, size: int | None, diff_id: str) -> bundle.Layer:
    found, size_bytes = _hashed(path, digest)
    if (digest is not None and found != digest) or (size is not None and size_bytes != size):
        raise errors.BadRequestError(
            f"a layer is not what its digest {digest} says", hint="make or copy the image again"
        )
    return bundle.Layer(path, _compression(path), found, size_bytes, diff_id)


def _hashed(path: Path, like: reference.Digest | None) -> tuple[reference.Digest, int]:
    algorithm = like.partition(":")[0] if like else "sha256"
    digest = reference.hasher(like or reference.Digest("sha256:"))
    size = 0
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            run.check_cancelled()
            digest.update(piece)
            size += len(piece)
    return reference.Digest(f"{algorithm}:{digest.hexdigest()}"), size


def _compression(path: Path) -> bundle.Compression:
    with path.open("rb") as file:
        return manifest.compression(file.read(4))


def _require(data: bytes, digest: reference.Digest) -> None:
    if reference.digest_of(data, digest) != digest:
        raise errors.BadRequestError(
            f"a document of the image is not what its digest {digest} says", hint="make or copy it again"
        )


def _means(wanted: str, name: str) -> bool:
    """Whatever either leaves out: docker shows `app:1`, and saves `docker.io/library/app:1` today."""
    return wanted == name or (bool(_reference(wanted)) and _reference(wanted) == _reference(name))


def _reference(name: str) -> str:
    """In full where it is one; a layout's name may be just a tag, or anything."""
    if reference.is_explicit(name):
        with contextlib.suppress(errors.BadRequestError):
            return str(reference.parse(name))
    return ""
