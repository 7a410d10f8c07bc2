# SPDX-License-Identifier: MIT
"""What is known about an image. It is `<state>/images/<id>/{rootfs.ext4,work-seed.tar,image.json}`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from banger import artefacts
from banger.contract import given_names
from banger.images import bundle, reference

ROOTFS: Final = "rootfs.ext4"
WORK_SEED: Final = "work-seed.tar"
RECORD: Final = "image.json"


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One that the image was made of, from the lowest up; `size_bytes` as it was transferred."""

    digest: str
    size_bytes: int
    diff_id: str = ""


class Image(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`size_bytes` is the root disk's, `stored_bytes` what it takes here; `kernel` is a kernel's name.

    `tags` are what it was pulled by, as people write it; where one leads today is the registry's to say.

    What stands behind `created_at` is only said of images that came as OCI images or root file systems.
    """

    id: str
    name: str
    tags: tuple[str, ...] = ()
    arch: str
    size_bytes: int
    stored_bytes: int
    source: str
    guest_sha256: str
    has_init: bool
    has_shell: bool = True
    kernel: str
    created_at: str
    reference: str = ""
    digest: str = ""
    layers: tuple[Layer, ...] = ()
    run: bundle.RunConfig = bundle.RunConfig()


def parse_name(text: str) -> str:
    """A plain name, or the reference of a pulled image in its familiar form."""
    if reference.is_explicit(text) and reference.parse(text).familiar == text:
        return text
    return given_names.parse_artefact_name(text, "an image")


class Images(artefacts.Artefacts[Image]):
    def __init__(self, root: Path) -> None:
        super().__init__(root, "image", RECORD, Image)

    def rootfs(self, image_id: str) -> Path:
        return self.path(image_id) / ROOTFS

    def work_seed(self, image_id: str) -> Path:
        return self.path(image_id) / WORK_SEED
