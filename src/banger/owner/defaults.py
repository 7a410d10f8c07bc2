# SPDX-License-Identifier: MIT
"""From what was asked to what is made: request, then configuration, then the host, then a constant."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from banger.contract import errors, names, ports, resources
from banger.images import bundle
from banger.owner import admission, config, images, kernels, operations, pulls
from banger.vm import create

_VCPUS: Final = 2
_MEMORY_MIB: Final = 1024
_DISK_SIZE_MIB: Final = 8 * 1024
_LEAST_MEMORY_MIB: Final = 256


@dataclass(frozen=True, slots=True)
class _Program:
    """What a workspace may want of an image."""

    name: str
    does: str
    hint: str


_GIT: Final = _Program(
    "git",
    "takes a repository's history in",
    "use an image with git, or `--mode full-copy`, which needs none",
)
_MISE: Final = _Program(
    "mise",
    "installs the tools that the repository declares",
    "docs/workspace.md says how to make an image with mise; or do without: --no-bootstrap",
)


class Defaults:
    """Meets the VM service's Resolver."""

    def __init__(
        self,
        config: config.Config,
        images: images.ImageService,
        kernels: kernels.KernelService,
        pulls: pulls.PullService,
    ) -> None:
        self._config = config
        self._pulls = pulls
        self._images = images
        self._kernels = kernels

    def missing(self, body: resources.CreateVm) -> Sequence[operations.Work]:
        """How to get the kernel and the image, those of them that are not here and can be got.

        Raises NotFoundError for a kernel that cannot, MissingToolError for an image that would certainly
        lack what is wanted of it, BadRequestError for what no VM can be: before the image is got in vain.
        """
        create.access(body, ipv6=self._config.ipv6)
        ref = body.image or self._config.image
        is_here = self._images.knows(ref)
        making = None if is_here else self._pulls.how_to_obtain(ref)
        if making is None and not is_here:
            return ()
        for program in _wanted(body) if making is not None else ():
            if self._pulls.will_lack(ref, program.name):
                raise _lacking(ref, program)
        named = self._images.find(ref).kernel if making is None else making.kernel
        kernel = body.kernel or self._config.kernel or named
        pulling = self._kernels.how_to_obtain(kernel)
        if pulling is None:
            self._kernels.find(kernel)
        return [work for work in (pulling, making.work if making else None) if work is not None]

    def run_config(self, image_id: names.ImageId) -> bundle.RunConfig:
        """What the image says of running it; nothing when the image cannot be read any more."""
        try:
            return self._images.records.read(image_id).run
        except errors.BangerError:
            return bundle.RunConfig()

    def resolve(self, body: resources.CreateVm) -> create.Resolved:
        """Raises NotFoundError for an image or kernel that is not here, saying how to get it."""
        image = self._images.find(body.image or self._config.image)
        kernel = self._kernels.find(body.kernel or self._config.kernel or image.kernel)
        return create.Resolved(
            image_id=names.ImageId(image.id),
            kernel_id=names.KernelId(kernel.id),
            network=body.network,
            access=create.access(body, ipv6=self._config.ipv6),
            publish=tuple(map(str, ports.parse_all(body.publish))),
            idle_stop_s=body.idle_stop_s,
            ttl_s=body.ttl_s,
            autostart=body.autostart,
            **sizes(body, self._config),
        )

    async def require_programs(self, image_id: names.ImageId, body: resources.CreateVm) -> None:
        """Raises MissingToolError for an image that certainly lacks what is wanted of it."""
        for program in _wanted(body):
            if not await asyncio.to_thread(self._images.may_have, image_id, program.name):
                raise _lacking(self._images.name(image_id), program)

    def kernel_id(self, ref: str) -> names.KernelId:
        return names.KernelId(self._kernels.find(ref).id)


def _wanted(body: resources.CreateVm) -> list[_Program]:
    wanted = {_GIT: body.needs_git, _MISE: body.needs_mise}
    return [program for program, is_needed in wanted.items() if is_needed]


def _lacking(image: str, program: _Program) -> errors.MissingToolError:
    return errors.MissingToolError(
        f"image {image} has no {program.name}, which {program.does}", hint=program.hint, tool=program.name
    )


def sizes(body: resources.CreateVm, settings: config.Config) -> dict[str, create.Sized]:
    """The sizes of a VM by the names of its fields; of one for which nothing is asked, the defaults."""
    return {
        "vcpus": _sized(body.vcpus, settings.vcpus, _host_vcpus(), _VCPUS),
        "memory_mib": _sized(body.memory_mib, settings.memory_mib, _host_memory_mib(), _MEMORY_MIB),
        "disk_size_mib": _sized(body.disk_size_mib, settings.disk_size_mib, None, _DISK_SIZE_MIB),
    }


def effective(settings: config.Config) -> dict[str, dict[str, int | str]]:
    """What a VM gets for which nothing is asked, what all have together, and where each value comes from."""
    source = resources.SizeSource
    is_set = settings.image != config.Config().image
    values: dict[str, dict[str, int | str]] = {
        "image": {"value": settings.image, "source": source.CONFIG if is_set else source.DEFAULT}
    }
    if settings.kernel is not None:
        values["kernel"] = {"value": settings.kernel, "source": source.CONFIG}
    if settings.vms_memory_mib is not None:
        values["vms_memory_mib"] = {"value": settings.vms_memory_mib, "source": source.CONFIG}
    for name, sized in sizes(resources.CreateVm(), settings).items():
        values[name] = {"value": sized.value, "source": sized.source}
    return values


def _sized(asked: int | None, configured: int | None, host: int | None, default: int) -> create.Sized:
    source = resources.SizeSource
    if asked is not None:
        return create.Sized(asked, source.REQUEST)
    if configured is not None:
        return create.Sized(configured, source.CONFIG)
    if host is not None:
        return create.Sized(host, source.HOST)
    return create.Sized(default, source.DEFAULT)


def _host_vcpus() -> int | None:
    """A host with fewer processors than the default lends no more than it has."""
    count = os.cpu_count() or _VCPUS
    return count if count < _VCPUS else None


def _host_memory_mib() -> int | None:
    """At most a quarter of a small host's memory."""
    quarter = admission.host_memory_mib() // 4
    return max(_LEAST_MEMORY_MIB, quarter) if quarter < _MEMORY_MIB else None
