# SPDX-License-Identifier: MIT
"""Who pulls from the registry that does as it is told, and what is pulled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from banger.images import blobs, bundle, connections, pull, reference
from tests.fakes import registry as registries

BASE = b"\x1f\x8b base " + bytes(range(256)) * 20_000
TOP = b"\x28\xb5\x2f\xfd top " + b"0123456789" * 5_000
LIMITS = connections.Limits(connect_s=20, silence_s=20, attempts=3, first_wait_s=0.01, longest_wait_s=0.5)


class Watch:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, str]] = []
        self.notes: list[str] = []

    def progress(self, current: int, total: int, detail: str = "") -> None:
        self.told.append((current, total, detail))

    def note(self, text: str) -> None:
        self.notes.append(text)


class Client:
    """Pulls into one cache."""

    def __init__(self, root: Path, registry: registries.Registry) -> None:
        self.root = root
        self.registry = registry
        self.store = blobs.Blobs(root / "blobs", blobs.Tries(attempts=3, first_wait_s=0.01))
        self.watch = Watch()
        self.logins: tuple[Path, ...] = ()
        self.limits = LIMITS
        self.insecure: tuple[str, ...] = ()

    @contextlib.asynccontextmanager
    async def opened(self, name: str = "team/app:v1") -> AsyncIterator[pull.Puller]:
        wanted = reference.parse(f"{self.registry.host}/{name}")
        settings = pull.Settings(self.insecure, login_files=self.logins, limits=self.limits)
        async with asyncio.timeout(20), pull.opened(wanted, settings, self.store, self.watch) as puller:
            yield puller

    async def pull(self, name: str = "team/app:v1") -> bundle.Bundle:
        async with self.opened(name) as puller, puller.bundle("x86_64", await puller.digest()) as made:
            return made

    def log_in(self, text: str) -> None:
        path = self.root / "auth.json"
        path.write_text(text)
        self.logins = (path,)

    def left(self) -> list[str]:
        return sorted(path.name for path in (self.root / "blobs").glob("partial/*"))
