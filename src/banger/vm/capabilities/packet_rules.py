# SPDX-License-Identifier: MIT
"""What a VM's guest may send and reach: packet rules from its row, while it runs."""

from __future__ import annotations

from banger.contract import destinations, privileged
from banger.vm import capabilities, record


class PacketRules:
    """Before the tap comes, so that nothing ever passes unjudged."""

    name = "packet_rules"

    async def check(self, context: capabilities.Context) -> None:
        """The row was checked when it was made."""

    async def uncheck(self, context: capabilities.Context) -> None:
        """Looking took nothing."""

    async def prepare(self, context: capabilities.Context) -> None:
        if context.vm.network:
            await context.host.privileged(request(context.vm))

    async def after_start(self, context: capabilities.Context) -> None:
        """The guest needs to do nothing."""

    async def clean_up(self, context: capabilities.Context) -> None:
        await context.host.privileged(privileged.DeleteGuestRules(vm_id=context.vm.id))


def request(vm: record.VmRecord) -> privileged.SetGuestRules:
    """What the row wants; setting it again is harmless."""
    return privileged.SetGuestRules(
        vm_id=vm.id,
        slot=vm.slot,
        nat=vm.nat,
        egress=vm.egress,
        allow=destinations.networks(vm.allow),
        peers=vm.peers,
        ipv6=vm.ipv6,
    )
