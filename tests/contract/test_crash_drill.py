# SPDX-License-Identifier: MIT
"""The crash drill: every boundary and every privileged request of every operation, times every victim.

A daemon is a process and its kills are real; the helper and the VMMs are fakes on real sockets, in here.
After each kill everything on the host has an owner, rows say what is so, the next operation works, and
nothing is left after a delete.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import platform
import shutil
import signal
import sqlite3
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger import guest_binary
from banger.contract import privileged
from banger.images import publish, recipe, records
from banger.owner import config, migrations, store
from tests import oci_make
from tests.contract import crash_daemon
from tests.contract.crash_host import ACTS, AGENT, FORKS, Host, KilledError, nothing
from tests.contract.test_image_service import BASE, TOP, add
from tests.fakes import helper as helpers
from tests.fakes import registry as registries

pytestmark = pytest.mark.timeout(240)


# --- the daemon ---


@pytest.mark.parametrize("act", ACTS)
async def test_a_daemon_killed_at_every_boundary(survivors: Host, act: str) -> None:
    """Before every step, request and change of a row, and at the end."""
    whole = await survivors.act(act)
    assert whole is not None
    assert whole.error == ("it fails on purpose" if act == "fail" else "")
    await survivors.judge(f"{act}, not killed")
    for at, name in _its_own(act, whole.passed, "step rollback_firecracker_launch"):
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
        if name.startswith(AGENT) or not name.endswith(part):
            continue
        where = f"{act}, killed in {name}"
        struck, looked = asyncio.Event(), asyncio.Event()
        async with survivors.daemon() as life:
            await life.do(*ACTS[act])

            async def strike(
                request: privileged.Request[Any] | None,
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
            survivors.strike = nothing
            await survivors.judge_living(life, where)


def _its_own(act: str, passed: Sequence[str], first: str) -> list[tuple[int, str]]:
    """What an operation passes, but of one that fails only what takes back: it is a start until then."""
    begins = passed.index(first) if act == "fail" else 0
    return list(enumerate(passed))[begins:]


async def _left_by_a_start(host: Host) -> None:
    """It was about to be written down that it runs."""
    whole = await host.act("create")
    assert whole is not None
    await host.judge("create, not killed")
    assert await host.act("create", whole.passed.index("step persist")) is None


async def _left_by_a_delete(host: Host) -> None:
    whole = await host.act("delete")
    assert whole is not None
    await host.judge("delete, not killed")
    assert await host.act("delete", whole.passed.index("row delete")) is None


async def _left_by_a_vmm(host: Host) -> None:
    """It ended when no daemon was there."""
    assert await host.act("create") is not None
    await host.world.close()


async def _left_by_nobody(host: Host) -> None:
    """What no row owns: its database is an older one."""
    assert await host.act("create") is not None
    with contextlib.closing(store.Store(host.paths.database)) as rows:
        rows.delete(rows.list()[0].id)


@pytest.mark.parametrize("leave", [_left_by_a_start, _left_by_a_delete, _left_by_a_vmm, _left_by_nobody])
async def test_a_daemon_killed_as_it_cleans_up(
    survivors: Host, leave: Callable[[Host], Awaitable[None]]
) -> None:
    """Before everything that it asks and writes as it starts; the next one has the rest to do."""
    killed, at = True, 0
    while killed:
        await leave(survivors)
        try:
            async with survivors.daemon(at, armed=True) as life:
                await life.arm()
        except KilledError:
            at += 1
        else:
            killed = False
        await survivors.judge(f"{leave.__name__}, killed at {at} of a start")
    assert at >= 2
    print(f"{at} kills")


@pytest.mark.parametrize("act", [act for act in ACTS if act != "fail"])
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
        there = _was_told(act, at, whole.passed[at])
        await survivors.judge(f"{act}, no power before {whole.passed[at]}", there=there)


def _was_told(act: str, at: int, name: str) -> bool | None:
    """Whether somebody knows that the VM is there, or that it is not; None: either will do."""
    match act:
        case "create":
            return at > 0
        case "throw_away":
            return True if name == "end" else None
        case "delete":
            return name in {"row save", "row set_throw_away"}  # from then on its disks go
    return True


async def _parts(host: Host, act: str) -> list[tuple[int, str]]:
    """Every request of an operation, to root and to agents: as it begins, between its parts, as it ends."""
    whole = await host.act(act)
    assert whole is not None
    parts = _its_own(act, host.parts, "KillVmm before")
    await host.judge(f"{act}, not killed")
    return parts


# --- the helper, and the VMM ---

NOT_DRILLED = {
    privileged.GetHost, privileged.ListWorld,  # they change nothing
    privileged.RouteResolver,  # a daemon asks it as it starts, of a bridge that no VM owns
    privileged.UnrouteResolver, privileged.DeleteBridge,  # who uninstalls asks it
    privileged.AllowAddresses,  # no operation asks it, but a guest's question, and it ends by itself
}  # fmt: skip


async def test_all_that_root_can_be_asked_is_in_the_drill(survivors: Host) -> None:
    asked = {name.split()[0] for act in ACTS for _, name in await _parts(survivors, act)}
    assert asked - {AGENT} == {each.__name__ for each in {*privileged.REQUEST_TYPES} - NOT_DRILLED}


@pytest.mark.parametrize("act", ACTS)
async def test_a_helper_killed_in_every_request(survivors: Host, act: str) -> None:
    """The daemon lives, and cannot know whether what it asked was done."""

    async def kill_helper() -> None:
        raise helpers.Killed

    parts = [part for part in await _parts(survivors, act) if not part[1].startswith(AGENT)]
    await _struck(survivors, act, parts, kill_helper)


@pytest.mark.parametrize("act", ACTS)
async def test_a_vmm_killed_around_every_request(survivors: Host, act: str) -> None:
    """Also right after its agent answered, when nothing more is asked of it."""

    async def kill_vmm() -> None:
        for vm in list(survivors.world.vms.values()):
            if vm.vmm is not None:
                await vm.vmm.kill()

    parts = await _parts(survivors, act)
    asked = [name for _, name in parts if name.startswith(AGENT)]
    assert ("agent HEALTH after" in asked) == (act in {"create", "throw_away", "start", "restart"})
    await _struck(survivors, act, parts, kill_vmm)


async def _struck(
    host: Host, act: str, parts: list[tuple[int, str]], blow: Callable[[], Awaitable[None]]
) -> None:
    async with host.daemon() as life:
        for at, name in parts:
            await life.do(*ACTS[act])
            counting = itertools.count()

            async def strike(
                _: privileged.Request[Any] | None, at: int = at, counting: Iterator[int] = counting
            ) -> None:
                if next(counting) == at:
                    await blow()

            await host.answered()
            host.strike = strike
            ended = await life.do(act)
            assert "unexpected error" not in ended.error, f"{act}, struck in {name}: {ended.error}"
            await host.answered()
            host.strike = nothing
            where = f"{act}, struck in {name}"
            assert next(counting) > at, f"{where}: it did not get so far"
            await host.judge_living(life, where)


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


@pytest.mark.parametrize("way", ["import", "promote"])
async def test_an_image_is_on_the_disk_when_it_has_its_name(
    survivors: Host, subjects: dict[str, str], way: str
) -> None:
    """The power goes around its publication, and when it was said to be there: from then on it has to be."""
    kept = [*(survivors.paths.state / "images").iterdir()]
    async with survivors.daemon(files=True) as life:
        await life.arm()
        whole = (await life.make(way, subjects[way])).passed
    sizes = _new_image(survivors.paths, kept)
    assert sizes
    _forget(survivors.paths, keep={path.name for path in kept})
    assert "os.rename" in whole[-8:], whole
    for at in range(max(0, len(whole) - 8), len(whole)):
        where = f"{way}, no power before {whole[at:][:1]}, {at} of {len(whole)}"
        async with survivors.daemon(at, files=True, power=True) as life:
            await life.arm()
            with pytest.raises(KilledError):
                await life.make(way, subjects[way])
        async with survivors.daemon() as life:
            assert (await life.look()).leftovers == (), where
        found = _new_image(survivors.paths, kept)
        assert found in ({}, sizes), where
        assert found or whole[at] != "end", where
        _forget(survivors.paths, keep={path.name for path in kept})


def _new_image(paths: config.Paths, kept: list[Path]) -> dict[str, int]:
    """The sizes of its files; nothing when there is none."""
    return {
        file.name: file.stat().st_size
        for path in (paths.state / "images").iterdir()
        if path not in kept
        for file in path.iterdir()
    }


@pytest.mark.parametrize("act", ["create", "delete"])
@pytest.mark.parametrize("power", [False, True], ids=["daemon", "power"])
async def test_a_vm_killed_before_every_change_of_a_file(survivors: Host, act: str, power: bool) -> None:
    """Or the host's power lost, and with it whatever was not waited for."""
    whole = await survivors.act(act, files=True)
    assert whole is not None
    await survivors.judge("not killed")
    kills = 0
    for at, event in enumerate(whole.passed):
        # The first life makes keys besides, so a later one may pass fewer.
        kills += await survivors.act(act, at, files=True, power=power) is None
        if power:
            await survivors.world.lose_power()
        await survivors.judge(f"{act}, killed at {at}, {event}")
    assert kills >= 5
    print(f"{kills} kills")


@pytest.mark.parametrize("version", range(len(migrations.MIGRATIONS)))
def test_a_migration_killed_before_every_statement(tmp_path: Path, version: int) -> None:
    """And before every change of a file, with the power gone: what is kept for the way back is there."""
    path, kept = tmp_path / "banger.db", tmp_path / f"banger.db.v{version}"
    whole = _migrated(_old_database(path, version), -1)
    assert whole is not None
    assert ("os.rename" in whole) == kept.exists() == (version > 0)
    for at, statement in enumerate(whole):
        kept.unlink(missing_ok=True)
        assert _migrated(_old_database(path, version), at) is None, statement
        with contextlib.closing(store.Store(path)) as rows:
            assert len(rows.list()) == min(version, 1), statement
        assert migrations.check(path) is migrations.Verdict.CURRENT, statement
        assert kept.exists() == (version > 0), statement
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
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=crash_daemon.migrate, args=(path, at, theirs))
    process.start()
    theirs.close()
    try:
        return msgspec.json.decode(ours.recv_bytes(), type=list[str])
    except EOFError:
        return None
    finally:
        ours.close()
        process.join()
