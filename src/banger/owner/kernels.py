# SPDX-License-Identifier: MIT
"""The kernel service: pulled from the catalog or imported, as operations."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from banger import artefacts, guest_binary, run
from banger.contract import errors, given_names, requests, resources
from banger.kernels import catalog, records
from banger.owner import locks, operations, store

# What an entry's file turns out to be is known when it is here.
_KINDS: Final = {catalog.Library: "direct", catalog.Package: "initrd"}
Work = Callable[[operations.Progress], Awaitable[resources.Kernel]]


class KernelService:
    """Publication is one rename; deleting refuses while a VM boots with the kernel."""

    def __init__(
        self,
        root: Path,
        cache: Path,
        catalogs: Path,
        store: store.Store,
        operations: operations.Operations,
    ) -> None:
        self._kernels = records.Kernels(root)
        self._cache = cache
        self._catalogs = catalogs
        self._store = store
        self._operations = operations
        self._making: locks.Shared[records.Kernel] = locks.Shared()

    def names(self) -> dict[str, str]:
        """By id."""
        return self._kernels.names()

    def list(self, *, available: bool = False) -> list[resources.Kernel]:
        """With `available`, also what the catalog could pull."""
        here = [self._view(kernel) for kernel in self._kernels.records()]
        if not available:
            return here
        known = {kernel.name for kernel in here}
        return here + [_offered(entry) for entry in self._offers() if entry.name not in known]

    def get(self, ref: str) -> resources.Kernel:
        return self._view(self._kernels.find(ref))

    def find(self, ref: str) -> records.Kernel:
        """Raises NotFoundError with how to get the kernel."""
        try:
            return self._kernels.find(ref)
        except errors.NotFoundError as error:
            with contextlib.suppress(errors.BangerError):
                if ref in {entry.name for entry in self._offers()}:
                    error.hint = f"pull it: `banger kernel pull {ref}`"
            raise

    def _offers(self) -> tuple[catalog.Entry, ...]:
        """Read each time: a host's own file is there as soon as it is written."""
        return catalog.entries(platform.machine(), self._catalogs)

    def name(self, kernel_id: str) -> str:
        """For showing; the id itself when the kernel is gone."""
        try:
            return self._kernels.read(kernel_id).name
        except (errors.BangerError, OSError):  # no more files can be opened: a VM is shown all the same
            return kernel_id

    def pull(self, body: requests.PullKernel) -> resources.Operation:
        """Raises ConflictError while another kernel is made under that name; the same is made once."""
        entry = catalog.find(body.name, platform.machine(), self._catalogs)
        return self._operations.start("kernel.pull", body.name, self._pulling(entry))

    def how_to_obtain(self, ref: str) -> Work | None:
        """For a kernel that is not here, and that the catalog has."""
        with contextlib.suppress(errors.NotFoundError):
            self._kernels.find(ref)
            return None
        try:
            offers = self._offers()
        except errors.BadRequestError:  # what is wrong with a catalog is said by its own commands
            return None
        entry = next((entry for entry in offers if entry.name == ref), None)
        return None if entry is None else self._pulling(entry)

    def _pulling(self, entry: catalog.Entry) -> Work:
        arch = platform.machine()

        async def make(progress: operations.Progress) -> records.Kernel:
            return await run.in_thread(
                catalog.pull,
                self._kernels,
                entry,
                cache_dir=self._cache,
                guest_binary=guest_binary.path(arch),
                on_line=progress.line(),
            )

        return self._making_of(entry.name, entry, f"pulling {entry.name}", make)

    def import_path(self, body: requests.ImportKernel) -> resources.Operation:
        """Raises ConflictError while another kernel is made under that name; the same is made once."""
        name = given_names.parse_artefact_name(body.name, "a kernel")

        if not body.path.startswith("/") or "\0" in body.path:
            raise errors.BadRequestError(f"{body.path!r} is not an absolute path")

        from banger.kernels import importer

        async def make(progress: operations.Progress) -> records.Kernel:
            return await run.in_thread(
                importer.import_path,
                self._kernels,
                Path(body.path),
                name=name,
                guest_binary=guest_binary.path(platform.machine()),
                on_line=progress.line(),
            )

        work = self._making_of(name, body.path, f"importing {body.path}", make)
        return self._operations.start("kernel.import", name, work)

    def _making_of(
        self,
        name: str,
        what: object,
        detail: str,
        make: Callable[[operations.Progress], Awaitable[records.Kernel]],
    ) -> Work:
        """As an operation of its own, or as the beginning of another one."""
        self._making.check(name, what)

        async def work(progress: operations.Progress) -> resources.Kernel:
            async def whole() -> records.Kernel:
                with self._kernels.whole(self._store.names_using_kernel):
                    return await make(progress)

            progress.stage(resources.Stage.PULL_KERNEL, detail)
            made = await self._making.make(
                name, what, whole, operation=progress.op_id, on_wait=progress.note
            )
            return self._view(made)

        return work

    def delete(self, ref: str) -> None:
        """Raises ConflictError while VMs boot with it."""
        kernel_id = ref if self._kernels.is_broken(ref) else self._kernels.find(ref).id
        users = self._store.names_using_kernel(kernel_id)
        if users:
            raise errors.ConflictError(
                f"kernel {self.name(kernel_id)} is used by {', '.join(users)}", hint="delete these VMs first"
            )
        self._kernels.delete(kernel_id)

    def _view(self, kernel: records.Kernel) -> resources.Kernel:
        return resources.Kernel(
            id=kernel.id,
            name=kernel.name,
            kind=kernel.kind,
            version=kernel.version,
            arch=kernel.arch,
            size_bytes=kernel.vmlinux_bytes + kernel.initrd_bytes,
            source=kernel.source,
            created_at=artefacts.moment(kernel.created_at),
            used_by=self._store.names_using_kernel(kernel.id),
            modules=kernel.modules,
            checked_by=kernel.checked_by,
            lacks=kernel.lacks,
            unknown=kernel.unknown,
        )


def _offered(entry: catalog.Entry) -> resources.Kernel:
    return resources.Kernel(
        id="",
        name=entry.name,
        kind=_KINDS.get(type(entry.source), ""),
        version="",
        arch=entry.arch,
        size_bytes=0,
        source=entry.summary,
        available=True,
    )
