# SPDX-License-Identifier: MIT
"""/v1/images, /v1/kernels and /v1/runtime: what VMs are made from."""

from __future__ import annotations

from typing import Final

import litestar

from banger.contract import resources
from banger.owner import routes


@litestar.get("/v1/images", sync_to_thread=False)
def list_images(services: routes.Services) -> list[resources.Image]:
    return services.images.list()


@litestar.get("/v1/images/{ref:str}", sync_to_thread=False)
def get_image(ref: str, services: routes.Services) -> resources.Image:
    return services.images.get(ref)


@litestar.delete("/v1/images/{ref:str}", sync_to_thread=False)
def delete_image(ref: str, services: routes.Services) -> None:
    services.images.delete(ref)


@litestar.post("/v1/images/build", status_code=202)
async def build_image(data: resources.BuildImage, services: routes.Services) -> resources.Operation:
    return services.images.build(data)


@litestar.post("/v1/images/register", status_code=202)
async def register_image(data: resources.RegisterImage, services: routes.Services) -> resources.Operation:
    return services.images.register(data)


@litestar.get("/v1/kernels", sync_to_thread=False)
def list_kernels(
    services: routes.Services,
    available: bool = False,
) -> list[resources.Kernel]:
    return services.kernels.list(available=available)


@litestar.get("/v1/kernels/{ref:str}", sync_to_thread=False)
def get_kernel(ref: str, services: routes.Services) -> resources.Kernel:
    return services.kernels.get(ref)


@litestar.delete("/v1/kernels/{ref:str}", sync_to_thread=False)
def delete_kernel(ref: str, services: routes.Services) -> None:
    services.kernels.delete(ref)


@litestar.post("/v1/kernels/pull", status_code=202)
async def pull_kernel(data: resources.PullKernel, services: routes.Services) -> resources.Operation:
    return services.kernels.pull(data)


@litestar.post("/v1/kernels/import", status_code=202)
async def import_kernel(data: resources.ImportKernel, services: routes.Services) -> resources.Operation:
    return services.kernels.import_path(data)


@litestar.get("/v1/runtime")
async def get_runtime(services: routes.Services) -> list[resources.RuntimeFile]:
    return await services.runtime.status()


@litestar.post("/v1/runtime/pull", status_code=202)
async def pull_runtime(services: routes.Services) -> resources.Operation:
    return services.runtime.pull()


HANDLERS: Final = (
    list_images,
    get_image,
    delete_image,
    build_image,
    register_image,
    list_kernels,
    get_kernel,
    delete_kernel,
    pull_kernel,
    import_kernel,
    get_runtime,
    pull_runtime,
)
