# SPDX-License-Identifier: MIT
"""An OCI image at rest: its verified layers in order, and how it wants to be run.

What a pull from a registry, an OCI layout, a `docker save` archive and a plain root-file-system tar have in
common; made by `pull` and `sources`, turned into a root disk by `assemble`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path

import msgspec


class Compression(enum.StrEnum):
    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"


@dataclass(frozen=True, slots=True)
class Layer:
    """A blob that is whole on this disk. `diff_id` is the digest of the tar inside; empty if nobody said."""

    path: Path
    compression: Compression
    digest: str
    size_bytes: int
    diff_id: str = ""


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the image's author wants it run: the OCI configuration's names, in our spelling."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    """`NAME=value` each."""
    user: str = ""
    """`name[:group]` or `uid[:gid]`, resolved in the guest."""
    working_dir: str = ""
    stop_signal: str = ""
    exposed_ports: tuple[str, ...] = ()

    @property
    def argv(self) -> tuple[str, ...]:
        return self.entrypoint + self.command


@dataclass(frozen=True, slots=True)
class Bundle:
    """`layers` from the lowest up. `reference` is what the user asked for, whole; `digest` the manifest."""

    reference: str
    digest: str
    arch: str
    """As `platform.machine()` says it: x86_64, aarch64."""
    layers: tuple[Layer, ...]
    run: RunConfig = field(default_factory=RunConfig)
