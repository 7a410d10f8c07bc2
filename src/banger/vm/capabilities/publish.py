# SPDX-License-Identifier: MIT
"""Published ports: taken before the VM is made to run, served from when its agent answers until it ends."""

from __future__ import annotations

from typing import Protocol

from banger.contract import names
from banger.vm import capabilities, record


class Publisher(Protocol):
    """Who listens on the host."""

    def take(self, vm: record.VmRecord, /) -> None:
        """Binds the ports. Raises AlreadyExistsError for one that is in use; takes none then."""

    async def serve(self, vm: record.VmRecord, /) -> None: ...

    async def release(self, vm_id: names.VmId, /) -> None: ...


class Publish:
    name = "publish"

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def check(self, context: capabilities.Context) -> None:
        """The earliest moment: nothing is made yet."""
        self._publisher.take(context.vm)

    async def uncheck(self, context: capabilities.Context) -> None:
        await self._publisher.release(context.vm.id)

    async def prepare(self, context: capabilities.Context) -> None:
        """Again, for a caller that does not check; taking what is taken already is nothing."""
        self._publisher.take(context.vm)

    async def after_start(self, context: capabilities.Context) -> None:
        await self._publisher.serve(context.vm)

    async def clean_up(self, context: capabilities.Context) -> None:
        await self._publisher.release(context.vm.id)
