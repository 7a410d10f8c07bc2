# SPDX-License-Identifier: MIT
"""The workspace service: a repository into a guest and its changes out, over the agent, held per VM.

The client reads the repository, for it may be anywhere that its user may read; this side does everything
that happens in the guest. A workspace's lock is its own: it never keeps a VM from being stopped or deleted,
which ends what is going on here by closing the agent's connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import logging
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Final, Protocol, TypeVar

import msgspec

from banger.contract import errors, guest, names, resources, transfers
from banger.owner import guest as guests
from banger.owner import locks, operations
from banger.vm import record, workspace, workspace_out

_log = logging.getLogger(__name__)

_MAX_SAID_BYTES: Final = 64 << 20
_MAX_LINE_BYTES: Final = 4096
_KEPT_LINES: Final = 20
_GUARD_S: Final = 20.0
"""For one mount in a guest that has just started."""
_TURN_S: Final = 600.0
"""How long a prepare waits for others: a client that was stopped may never go on."""
_MESSAGE: Final = "Work in progress in {name}"

T = TypeVar("T")


class Peer(Protocol):
    """The client: JSON messages, and streams of bytes that end."""

    @property
    def pid(self) -> int: ...

    async def hear(self, kind: type[T], /) -> T: ...

    def pieces(self) -> AsyncIterator[bytes]: ...

    async def tell(self, message: resources.Resource, /) -> None: ...

    async def send(self, data: bytes, /) -> None: ...

    async def end(self) -> None: ...


class Rows(Protocol):
    """What is needed of the store."""

    def find_running(self, ref: str, /) -> record.VmRecord: ...

    def get(self, vm_id: names.VmId, /) -> record.VmRecord: ...

    def save(self, vm: record.VmRecord, /) -> None: ...


class WorkspaceService:
    """Everything the API can do with repositories and files of running guests."""

    def __init__(self, store: Rows, connect: Callable[[names.VmId], guests.GuestClient]) -> None:
        self._store = store
        self._connect = connect
        self._locks = locks.Lifecycle()

    async def prepare(self, ref: str, peer: Peer) -> resources.Resource:
        """Takes a repository in. One at a time for each VM; the others wait."""
        request = await peer.hear(transfers.PrepareRequest)
        path = workspace.clean_path(request.path)
        found = self._store.find_running(ref)
        async with self._turn(found, request, peer):
            vm = self._store.find_running(found.id)
            vm.require_readable()
            inside = _Guest(vm.name, self._connect(vm.id))
            await self._make_writable(inside, vm, path)
            state = await self._inspect(inside, vm, path, request)
            changed = await self._changed(inside, vm, path, state, discard=request.discard)
            work = changed.exported if changed else None
            await peer.tell(transfers.WorkspaceState(exists=state.exists, tips=state.tips, work=work))
            plan = await peer.hear(transfers.PreparePlan)
            if work is None or not work.head or plan.has != work.head:
                workspace.refuse_to_lose(vm.name, path, state, discard=request.discard)
                changed = None
            taking = _Taking(inside, peer, path, plan, state, discard=request.discard, changed=changed)
            if request.full_copy:
                await taking.copy()
                self._store.save(msgspec.structs.replace(self._store.get(vm.id), placing=path))
                await taking.place()
            else:
                await taking.repository()
            if plan.read_only:
                await inside.run(workspace.LOCK, path, "1")
            made = self._remember(vm, path, plan)
        _log.info("workspace prepared", extra={"vm": vm.id, "path": path})
        return transfers.Prepared(workspace=made)

    @contextlib.asynccontextmanager
    async def _turn(
        self, vm: record.VmRecord, request: transfers.PrepareRequest, peer: Peer
    ) -> AsyncIterator[None]:
        """Raises DeadlineError, which names who has it, when it does not come."""
        holder = self._locks.holder(vm.id)
        if holder and request.notices:
            await peer.tell(transfers.WorkspaceState(exists=False, waiting_for=holder))
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(_TURN_S):
                    await stack.enter_async_context(self._locks.hold(vm.id, f"process {peer.pid}"))
            except TimeoutError:
                holder = self._locks.holder(vm.id) or "another client"
                raise errors.DeadlineError(
                    f"{holder} still prepares a workspace of {vm.name}, after {_TURN_S / 60:.0f} minutes",
                    hint="see whether it was stopped: end it, or let it go on",
                ) from None
            yield

    async def export(self, ref: str, peer: Peer) -> resources.Resource:
        """Gives out what changed since `base`; the guest's repository and index stay as they are."""
        request = await peer.hear(transfers.ExportRequest)
        vm = self._store.find_running(ref)
        path = workspace.clean_path(request.path) if request.path else _path_of(vm)
        output = _Headed(peer)
        await _Guest(vm.name, self._connect(vm.id)).run(
            workspace_out.EXPORT,
            path,
            request.form,
            request.base or "",
            _MESSAGE.format(name=vm.name),
            _base_of_copy(vm, path),
            output=output.take,
        )
        await output.finish()
        return transfers.Transferred(content_bytes=output.sent_bytes)

    async def put(self, ref: str, peer: Peer) -> resources.Resource:
        request = await peer.hear(transfers.PutRequest)
        spec = guest.PutSpec(request.path, uid=request.uid, gid=request.gid, make_directory=True)
        done = await self._connect(self._store.find_running(ref).id).put(spec, peer.pieces())
        return transfers.Transferred(entries=done.entries, content_bytes=done.content_bytes)

    async def get(self, ref: str, peer: Peer) -> resources.Resource:
        request = await peer.hear(transfers.GetRequest)
        spec = guest.GetSpec(request.path, follow_link=request.follow_link)
        count = 0
        async with self._connect(self._store.find_running(ref).id).get(spec) as archive:
            async for piece in archive:
                count += len(piece)
                await peer.send(piece)
        await peer.end()
        done = archive.done
        return transfers.Transferred(content_bytes=count, shrunk=done.shrunk, shrunk_count=done.shrunk_count)

    async def guard(self, vm: record.VmRecord) -> None:
        """Makes read-only again what was sent so. What cannot be is said, and keeps no VM from starting."""
        for each in vm.workspaces:
            if "read_only" not in each.options:
                continue
            try:
                async with asyncio.timeout(_GUARD_S):
                    await _Guest(vm.name, self._connect(vm.id)).run(workspace.LOCK, each.path, "1")
            except (errors.BangerError, TimeoutError) as error:
                _log.error("not read-only", extra={"vm": vm.id, "path": each.path, "error": str(error)})
                operations.note(f"{each.path} in {vm.name} is not read-only any more: {error}")

    async def _make_writable(self, inside: _Guest, vm: record.VmRecord, path: str) -> None:
        known = vm.workspace_at(path)
        if known is not None and "read_only" in known.options:
            await inside.run(workspace.LOCK, path, "0")

    async def _inspect(
        self, inside: _Guest, vm: record.VmRecord, path: str, request: transfers.PrepareRequest
    ) -> workspace.Found:
        kind = "copy" if request.full_copy else "git"
        found = workspace.parse_found(await inside.said(workspace.INSPECT, path, kind))
        known = path == vm.placing or vm.workspace_at(path) is not None
        if request.full_copy or (found.foreign and known):
            # Nothing tells what was changed in a copy.
            changed = () if not (found.exists or found.foreign) else ("it is there already",)
            found = dataclasses.replace(found, foreign=found.foreign and not known, changes=changed)
        if found.foreign or request.full_copy:
            workspace.refuse_to_lose(vm.name, path, found, discard=request.discard)
        return found

    async def _changed(
        self, inside: _Guest, vm: record.VmRecord, path: str, found: workspace.Found, *, discard: bool
    ) -> _Changed | None:
        """What was changed there; what is changed while we look is seen when it would be replaced."""
        if discard or not (found.exists and found.changes):
            return None
        tree = (await inside.said(workspace.SNAP, path)).decode(errors="replace").strip()
        if not transfers.is_object_id(tree):
            raise errors.ProtocolError("the guest named as a tree what is no object's id")
        head = workspace_out.Head()
        form = transfers.ExportForm.HEAD
        said = await inside.said(workspace_out.EXPORT, path, form, "", _MESSAGE.format(name=vm.name), "")
        if (exported := head.take(said)) is None:
            raise errors.ProtocolError("the guest exported nothing")
        return _Changed(tree, exported[0])

    def _remember(self, vm: record.VmRecord, path: str, plan: transfers.PreparePlan) -> resources.Workspace:
        made = resources.Workspace(
            path=path,
            source=plan.source,
            head=plan.head or "",
            branch=plan.branch or "",
            worktree=plan.worktree or "",
            index=plan.index or "",
            prepared_at=datetime.datetime.now(datetime.UTC),
            options=plan.options,
        )
        row = self._store.get(vm.id)
        self._store.save(msgspec.structs.replace(row.with_workspace(made), placing=""))
        return made


def _base_of_copy(vm: record.VmRecord, path: str) -> str:
    """The commit that a full copy began from, which only the row knows; empty for all else."""
    known = vm.workspace_at(path)
    if known is None or "full_copy" not in known.options:
        return ""
    return known.head or workspace_out.NOTHING


def _path_of(vm: record.VmRecord) -> str:
    if vm.workspace is None:
        raise errors.NotFoundError(
            f"{vm.name} has no workspace",
            hint=f"`banger vm workspace prepare {vm.name}` makes one; --guest-path names another repository",
        )
    return vm.workspace.path


@dataclasses.dataclass(frozen=True, slots=True)
class _Changed:
    """The guest's files as they lie there, and what an export of them would be."""

    tree: str
    exported: transfers.Exported


@dataclasses.dataclass(slots=True)
class _Taking:
    """One prepare, once the guest's state is known."""

    inside: _Guest
    peer: Peer
    path: str
    plan: transfers.PreparePlan
    found: workspace.Found
    discard: bool
    changed: _Changed | None = None
    """Of which the client has everything."""

    async def repository(self) -> None:
        plan, exists = self.plan, self.found.exists
        if not plan.worktree or not plan.index or not (plan.branch or plan.head):
            raise errors.BadRequestError("a plan names trees, and a branch or a commit")
        root = self.path if exists else workspace.staging(self.path)
        if exists:
            asking = _Asking(self.peer)
            await self.inside.run(workspace.MISSING, root, stdin=asking.ids(), output=asking.answer)
            await self.peer.end()
        await self.inside.run(
            workspace.RECEIVE, root, plan.object_format, str(int(not exists)), stdin=self.peer.pieces()
        )
        await self.inside.put(f"{root}/{workspace.INCOMING}", self.peer.pieces())
        await self.inside.run(
            workspace.SETTLE,
            root,
            self.path,
            plan.head or "",
            plan.branch or "",
            plan.worktree,
            plan.index,
            str(int(self.discard)),
            self.changed.tree if self.changed else "",
        )

    async def copy(self) -> None:
        """The tree, beside its place."""
        root = workspace.staging(self.path)
        await self.inside.run(workspace.CLEAR, root)
        await self.inside.put(root, self.peer.pieces())

    async def place(self) -> None:
        """It appears under its name only when it is whole."""
        root = workspace.staging(self.path)
        await self.inside.run(workspace.PLACE, root, self.path, str(int(self.discard)))


class _Asking:
    """Which objects the guest lacks: the client's ids go in and the answers out as they come.

    Of a large repository both are too long to be held, or to be one message.
    """

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._asked_bytes = 0
        self._answered_bytes = 0

    async def ids(self) -> AsyncIterator[bytes]:
        async for piece in self._peer.pieces():
            self._asked_bytes += len(piece)
            yield piece

    async def answer(self, data: bytes) -> None:
        """An id and a word for each: raises ProtocolError for what must be more than that."""
        self._answered_bytes += len(data)
        if self._answered_bytes > 2 * self._asked_bytes:
            raise errors.ProtocolError("the guest answers what it was not asked")
        await self._peer.send(data)


class _Headed:
    """Output of EXPORT: what it holds, then the data, which goes on to the client."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._head: workspace_out.Head | None = workspace_out.Head()
        self.sent_bytes = 0

    async def take(self, data: bytes) -> None:
        if self._head is not None:
            said = self._head.take(data)
            if said is None:
                return
            self._head = None
            exported, data = said
            await self._peer.tell(exported)
        if data:
            self.sent_bytes += len(data)
            await self._peer.send(data)

    async def finish(self) -> None:
        if self._head is not None:
            raise errors.ProtocolError("the guest exported nothing")
        await self._peer.end()


@dataclasses.dataclass(slots=True)
class _Guest:
    """Scripts in one guest."""

    name: str
    client: guests.GuestClient

    async def put(self, path: str, archive: AsyncIterable[bytes]) -> None:
        await self.client.put(guest.PutSpec(path, make_directory=True), archive)

    async def said(self, script: str, *arguments: str) -> bytes:
        """What a script printed. Raises ProtocolError when that is more than anybody asked for."""
        said = bytearray()

        async def keep(data: bytes) -> None:
            said.extend(data)
            if len(said) > _MAX_SAID_BYTES:
                raise errors.ProtocolError(f"{self.name} does not stop talking")

        await self.run(script, *arguments, output=keep)
        return bytes(said)

    async def run(
        self,
        script: str,
        *arguments: str,
        stdin: AsyncIterable[bytes] | None = None,
        output: Callable[[bytes], Awaitable[None]] | None = None,
    ) -> None:
        """To its end; an input that it does not read any more is left. Raises what it failed with."""
        spec = guest.ExecSpec(argv=workspace.argv(script, *arguments), cwd="/")
        async with self.client.exec(spec, stdin=stdin is not None) as running:
            reading = asyncio.create_task(self._read(running, output))
            feeding = asyncio.create_task(_feed(running, stdin))
            try:
                await asyncio.wait({reading, feeding}, return_when=asyncio.FIRST_COMPLETED)
                if feeding.done() and not reading.done():
                    feeding.result()
                await reading
            finally:
                for task in (reading, feeding):
                    task.cancel()
                await asyncio.gather(reading, feeding, return_exceptions=True)

    async def _read(self, running: guests.Exec, output: Callable[[bytes], Awaitable[None]] | None) -> None:
        complaint = bytearray()
        async for event in running.output():
            if isinstance(event, guest.ExitStatus):
                if event.as_shell:
                    raise workspace.script_failure(self.name, event.as_shell, _lines(complaint))
                return
            stream, data = event
            if stream == 1 and output is not None:
                await output(data)
            elif stream == 2:
                complaint += data
                del complaint[:-_MAX_LINE_BYTES]
        raise errors.ProtocolError("the guest's agent ended a command without a status")


async def _feed(running: guests.Exec, stdin: AsyncIterable[bytes] | None) -> None:
    if stdin is None:
        return
    async for piece in stdin:
        await running.write(piece)
    await running.close_stdin()


def _lines(data: bytes | bytearray) -> list[str]:
    return [guest.printable(line) for line in bytes(data).splitlines() if line.strip()][-_KEPT_LINES:]
