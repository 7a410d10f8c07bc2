# SPDX-License-Identifier: MIT
"""/v1/images, /v1/kernels and /v1/runtime: what VMs are made from."""

from __future__ import annotations

from typing import Final

import litestar
from litestar import params

from banger.contract import requests, resources
from banger.owner import routes


@litestar.get("/v1/images", sync_to_thread=False)
def list_images(
    services: routes.Injected,
    ref: params.FromQuery[str] = "",
    available: params.FromQuery[bool] = False,
) -> list[resources.Image]:
    """All images, the oldest first; or the one that `ref` means. `available` adds what could be got."""
    here = services.images.list(ref)
    return here + services.pulls.available() if available else here


@litestar.get("/v1/images/{ref:str}", sync_to_thread=False)
def get_image(ref: params.FromPath[str], services: routes.Injected) -> resources.Image:
    """One image, by name or id."""
    return services.images.get(ref)


@litestar.delete("/v1/images/{ref:str}", sync_to_thread=False)
def delete_image(ref: params.FromPath[str], services: routes.Injected) -> None:
    """Deletes an image that no VM is made from."""
    services.images.delete(ref)


@litestar.post("/v1/images/build", status_code=202)
async def build_image(
    data: params.JSONBody[requests.BuildImage], services: routes.Injected
) -> resources.Operation:
    """Builds an image from a recipe."""
    return await services.images.build(data)


@litestar.post("/v1/images/register", status_code=202)
async def register_image(
    data: params.JSONBody[requests.RegisterImage], services: routes.Injected
) -> resources.Operation:
    """Copies an image that lies in a directory of this host."""
    return services.images.register(data)


@litestar.post("/v1/images/pull", status_code=202)
async def pull_image(
    data: params.JSONBody[requests.PullImage], services: routes.Injected
) -> resources.Operation:
    """Fetches an image from a registry, or gets what the catalog knows by that name."""
    return services.pulls.pull(data)


@litestar.post("/v1/images/import", status_code=202)
async def import_image(
    data: params.JSONBody[requests.ImportImage], services: routes.Injected
) -> resources.Operation:
    """Makes an image of a layout, archive or root file system on this host."""
    return services.pulls.import_path(data)


@litestar.post("/v1/images/{ref:str}/promote", status_code=202)
async def promote_image(
    ref: params.FromPath[str], data: params.JSONBody[requests.PromoteImage], services: routes.Injected
) -> resources.Operation:
    """Gives an image a name of its own."""
    return services.images.promote(ref, data)


@litestar.post("/v1/images/cache/prune", status_code=200)
async def prune_image_cache(
    data: params.JSONBody[requests.PruneCache], services: routes.Injected
) -> requests.PrunedCache:
    """Removes layers that no pull is using."""
    return services.pulls.prune(dry_run=data.dry_run)


@litestar.get("/v1/kernels", sync_to_thread=False)
def list_kernels(
    services: routes.Injected,
    available: params.FromQuery[bool] = False,
) -> list[resources.Kernel]:
    """All kernels; with `available`, also what the catalog could pull."""
    return services.kernels.list(available=available)


@litestar.get("/v1/kernels/{ref:str}", sync_to_thread=False)
def get_kernel(ref: params.FromPath[str], services: routes.Injected) -> resources.Kernel:
    """One kernel, by name or id."""
    return services.kernels.get(ref)


@litestar.delete("/v1/kernels/{ref:str}", sync_to_thread=False)
def delete_kernel(ref: params.FromPath[str], services: routes.Injected) -> None:
    """Deletes a kernel that no VM boots with."""
    services.kernels.delete(ref)


@litestar.post("/v1/kernels/pull", status_code=202)
async def pull_kernel(
    data: params.JSONBody[requests.PullKernel], services: routes.Injected
) -> resources.Operation:
    """Fetches and verifies a kernel of the catalog."""
    return services.kernels.pull(data)


@litestar.post("/v1/kernels/import", status_code=202)
async def import_kernel(
    data: params.JSONBody[requests.ImportKernel], services: routes.Injected
) -> resources.Operation:
    """Imports a kernel from a file or directory of this host."""
    return services.kernels.import_path(data)


@litestar.get("/v1/runtime")
async def get_runtime(services: routes.Injected) -> list[resources.RuntimeFile]:
    """Firecracker and its jailer, as installed."""
    return await services.runtime.status()


@litestar.post("/v1/runtime/pull", status_code=202)
async def pull_runtime(services: routes.Injected) -> resources.Operation:
    """Fetches and verifies Firecracker and its jailer, for root to install."""
    return services.runtime.pull()


HANDLERS: Final = (
    list_images,
    get_image,
    delete_image,
    build_image,
    register_image,
    pull_image,
    import_image,
    promote_image,
    prune_image_cache,
    list_kernels,
    get_kernel,
    delete_kernel,
    pull_kernel,
    import_kernel,
    get_runtime,
    pull_runtime,
)
