# SPDX-License-Identifier: MIT
"""What users do inside running VMs: commands, connections to ports, and what they are told meanwhile.

Repositories and files go in and out in `workspaces.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from banger.contract import errors, names, ports, reach, resources
from banger.images import bundle
from banger.owner import claims, lifetimes, listeners, store, tunnels
from banger.owner import guest as guests
from banger.vm import command, record


class Sessions:
    """Holds no lock of a VM: stop and delete end what goes on here, by closing the agent's connections."""

    def __init__(
        self,
        rows: store.Store,
        connect: Callable[[names.VmId], guests.GuestClient],
        run_config: Callable[[names.ImageId], bundle.RunConfig],
        notices: lifetimes.Notices,
        delete: Callable[[str], Awaitable[object]],
        published: Callable[[record.VmRecord], Sequence[ports.Publish]],
    ) -> None:
        self.claims = claims.Claims(delete)
        self._rows = rows
        self._connect = connect
        self._run_config = run_config
        self._notices = notices
        self._delete = delete
        self._published = published

    def announced(self, ref: str, request: resources.ExecRequest) -> names.VmId:
        """From here on a VM made for this command goes with its client, whatever becomes of this daemon.

        Says which VM that is: by the end its name may be another's.
        """
        vm_id = self._rows.find(ref).id
        if request.remove:
            self._rows.set_throw_away(vm_id, throw_away=True)
            self.claims.claimed(vm_id)
        return vm_id

    @contextlib.asynccontextmanager
    async def exec(self, ref: str, request: resources.ExecRequest) -> AsyncIterator[guests.Exec]:
        vm = self._rows.find_running(self.announced(ref, request))
        spec = command.exec_spec(request, self._run_config(vm.image_id), _workspace_of(vm))
        try:
            async with self._connect(vm.id).exec(spec) as running:
                yield running
        except errors.BangerError as error:
            if told := command.explained(error, request, spec, vm.name):
                raise told from error
            raise

    async def finished(self, vm_id: names.VmId, request: resources.ExecRequest) -> None:
        """A VM of one command goes with it, however the command or its client ended.

        A daemon that is stopping leaves that to the next one.
        """
        if request.remove:
            self.claims.left(vm_id)
            with contextlib.suppress(errors.NotFoundError, errors.UnavailableError):
                await self._delete(vm_id)

    def notices(self, ref: str) -> contextlib.AbstractContextManager[asyncio.Queue[str]]:
        """What the VM's users are told, from now on."""
        return self._notices.heard(self._rows.find_running(ref).id)

    def connect(
        self, ref: str, request: reach.ConnectRequest
    ) -> contextlib.AbstractAsyncContextManager[guests.Tunnel]:
        """A port of a running VM. Raises RefusedError when nobody listens there in time."""
        vm = self._rows.find_running(ref)
        return tunnels.opened(self._connect(vm.id), vm.name, request)

    async def listening(self, ref: str) -> Sequence[ports.GuestPort]:
        vm = self._rows.find_running(ref)
        return await listeners.look(self._connect(vm.id), vm, self._published(vm))


def _workspace_of(vm: record.VmRecord) -> str:
    return vm.workspace.path if vm.workspace is not None else ""
