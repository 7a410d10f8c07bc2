# SPDX-License-Identifier: MIT
"""Builds what the lab is handed: Firecracker and its jailer, two kernels, the default image, the smallest.

All of it is made by banger's own code, from its own catalogs and recipes, into one cache entry keyed by that
code and the guest binary. Downloads and the unpacked distribution are kept apart, so a change in the guest
binary costs seconds. Used by provision; `python -m lab.artefacts` makes it and says where it is.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from banger import guest_binary
from banger.images import publish, records
from banger.images import recipe as recipes
from banger.kernels import catalog
from banger.kernels import records as kernel_records
from banger.system import runtime
from lab import cache, command

log = logging.getLogger("lab")

TREE = Path(__file__).resolve().parent.parent
PACKAGE = TREE / "src" / "banger"
IMAGES = ("debian-bookworm", "busybox")
KERNELS = ("generic-6.12", "debian-6.1")
ARCH = "x86_64"
KEPT = 3
BUILD_LIMIT_S = 300
_INPUTS = ("images", "kernels", "system/runtime.toml", "artefacts.py", "debian.py", "pinned.py")


def ensure(root: Path) -> cache.Entry:
    """Open the directory `runtime/ kernels/<name>/ images/<name>/`, building it first when needed."""
    guest = _build_guest()

    def build(stage: Path) -> None:
        downloads = root / "downloads"
        with _timed("runtime files"):
            _runtime(stage / "runtime", downloads)
        for name in KERNELS:
            with _timed(f"kernel {name}"):
                _kernel(stage / "kernels", name, downloads, guest)
        for name in IMAGES:
            with _timed(f"image {name}"):
                _image(stage / "images", name, downloads, guest)

    return cache.Cache(root, "made", KEPT).ensure(cache.key_of(_key_parts(guest)), build)


def _build_guest() -> Path:
    command.run([sys.executable, TREE / "guest" / "build_hook.py"], timeout_s=BUILD_LIMIT_S)
    return guest_binary.path(ARCH)


def _runtime(target: Path, downloads: Path) -> None:
    fetched = runtime.pull(downloads, arch=ARCH, on_line=log.info)
    runtime.install_runtime(target, {name: file.path for name, file in fetched.items()})


def _kernel(target: Path, name: str, downloads: Path, guest: Path) -> None:
    kernels = kernel_records.Kernels(target)
    entry = catalog.find(name, ARCH)
    made = catalog.pull(kernels, entry, cache_dir=downloads, guest_binary=guest, on_line=log.info)
    kernels.path(made.id).rename(target / name)


def _image(target: Path, name: str, downloads: Path, guest: Path) -> None:
    images = records.Images(target)
    recipe = recipes.load(name)
    made = publish.build(
        images, recipe, arch=ARCH, cache_dir=downloads, guest_binary=guest, on_line=log.info
    )
    images.path(made.id).rename(target / name)
    for path in (target / name).iterdir():  # its maker's alone; in the lab, the owner's there reads it
        path.chmod(0o644)


@contextlib.contextmanager
def _timed(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    log.info("%s: %.1f s", what, time.monotonic() - began)


def _key_parts(guest: Path) -> Iterator[str | bytes]:
    yield guest.read_bytes()
    yield Path(__file__).read_bytes()
    for name in _INPUTS:
        top = PACKAGE / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix in (".py", ".toml"):
                yield str(path.relative_to(PACKAGE))
                yield path.read_bytes()


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    began = time.monotonic()
    entry = ensure(cache.default_root())
    print(entry.path)
    log.info("artefacts: %.1f s", time.monotonic() - began)
    entry.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
