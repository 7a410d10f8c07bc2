# SPDX-License-Identifier: MIT
"""Disks of prepared labs, kept by content to start others from, with the machine's saved state.

A layer lies on an image or on another layer, and holds the locks of all below it. Used by session.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import cache, errors, image, qemu

KEPT_LAYERS = 8
DISK = "disk.qcow2"
STATE = "state"
RECORD = "layer.json"


@dataclass(frozen=True, slots=True)
class Origin:
    """What a layer was made on; a saved state is good only for the machine it was saved from."""

    image_key: str
    parent_key: str | None
    machine: str


@dataclass(frozen=True, slots=True)
class Base:
    """What a lab's disk is laid on: an image, or a layer on it. Close it when the lab has ended."""

    image: image.Image
    disk: Path
    state: Path | None
    layer_key: str | None
    entries: tuple[cache.Entry, ...]
    made_on: str = ""

    @property
    def held_fds(self) -> list[int]:
        return [entry.lock_fd for entry in self.entries]

    def close(self) -> None:
        for entry in self.entries:
            entry.close()


def bare(root: Path) -> Base:
    """Give the image itself, with nothing on it."""
    found = image.ensure(root)
    return Base(found, found.disk, None, None, (found.entry,))


def find(root: Path, key: str) -> Base | None:
    """Open a layer; None when it, or anything below it, is not in the cache any more."""
    entry = _cache(root).open(key)
    if entry is None:
        return None
    origin = Origin(**json.loads((entry.path / RECORD).read_text()))
    below = find(root, origin.parent_key) if origin.parent_key else image_base(root, origin.image_key)
    if below is None:
        entry.close()
        _cache(root).delete(key)
        return None
    state = entry.path / STATE
    entries = (*below.entries, entry)
    saved = state if state.exists() else None
    return Base(below.image, entry.path / DISK, saved, key, entries, made_on=origin.machine)


def need(root: Path, key: str) -> Base:
    """Open a layer that must be there."""
    if (found := find(root, key)) is None:
        raise errors.LabError(f"there is no layer {key}")
    return found


def ensure(root: Path, key: str, base: Base, machine: str, save: Callable[[Path], None]) -> Base:
    """Open a layer, or make it on `base` by letting `save` write its disk and state into a directory."""

    def build(stage: Path) -> None:
        save(stage)
        origin = Origin(base.image.key, base.layer_key, machine)
        (stage / RECORD).write_text(json.dumps(asdict(origin)))

    while True:
        _cache(root).ensure(key, build).close()
        if (found := find(root, key)) is not None:
            return found


def signature(hardware: qemu.Hardware) -> str:
    """Name the machine that a state fits: QEMU's version and arguments, and the processor it runs on.

    The saved kernel has measured the processor's time stamp counter, and would run fast or slow on another.
    """
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line for line in lines if line.startswith("model name")), "")
    return cache.key_of([processor, qemu.version(), *qemu.template(hardware)])


def image_base(root: Path, key: str) -> Base | None:
    """Open an image by its key; None when the cache has it no more."""
    entry = cache.Cache(root, "image", image.KEPT_IMAGES).open(key)
    if entry is None:
        return None
    found = image.Image(key, entry)
    return Base(found, found.disk, None, None, (entry,))


def making(root: Path, key: str) -> contextlib.AbstractContextManager[None]:
    """While one makes this layer, others who want to make it wait, look again, and find it."""
    return _cache(root).alone(key)


def _cache(root: Path) -> cache.Cache:
    return cache.Cache(root, "layer", KEPT_LAYERS)
