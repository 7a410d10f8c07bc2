# SPDX-License-Identifier: MIT
"""Makes OCI layouts, archives of them and plain root file systems, from a few lines of Python."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import zstandard

MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
CONFIG: Final = "application/vnd.oci.image.config.v1+json"
LAYER: Final = "application/vnd.oci.image.layer.v1.tar"


def tar(files: Mapping[str, bytes]) -> bytes:
    """A tar of regular files, in this order and with nothing else of interest."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o755
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def compressed(data: bytes, compression: Literal["gzip", "zstd"] = "gzip") -> bytes:
    if compression == "zstd":
        return zstandard.ZstdCompressor(level=1).compress(data)
    return gzip.compress(data, 1, mtime=0)


def layout(
    root: Path,
    tag: str,
    layers: list[bytes],
    run: dict[str, Any] | None = None,
    *,
    compression: Literal["gzip", "zstd"] = "gzip",
    arch: str = "amd64",
) -> str:
    """Adds an image of these tars to a layout; the digest of its manifest."""
    stored = [add(root, compressed(layer, compression), f"{LAYER}+{compression}") for layer in layers]
    return described(root, tag, stored, [digest(layer) for layer in layers], run, arch=arch)


def described(
    root: Path,
    tag: str,
    layers: list[dict[str, Any]],
    diff_ids: list[str],
    run: dict[str, Any] | None = None,
    *,
    arch: str = "amd64",
) -> str:
    """Adds an image of layers that are in the layout already; the digest of its manifest."""
    config = {
        "architecture": arch,
        "os": "linux",
        "config": run or {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created_by": "tests"} for _ in layers],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": add(root, json.dumps(config).encode(), CONFIG),
        "layers": layers,
    }
    entry = add(root, json.dumps(manifest).encode(), MANIFEST)
    (root / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
    index = root / "index.json"
    known = json.loads(index.read_text())["manifests"] if index.exists() else []
    kept = [each for each in known if each["annotations"] != entry["annotations"]]
    index.write_text(json.dumps({"schemaVersion": 2, "manifests": [*kept, entry]}))
    return str(entry["digest"])


def blobs(root: Path) -> Path:
    """Where a layout has its blobs."""
    path = root / "blobs" / "sha256"
    path.mkdir(parents=True, exist_ok=True)
    return path


def add(root: Path, data: bytes, media_type: str) -> dict[str, Any]:
    """Puts a blob into a layout; its descriptor."""
    (blobs(root) / digest(data).removeprefix("sha256:")).write_bytes(data)
    return {"mediaType": media_type, "digest": digest(data), "size": len(data)}
