# SPDX-License-Identifier: MIT
"""The runtime service: Firecracker and its jailer. The daemon fetches, only root installs."""

from __future__ import annotations

import asyncio
from pathlib import Path

from banger import pinned, run
from banger.contract import resources
from banger.owner import locks, operations
from banger.system import runtime


class RuntimeService:
    """What is installed, and what would be; pulling twice at once is done once."""

    def __init__(self, installed: Path, cache: Path, operations: operations.Operations) -> None:
        self._installed = installed
        self._cache = cache
        self._operations = operations
        self._pulling: locks.Shared[dict[str, pinned.Fetched]] = locks.Shared()

    async def status(self) -> list[resources.RuntimeFile]:
        found = await asyncio.to_thread(runtime.status, self._installed)
        return [_view(status) for status in found]

    async def firecracker_version(self) -> str:
        """As recorded when it was installed; empty when it is not."""
        record = await asyncio.to_thread(runtime.read_record, self._installed)
        return record["firecracker"].version if "firecracker" in record else ""

    def pull(self) -> resources.Operation:
        """Into the cache, where `banger system install` finds them."""

        async def work(progress: operations.Progress) -> None:
            progress.stage(resources.Stage.PULL_RUNTIME, "fetching Firecracker and its jailer")
            await self._pulling.make(
                "runtime",
                None,
                lambda: run.in_thread(runtime.pull, self._cache, on_line=progress.line()),
                operation=progress.op_id,
                on_wait=progress.note,
            )

        return self._operations.start("runtime.pull", "runtime", work)


def _view(status: runtime.Status) -> resources.RuntimeFile:
    return resources.RuntimeFile(
        name=status.name,
        path=status.path,
        present=status.present,
        version=status.version,
        sha256=status.sha256,
        verified=status.present and not status.problem,
        source=status.source,
    )
