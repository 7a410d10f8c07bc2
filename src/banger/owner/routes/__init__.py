# SPDX-License-Identifier: MIT
"""The API's routes, one module per noun. They parse, call a service and answer; nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from litestar import di
from litestar.openapi import datastructures

from banger.contract import privileged
from banger.owner import (
    alterations,
    images,
    inventory,
    kernels,
    naming,
    operations,
    pulls,
    restarts,
    runtime,
    sessions,
    ssh,
    vms,
    workspaces,
)


@dataclass(frozen=True, slots=True)
class Services:
    """What the routes may call; made in `main.py`."""

    vms: vms.VmService
    alterations: alterations.Alterations
    sessions: sessions.Sessions
    workspaces: workspaces.WorkspaceService
    images: images.ImageService
    pulls: pulls.PullService
    kernels: kernels.KernelService
    operations: operations.Operations
    ops: privileged.PrivilegedOps
    ssh: ssh.SshKeys
    naming: naming.Naming
    runtime: runtime.RuntimeService
    inventory: inventory.Inventory
    restarts: restarts.Restarts
    started_at: datetime


Injected = di.NamedDependency[Services]
"""A handler's parameter that the application fills in."""


def answer(kind: Any, media_type: str = "application/json") -> dict[int, datastructures.ResponseSpec]:
    """For the OpenAPI document: what a handler answers that its signature cannot say."""
    return {
        200: datastructures.ResponseSpec(
            kind, generate_examples=False, description="Request fulfilled", media_type=media_type
        )
    }
