# SPDX-License-Identifier: MIT
"""The work disk: a second ext4 at /root, made from the image's seed, kept over stop and start."""

from __future__ import annotations

from collections.abc import Callable

from banger import run
from banger.contract import privileged
from banger.storage import grow
from banger.vm import capabilities


class WorkDisk:
    """`work.ext4` in the VM's directory, handed to the VMM as its second drive."""

    name = "work_disk"

    def __init__(
        self, authorized_key: Callable[[], str] = lambda: "", git_config: Callable[[], bytes] = lambda: b""
    ) -> None:
        """The line that lets the host's ssh in, and who commits there: asked for each disk, may block."""
        self._authorized_key = authorized_key
        self._git_config = git_config

    async def check(self, context: capabilities.Context) -> None:
        """Nothing beyond what the image already proved by being there."""

    async def uncheck(self, context: capabilities.Context) -> None:
        """Looking took nothing."""

    async def prepare(self, context: capabilities.Context) -> None:
        vm, layout = context.vm, context.host.layout
        path = layout.work_disk(vm.id)
        if not path.exists():
            from banger.storage import workdisk  # much, and for new disks alone

            context.created.add(self.name)
            # Threads that a cancelled start has ended before it takes anything back.
            key = await run.in_thread(self._authorized_key)
            git_config = await run.in_thread(self._git_config)
            await run.in_thread(
                workdisk.create,
                path,
                size_mib=vm.disk_size_mib,
                seed=layout.work_seed(vm.image_id),
                authorized_key=key,
                git_config=git_config,
            )
        else:
            await run.in_thread(grow.grow, path, size_mib=vm.disk_size_mib)
        await context.host.privileged(privileged.AttachWorkDisk(vm_id=vm.id, slot=vm.slot))

    async def after_start(self, context: capabilities.Context) -> None:
        """The guest mounts the disk itself."""

    async def clean_up(self, context: capabilities.Context) -> None:
        await context.host.privileged(privileged.DetachWorkDisk(vm_id=context.vm.id))
        if self.name in context.created:
            context.host.layout.work_disk(context.vm.id).unlink(missing_ok=True)
            context.created.discard(self.name)
