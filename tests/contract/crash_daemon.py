# SPDX-License-Identifier: MIT
"""A daemon that is killed with SIGKILL where it is told to: the process side of the crash drill.

Forked from a server that has everything imported, so that a life costs a fraction of a second. It is the
daemon's own composition over the real client of the helper; the helper and the VMMs live in the test's
process and survive it. Nothing here runs after the kill: no handler, no `finally`, no flush.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from banger import steps
from banger.contract import errors, inventory, requests, resources, transfers
from banger.owner import composition, config, helper, operations, routes, store, workspaces
from banger.vm import start
from tests.contract import conftest

T = TypeVar("T")
NAME = "web"
IMAGE = "made"
_DONE_WITHIN_S = 60
_CHANGES = {
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.truncate",
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Order(msgspec.Struct, frozen=True):
    """What a life is told next. `kind` is hello, arm, do or look."""

    kind: str
    name: str = ""
    """Of the operation to do."""
    subject: str = ""
    """What an image is made of: a reference, a path, another image, a recipe. For `prepare`, a file that
    holds what the client says.
    """


class Report(msgspec.Struct, frozen=True):
    """What a daemon says after each order it outlived."""

    error: str = ""
    passed: tuple[str, ...] = ()
    vms: tuple[resources.Vm, ...] = ()
    images: tuple[str, ...] = ()
    leftovers: tuple[inventory.Thing, ...] = ()


class Boundaries:
    """Counts from `arm` on, and ends the process at the one it was told."""

    def __init__(self, at: int, *, power: bool = False) -> None:
        """`power`: what this process did to files, and did not wait for, goes with it."""
        self._at = at
        self._disk = Disk() if power else None
        self._armed = False
        self.passed: list[str] = []

    def arm(self) -> None:
        self._armed = True

    def disarm(self) -> None:
        self._armed = False

    def reach(self, name: str) -> None:
        if not self._armed:
            return
        if len(self.passed) == self._at:
            self._armed = False  # losing files is a change of files too
            if self._disk is not None:
                self._disk.lose()
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed.append(name)

    def watch_steps(self, database: Path) -> None:
        """Before each step and undo, each request to the helper, each script in a guest and change of a row.

        After one is before the next; after the last is the end of the operation.
        """
        steps_observed, call = steps._observed, helper.Client.call

        async def observed(step: steps.Step, name: str, action: steps.Action, observer: Any) -> None:
            self.reach(f"step {name}")
            await steps_observed(step, name, action, observer)

        async def called(client: helper.Client, request: Any, /) -> Any:
            self.reach(f"request {type(request).__struct_config__.tag}")
            return await call(client, request)

        steps._observed = observed
        helper.Client.call = called  # type: ignore[method-assign]
        for kind, name in ((workspaces._Guest, "run"), (workspaces._Guest, "put")):
            setattr(kind, name, self._around_script(name, getattr(kind, name)))
        for name in ("reserve", "save", "delete", "set_throw_away"):
            setattr(store.Store, name, self._around(name, getattr(store.Store, name)))
        lasting = store.Store._lasting

        @contextlib.contextmanager
        def copied(rows: store.Store) -> Iterator[None]:
            with lasting(rows):
                yield
            keep_what_lasts(database)

        store.Store._lasting = copied  # type: ignore[method-assign, assignment]

    def _around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **more: Any) -> Any:
            self.reach(f"row {name}")
            return function(*arguments, **more)

        return wrapped

    def _around_script(self, name: str, function: Callable[..., Awaitable[None]]) -> Callable[..., Any]:
        async def wrapped(*arguments: Any, **more: Any) -> None:
            self.reach(f"script {name}")
            await function(*arguments, **more)

        return wrapped

    def watch_files(self, *tops: Path) -> None:
        """Before each change below these directories; an audit hook sees those of every thread."""
        below = tuple(f"{top}/" for top in tops)

        def heard(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open":
                path, _, flags = arguments
                changes = isinstance(flags, int) and flags & _WRITES
            else:
                path, changes = (arguments or ("",))[0], event in _CHANGES
            if changes and (not isinstance(path, str | bytes | os.PathLike) or _is_below(path, below)):
                self.reach(event)
                if self._armed and self._disk is not None:
                    self._disk.heard(event, arguments)

        sys.addaudithook(heard)


class Disk:
    """What of files would be lost with the power: content without fsync, names whose directory had none.

    In the worst case: a disk may well have kept it. Directories that are made are kept.
    """

    def __init__(self) -> None:
        self._written: set[str] = set()
        self._named: list[tuple[str, str]] = []
        fsync = os.fsync

        def synced(descriptor: Any) -> None:
            fsync(descriptor)
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self._written.discard(path)
            self._named = [(old, new) for old, new in self._named if os.path.dirname(new) != path]

        os.fsync = synced  # type: ignore[assignment]

    def heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.fsdecode(arguments[0])
        if event in {"open", "os.truncate"}:
            self._written.add(path)
        elif event in {"os.rename", "os.link"}:
            new = os.fsdecode(arguments[1])
            self._named.append((path if event == "os.rename" else "", new))
            moved = {each for each in self._written if each == path or each.startswith(f"{path}/")}
            self._written |= {new + each.removeprefix(path) for each in moved}

    def lose(self) -> None:
        for path in self._written:
            with contextlib.suppress(OSError):
                os.truncate(path, 0)
        for old, new in reversed(self._named):
            with contextlib.suppress(OSError):
                if old:
                    os.rename(new, old)
                else:
                    os.unlink(new)


class Client:
    """Who has a repository taken in, by the messages that one sent: each of them is a boundary.

    `scripts`: the first message, what follows when the guest has no such workspace, and when it has one.
    """

    def __init__(self, boundaries: Boundaries, scripts: list[list[bytes]]) -> None:
        self.pid = os.getpid()
        self._boundaries = boundaries
        first, *self._later = scripts
        self._messages = iter(first)
        self._answered = False

    async def hear(self, kind: type[T], /) -> T:
        self._boundaries.reach(f"message {kind.__name__}")
        return msgspec.json.decode(next(self._messages), type=kind)

    async def pieces(self) -> AsyncIterator[bytes]:
        while True:
            self._boundaries.reach("message of data")
            data = next(self._messages)
            if not data:
                return
            yield data

    async def tell(self, message: resources.Resource, /) -> None:
        self._boundaries.reach(f"answer {type(message).__name__}")
        if isinstance(message, transfers.WorkspaceState):
            self._messages = iter(self._later[message.exists])

    async def send(self, data: bytes, /) -> None:
        if not self._answered:  # however many pieces it comes in
            self._boundaries.reach("answer of data")
        self._answered = True

    async def end(self) -> None:
        self._boundaries.reach("end of data")


def keep_what_lasts(database: Path) -> None:
    """A copy of what a power cut leaves of the database in the worst case: nothing after this moment."""
    for end in ("", "-wal"):
        source, target = Path(f"{database}{end}"), Path(f"{database}{end}.lasting")
        if source.exists():
            shutil.copyfile(source, target)


def lose_what_does_not_last(database: Path) -> None:
    """The database as the last `keep_what_lasts` saw it."""
    for end in ("", "-wal", "-shm"):
        kept, lost = Path(f"{database}{end}.lasting"), Path(f"{database}{end}")
        lost.unlink(missing_ok=True)
        if kept.exists():
            shutil.copyfile(kept, lost)


def _is_below(path: Any, tops: tuple[str, ...]) -> bool:
    """A name relative to a descriptor may be anywhere."""
    text = os.fsdecode(path)
    return not text.startswith("/") or text.startswith(tops)


def live(
    paths: config.Paths, at: int, files: bool, power: bool, armed: bool, pipe: connection.Connection
) -> None:
    """One life of a daemon, in a process of its own: it starts and obeys until the pipe closes.

    `at` is the boundary that it does not outlive, counted from `arm`, or from its start if it is `armed`;
    `files` says which are counted.
    """
    boundaries = Boundaries(at, power=power)
    if files:
        boundaries.watch_files(paths.state, paths.cache)
    else:
        boundaries.watch_steps(paths.database)
    if armed:
        boundaries.arm()
    asyncio.run(_live(paths, boundaries, pipe))


async def _live(paths: config.Paths, boundaries: Boundaries, pipe: connection.Connection) -> None:
    client = helper.Client(paths.helper_socket, operations.current_op_id.get, deadline_s=10)
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, client, "0" * 64) as services:
        with contextlib.suppress(EOFError):
            while True:
                order = msgspec.json.decode(await asyncio.to_thread(pipe.recv_bytes), type=Order)
                report = await _obey(order, services, boundaries)
                pipe.send_bytes(msgspec.json.encode(report))


async def _obey(order: Order, services: routes.Services, boundaries: Boundaries) -> Report:
    if order.kind == "hello":
        return Report()
    if order.kind == "arm":
        boundaries.arm()
        return Report()
    if order.kind == "do":
        error = await _done(services, boundaries, order)
        boundaries.reach("end")
        boundaries.disarm()
        return Report(error, tuple(boundaries.passed))
    return Report(
        passed=tuple(boundaries.passed),
        vms=tuple(await services.vms.list()),
        images=tuple(image.name for image in services.images.list()),
        leftovers=(await services.inventory.take()).leftovers,
    )


async def _done(services: routes.Services, boundaries: Boundaries, order: Order) -> str:
    """Begins an operation and waits for it; the error it ended with, or nothing."""
    name = order.name
    try:
        async with asyncio.timeout(_DONE_WITHIN_S):
            if name == "fail":
                start.Start._persist = _fail  # type: ignore[method-assign, assignment]
            if name == "prepare":
                await services.workspaces.prepare(NAME, Client(boundaries, _read(order.subject)))
                return ""
            begun = _MAKE[name](services, order.subject) if name in _MAKE else _BEGIN[name](services)
            operation = await begun if isinstance(begun, Awaitable) else begun
            ended = await services.operations.wait(operation.id)
    except errors.BangerError as failure:
        return str(failure)
    except Exception as failure:
        return f"unexpected error: {failure!r}"
    finally:
        start.Start._persist = _persist  # type: ignore[method-assign]
    return ended.error.message if ended.error is not None else ""


_persist = start.Start._persist


async def _fail(_: start.Start) -> None:
    """As a start's last step: whatever was made by then is taken back."""
    raise errors.OperationFailedError("it fails on purpose")


def _read(path: str) -> list[list[bytes]]:
    return msgspec.msgpack.decode(Path(path).read_bytes(), type=list[list[bytes]])


_BEGIN: dict[str, Callable[[routes.Services], Awaitable[resources.Operation]]] = {
    "create": lambda services: services.vms.create(resources.CreateVm(name=NAME)),
    "throw_away": lambda services: services.vms.create(
        resources.CreateVm(name=NAME, remove_on_failure=True)
    ),
    "start": lambda services: services.vms.start(NAME),
    "fail": lambda services: services.vms.start(NAME),
    "stop": lambda services: services.vms.stop(NAME),
    "kill": lambda services: services.vms.kill(NAME),
    "restart": lambda services: services.vms.restart(NAME),
    "delete": lambda services: services.vms.delete(NAME),
}
_MAKE: dict[str, Callable[[routes.Services, str], resources.Operation | Awaitable[resources.Operation]]] = {
    "pull": lambda services, ref: services.pulls.pull(requests.PullImage(reference=ref, name=IMAGE)),
    "import": lambda services, path: services.pulls.import_path(requests.ImportImage(path=path, name=IMAGE)),
    "register": lambda services, path: services.images.register(
        requests.RegisterImage(path=path, name=IMAGE)
    ),
    "promote": lambda services, ref: services.images.promote(ref, requests.PromoteImage(name=IMAGE)),
    "build": lambda services, text: services.images.build(requests.BuildImage(definition=text, name=IMAGE)),
}


def migrate(path: Path, at: int, pipe: connection.Connection) -> None:
    """Opens the database, and dies with the host before its statement or change of a file number `at`.

    Else says what it did. SQLite itself waits for what it writes.
    """
    boundaries = Boundaries(at, power=True)
    boundaries.watch_files(path.parent)
    boundaries.arm()
    connect = store.connect

    def traced(path: Path) -> sqlite3.Connection:
        made = connect(path)
        made.set_trace_callback(lambda text: boundaries.reach(text.split("\n")[0]))
        return made

    store.connect = traced
    store.Store(path).close()
    pipe.send_bytes(msgspec.json.encode(boundaries.passed))
