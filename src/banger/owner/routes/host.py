# SPDX-License-Identifier: MIT
"""/v1/inventory: what of banger's is on this host, and whose it is."""

from __future__ import annotations

from typing import Final

import litestar

from banger.contract import inventory, resources
from banger.owner import routes


@litestar.get("/v1/inventory")
async def get_inventory(services: routes.Injected) -> inventory.Inventory:
    """Everything of banger's on this host with its owner, looked for now; leftovers first."""
    return await services.inventory.take()


@litestar.post("/v1/inventory/collect", status_code=202)
async def collect_leftovers(services: routes.Injected) -> resources.Operation:
    """Takes away what has no owner, and nothing else."""
    return services.inventory.begin_collecting()


HANDLERS: Final = (get_inventory, collect_leftovers)
