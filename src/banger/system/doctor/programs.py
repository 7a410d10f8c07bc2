# SPDX-License-Identifier: MIT
"""Probes of the host's programs: each belongs to a package, and a feature is missing without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from banger.system.doctor import report
from banger.system.doctor import scene as scenes

_LIBRARIES: Final = tuple(
    f"{top}{between}/libnftables.so.1" for top in ("usr/lib", "lib", "usr/lib64") for between in ("", "/*")
)


@dataclass(frozen=True, slots=True)
class Programs:
    """Programs of one package. Without them no VM runs (`required`), or one feature is missing."""

    package: str
    programs: tuple[str, ...]
    lacking: str
    required: bool = False

    def __call__(self, scene: scenes.Scene) -> report.Finding:
        missing = [name for name in self.programs if scene.program(name) is None]
        if not missing:
            return report.passed(", ".join(self.programs))
        found = report.failed if self.required else report.warned
        verb = "is" if len(missing) == 1 else "are"
        return found(
            f"{', '.join(missing)} {verb} not installed: {self.lacking}",
            f"install the package {self.package}: sudo apt install {self.package}",
        )


def library(scene: scenes.Scene) -> report.Finding:
    """The helper changes packet rules through it."""
    found = [path for pattern in _LIBRARIES for path in scene.root.glob(pattern)]
    if found:
        return report.passed(scene.shown(found[0]))
    return report.failed(
        "libnftables.so.1 is not installed: no VM with a network can start",
        "install the package libnftables1: sudo apt install libnftables1",
    )
