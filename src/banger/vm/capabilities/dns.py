# SPDX-License-Identifier: MIT
"""The VM's name in the DNS: there once its agent answers, gone before anything of it is taken down."""

from __future__ import annotations

import contextlib
from typing import Protocol

from banger.contract import names
from banger.vm import capabilities, record


class Zone(Protocol):
    """Who answers for names of VMs."""

    def add(self, vm: record.VmRecord, /) -> None: ...

    def remove(self, vm_id: names.VmId, /) -> None: ...

    def changing(self, vm_id: names.VmId, /) -> contextlib.AbstractAsyncContextManager[object]:
        """Opens nothing for the VM inside the block, in which what it may reach changes."""

    async def ensure_routed(self) -> None: ...


class Dns:
    """Only running VMs have names: `nobody.vm` is better than an address at which nobody is."""

    name = "dns"

    def __init__(self, zone: Zone) -> None:
        self._zone = zone

    async def check(self, context: capabilities.Context) -> None:
        """Nothing: a host without a resolver that asks us is no reason not to start."""

    async def uncheck(self, context: capabilities.Context) -> None:
        """Looking took nothing."""

    async def prepare(self, context: capabilities.Context) -> None:
        """The bridge is there by now."""
        if context.vm.network:
            await self._zone.ensure_routed()

    async def after_start(self, context: capabilities.Context) -> None:
        self._zone.add(context.vm)

    async def clean_up(self, context: capabilities.Context) -> None:
        self._zone.remove(context.vm.id)
