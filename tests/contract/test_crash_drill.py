# SPDX-License-Identifier: MIT
"""The crash drill: every boundary and every privileged request of every operation, times every victim.

A daemon is a process and its kills are real; the helper and the VMMs are fakes on real sockets, in here.
After each kill everything on the host has an owner, rows say what is so, the next operation works, and
nothing is left after a delete.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import multiprocessing
import os
import platform
import shutil
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger import guest_binary
from banger.contract import privileged, resources
from banger.images import publish, recipe, records
from banger.owner import config, migrations, store
from tests import oci_make
from tests.contract import crash_daemon
from tests.contract.crash_daemon import Order, Report
from tests.contract.test_image_service import BASE, TOP, add
from tests.fakes import helper as helpers
from tests.fakes import registry as registries
from tests.fakes import world as worlds

pytestmark = [
    pytest.mark.timeout(240),
    # asyncio loses a connection that is accepted in the very moment in which a fake VMM dies.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
RUNNING = resources.VmState.RUNNING
ACTS: dict[str, tuple[str, ...]] = {
    "create": (),
    "throw_away": (),
    "start": ("create", "stop"),
    "stop": ("create",),
    "kill": ("create",),
    "restart": ("create",),
    "delete": ("create",),
}
"""Operations, and what comes before them."""
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.contract.crash_daemon"])
_TRUE_WITHIN_S = 10.0


class KilledError(Exception):
    """The daemon is no more."""


class Life:
    """A daemon from its start to its end."""

    def __init__(self, pid: int, pipe: connection.Connection) -> None:
        self.pid = pid
        self._pipe = pipe

    async def _ask(self, order: Order) -> Report:
        return await asyncio.to_thread(self._exchange, msgspec.json.encode(order))

    def _exchange(self, order: bytes) -> Report:
        try:
            self._pipe.send_bytes(order)
            return msgspec.json.decode(self._pipe.recv_bytes(), type=Report)
        except (EOFError, OSError):
            raise KilledError from None

    async def hello(self) -> None:
        await self._ask(Order("hello"))

    async def arm(self) -> None:
        await self._ask(Order("arm"))

    async def do(self, *names: str) -> Report:
        """The report of the last; those before it succeed."""
        for name in names[:-1]:
            report = await self._ask(Order("do", name))
            assert report.error == "", f"{name}: {report.error}"
        return await self._ask(Order("do", names[-1])) if names else Report()

    async def make(self, way: str, subject: str) -> Report:
        """An image."""
        return await self._ask(Order("do", way, subject))

    async def look(self) -> Report:
        return await self._ask(Order("look"))


class Host:
    """What survives: a helper, its world, and the VMMs in it.

    `strike` is called at each part of a request.
    """

    def __init__(self, paths: config.Paths, world: worlds.World) -> None:
        self.paths = paths
        self.world = world
        self.parts: list[str] = []
        self.strike: Callable[[privileged.Request[Any]], Awaitable[None]] = _nothing
        for part in ("before", "middle", "after"):
            setattr(world, part, self._hook(part))

    def _hook(self, part: str) -> worlds.Hook:
        async def heard(request: privileged.Request[Any]) -> None:
            self.parts.append(f"{type(request).__name__} {part}")
            await self.strike(request)

        return heard

    @contextlib.asynccontextmanager
    async def daemon(self, at: int = -1, *, files: bool = False) -> AsyncIterator[Life]:
        """A daemon that is ready. Leaving the block ends it; that it is dead already is fine."""
        ours, theirs = _FORKS.Pipe()
        process = _FORKS.Process(target=crash_daemon.live, args=(self.paths, at, files, theirs))
        await asyncio.to_thread(process.start)
        theirs.close()
        assert process.pid is not None
        try:
            life = Life(process.pid, ours)
            await life.hello()
            yield life
        finally:
            ours.close()
            await asyncio.to_thread(process.join)

    async def act(self, act: str, at: int = -1) -> Report | None:
        """Does what comes before, then the operation; None when it killed the daemon."""
        async with self.daemon(at) as life:
            await life.do(*ACTS[act])
            await life.arm()
            self.parts.clear()
            try:
                return await life.do(act)
            except KilledError:
                return None

    async def judge(self, where: str) -> None:
        """The next daemon finds order, works, and leaves nothing."""
        self.strike = _nothing
        async with self.daemon() as life:
            await self.judge_living(life, where)

    async def judge_living(self, life: Life, where: str) -> None:
        found = await self._true(life, where)
        if not found.vms:
            acts = ["create"]
        elif found.vms[0].state is RUNNING:
            acts = ["stop"]
        else:
            acts = ["start"]
        for act in (*acts, "delete"):
            again = await life.do(act)
            assert again.error == "", f"{where}: {act} afterwards: {again.error}"
            await self._true(life, f"{where}: {act} afterwards")
        assert self.world.leftovers() == {}, where
        assert not any(vm.logs for vm in self.world.vms.values()), where
        vms = self.paths.state / "vms"
        assert not vms.exists() or not any(vms.iterdir()), where

    async def _true(self, life: Life, where: str) -> Report:
        """Everything has an owner and rows say what is so, at once or as soon as the daemon has noticed."""
        deadline = time.monotonic() + _TRUE_WITHIN_S
        while True:
            report = await life.look()
            wrong = self._wrong(report)
            if not wrong:
                return report
            assert time.monotonic() < deadline, f"{where}: {wrong}"
            await asyncio.sleep(0.02)  # the daemon notices by itself; nothing tells us that it has

    def _wrong(self, report: Report) -> str:
        if report.leftovers:
            return f"nobody owns {report.leftovers}"
        running = {vm.id for vm in report.vms if vm.state is RUNNING}
        alive = {vm_id for vm_id, vm in self.world.vms.items() if vm.runs}
        if running != alive:
            return f"rows say that {running} run, and {alive} do"
        left = set(self.world.leftovers())
        return f"{left - running} have something left" if left - running else ""


async def _nothing(_: privileged.Request[Any]) -> None:
    return


@pytest.fixture
async def survivors(paths: config.Paths, world: worlds.World) -> AsyncIterator[Host]:
    """A helper on its socket, and no daemon."""
    host = Host(paths, world)
    async with helpers.FakeHelper(world).serving(paths.helper_socket):
        yield host
    gc.collect()  # here, where what asyncio lost is nobody's fault


# --- the daemon ---


@pytest.mark.parametrize("act", ACTS)
async def test_a_daemon_killed_at_every_boundary(survivors: Host, act: str) -> None:
    """Before every step, request and change of a row, and at the end."""
    whole = await survivors.act(act)
    assert whole is not None
    assert whole.error == ""
    await survivors.judge(f"{act}, not killed")
    for at, name in enumerate(whole.passed):
        assert await survivors.act(act, at) is None, f"{act} went past {name}"
        await survivors.judge(f"{act}, killed {name}")
    print(f"{len(whole.passed)} kills")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("both", [False, True], ids=["daemon", "both"])
async def test_a_daemon_killed_while_root_works(survivors: Host, act: str, both: bool) -> None:
    """Root goes on while the next daemon starts; or it is killed as well, between the parts of its work.

    Before and after its work is what killing the daemon at every boundary is about.
    """
    part = "middle" if both else "before"
    for at, name in await _parts(survivors, act):
        if not name.endswith(part):
            continue
        where = f"{act}, killed in {name}"
        struck, looked = asyncio.Event(), asyncio.Event()
        async with survivors.daemon() as life:
            await life.do(*ACTS[act])

            async def strike(
                request: privileged.Request[Any],
                at: int = at,
                pid: int = life.pid,
                struck: asyncio.Event = struck,
                looked: asyncio.Event = looked,
            ) -> None:
                if struck.is_set():
                    if isinstance(request, privileged.ListWorld):
                        looked.set()
                elif len(survivors.parts) > at:
                    struck.set()
                    os.kill(pid, signal.SIGKILL)
                    if both:
                        raise helpers.Killed
                    await looked.wait()

            survivors.parts.clear()
            survivors.strike = strike
            with pytest.raises(KilledError):
                await life.do(act)
        assert struck.is_set(), where
        async with survivors.daemon() as life:
            await life.look()
            survivors.strike = _nothing
            await survivors.judge_living(life, where)


@pytest.mark.parametrize("act", ["create", "start", "stop", "restart", "delete"])
async def test_a_host_that_loses_its_power(survivors: Host, act: str) -> None:
    """Before every change of a row, and at the end; the database is then as old as it can be."""
    whole = await survivors.act(act)
    assert whole is not None
    await survivors.judge(f"{act}, not killed")
    where = [at for at, name in enumerate(whole.passed) if name.startswith("row") or name == "end"]
    for at in where:
        assert await survivors.act(act, at) is None
        await survivors.world.lose_power()
        crash_daemon.lose_what_does_not_last(survivors.paths.database)
        await survivors.judge(f"{act}, no power before {whole.passed[at]}")


async def _parts(host: Host, act: str) -> list[tuple[int, str]]:
    """Every request of an operation, as it begins, between its parts, and as it ends."""
    whole = await host.act(act)
    assert whole is not None
    parts = list(enumerate(host.parts))
    await host.judge(f"{act}, not killed")
    return parts


# --- the helper, and the VMM ---


@pytest.mark.parametrize("act", ACTS)
async def test_a_helper_killed_in_every_request(survivors: Host, act: str) -> None:
    """The daemon lives, and cannot know whether what it asked was done."""
    await _struck_in_every_part(survivors, act, _kill_helper)


@pytest.mark.parametrize("act", ACTS)
async def test_a_vmm_killed_around_every_request(survivors: Host, act: str) -> None:
    async def kill_vmm() -> None:
        for vm in list(survivors.world.vms.values()):
            if vm.vmm is not None:
                await vm.vmm.kill()

    await _struck_in_every_part(survivors, act, kill_vmm)


async def _kill_helper() -> None:
    raise helpers.Killed


async def _struck_in_every_part(host: Host, act: str, blow: Callable[[], Awaitable[None]]) -> None:
    parts = await _parts(host, act)
    async with host.daemon() as life:
        for at, name in parts:
            await life.do(*ACTS[act])
            counting = itertools.count()

            async def strike(
                _: privileged.Request[Any], at: int = at, counting: Iterator[int] = counting
            ) -> None:
                if next(counting) == at:
                    await blow()

            host.strike = strike
            await life.do(act)
            host.strike = _nothing
            await host.judge_living(life, f"{act}, struck in {name}")


# --- files and rows ---


RECIPE = """
name = "smallest"
summary = "One file"
suite = "bookworm"
variant = "extract"
kernel = "tiny"
headroom_mib = 1
packages = ["hello"]
"""


@pytest.fixture
def registry() -> Iterator[registries.Registry]:
    with registries.serving() as made:
        add(made, "v1", BASE, TOP)
        yield made


@pytest.fixture
def packages(survivors: Host) -> Path:
    """What mmdebstrap has made of the recipe, in the cache; what it does itself is the root tier's."""
    made = recipe.parse(RECIPE.encode())
    kept = survivors.paths.cache / "recipes" / f"{made.name}-{made.base_key(platform.machine(), '')}.tar"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(oci_make.tar({"bin/hello": b"hello"}))
    return kept


@pytest.fixture
async def subjects(
    survivors: Host, registry: registries.Registry, packages: Path, tmp_path: Path
) -> dict[str, str]:
    """What each way makes an image of."""
    oci_make.layout(tmp_path / "layout", "v1", [BASE, TOP], {})
    elsewhere, arch = records.Images(tmp_path / "images"), platform.machine()
    here, there = [
        publish.build(
            elsewhere,
            recipe.parse(RECIPE.encode()),
            arch=arch,
            cache_dir=survivors.paths.cache,
            guest_binary=guest_binary.path(arch),
        )
        for _ in range(2)
    ]
    shutil.copytree(elsewhere.path(here.id), survivors.paths.state / "images" / here.id)
    return {
        "pull": f"{registry.host}/team/app:v1",
        "import": str(tmp_path / "layout"),
        "register": str(elsewhere.path(there.id)),
        "promote": here.name,
        "build": RECIPE,
    }


@pytest.mark.parametrize("way", ["pull", "import", "register", "promote", "build"])
async def test_an_image_killed_before_every_change_of_a_file(
    survivors: Host, subjects: dict[str, str], way: str
) -> None:
    """What was fetched may be kept; an image is whole or not there. Each life judges the one before it."""
    keep = {path.name for path in (survivors.paths.state / "images").iterdir()}
    before = {"tiny", "smallest"}
    at, killed, where = -1, True, f"{way}, not killed"
    while killed:
        async with survivors.daemon(at, files=True) as life:
            found = await life.look()
            assert found.leftovers == (), where
            assert before <= {*found.images} <= {*before, crash_daemon.IMAGE}, where
            if way == "register":  # under its own id, which can be there once
                _forget(survivors.paths, keep=keep)
            again = await life.make(way, subjects[way])
            assert again.error == "", f"{where}: {again.error}"
            assert {*(await life.look()).images} == {*before, crash_daemon.IMAGE}, where
            _forget(survivors.paths, keep=keep)
            await life.arm()
            try:
                whole = await life.make(way, subjects[way])
            except KilledError:
                where = f"{way}, killed at {at}"
            else:
                killed = at < 0
                where = f"{way}, which passes {whole.passed}"
        at += 1
    assert at > 5
    print(f"{at - 1} kills")


def _forget(paths: config.Paths, *, keep: set[str]) -> None:
    """As before: no image of it, no layer in the cache."""
    assert not [path for path in (paths.state / "images").iterdir() if path.name.startswith(".")]
    for path in (paths.state / "images").iterdir():
        if path.name not in keep:
            shutil.rmtree(path)
    shutil.rmtree(paths.cache / "blobs", ignore_errors=True)


@pytest.mark.parametrize("act", ["create", "delete"])
async def test_a_vm_killed_before_every_change_of_a_file(survivors: Host, act: str) -> None:
    async def life_of(at: int = -1) -> Report | None:
        async with survivors.daemon(at, files=True) as life:
            await life.do(*ACTS[act])
            await life.arm()
            try:
                return await life.do(act)
            except KilledError:
                return None

    whole = await life_of()
    assert whole is not None
    await survivors.judge("not killed")
    kills = 0
    for at, event in enumerate(whole.passed):
        # The first life makes keys besides, so a later one may pass fewer.
        kills += await life_of(at) is None
        await survivors.judge(f"{act}, killed at {at}, {event}")
    assert kills >= 5
    print(f"{kills} kills")


@pytest.mark.parametrize("version", range(len(migrations.MIGRATIONS)))
def test_a_migration_killed_before_every_statement(tmp_path: Path, version: int) -> None:
    path = tmp_path / "banger.db"
    whole = _migrated(_old_database(path, version), -1)
    assert whole is not None
    for at, statement in enumerate(whole):
        assert _migrated(_old_database(path, version), at) is None, statement
        with contextlib.closing(store.Store(path)) as rows:
            assert len(rows.list()) == min(version, 1), statement
        assert migrations.check(path) is migrations.Verdict.CURRENT, statement
    print(f"{len(whole)} kills")


def _old_database(path: Path, version: int) -> Path:
    """One of that version, with a row where there can be one."""
    for end in ("", "-wal", "-shm"):
        Path(f"{path}{end}").unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in migrations.MIGRATIONS[:version]:
            connection.execute(statement)
        if version:
            connection.execute(
                "INSERT INTO vms (id, name, slot, state, image_id, kernel_id, created_at, record)"
                " VALUES ('0123456789ab', 'web', 1, 'stopped', '', '', '', '{}')"
            )
        connection.execute(f"PRAGMA user_version = {version}")
        connection.commit()
    return path


def _migrated(path: Path, at: int) -> list[str] | None:
    """The statements of a daemon that opens it; None when it was killed before one."""
    ours, theirs = _FORKS.Pipe()
    process = _FORKS.Process(target=crash_daemon.migrate, args=(path, at, theirs))
    process.start()
    theirs.close()
    try:
        return msgspec.json.decode(ours.recv_bytes(), type=list[str])
    except EOFError:
        return None
    finally:
        ours.close()
        process.join()
