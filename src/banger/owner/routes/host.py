# SPDX-License-Identifier: MIT
"""/v1/inventory: what of banger's is on this host, and whose it is; and what is done as that goes down."""

from __future__ import annotations

from typing import Final

import litestar

from banger.contract import inventory, resources
from banger.owner import routes


@litestar.get("/v1/inventory")
async def get_inventory(services: routes.Injected) -> inventory.Inventory:
    """Everything of banger's on this host with its owner, looked for now; leftovers first."""
    return (await services.inventory.take()).sayable()


@litestar.post("/v1/inventory/collect", status_code=202)
async def collect_leftovers(services: routes.Injected) -> resources.Operation:
    """Takes away what has no owner, and nothing else."""
    return services.inventory.begin_collecting()


@litestar.post("/v1/host/stop-vms", status_code=202)
async def stop_vms(services: routes.Injected) -> resources.Operation:
    """Stops every VM in order, as before the host goes down; with `autostart` it starts again with that."""
    return services.restarts.begin_stopping()


HANDLERS: Final = (get_inventory, collect_leftovers, stop_vms)
