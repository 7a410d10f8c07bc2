# SPDX-License-Identifier: MIT
"""The crash drill of workspaces: a prepare is cut off everywhere, by the daemon's death and by the VMM's.

The agent is a real one of this machine, so what a prepare leaves is looked at here.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.contract import errors, guest, privileged, resources, transfers
from banger.workspace import repository, sending
from banger.workspace import snapshot as snapshots
from tests import oci_make
from tests.contract import repositories
from tests.contract.crash_daemon import Report
from tests.contract.crash_host import AGENT, RUNNING, Host, KilledError, Life, nothing

pytestmark = pytest.mark.timeout(120)
KINDS = ("new", "again", "copy")


class Recorded:
    """The daemon, as far as a client needs it to say all it has to: everything is missing in the guest."""

    def __init__(self, *, exists: bool) -> None:
        self.said: list[bytes] = []
        self._exists = exists

    def tell(self, message: resources.Body, /) -> None:
        self.said.append(msgspec.json.encode(message))

    def send(self, pieces: Iterable[bytes], /) -> int:
        self.said += [*pieces, b""]
        return 0

    def hear(self, kind: type[Any], /) -> Any:
        return transfers.Prepared() if kind is transfers.Prepared else kind(exists=self._exists)

    def pieces(self) -> Iterator[bytes]:
        yield from (b"%s missing\n" % line for line in self.said[-2].splitlines())


class Prepares:
    """One kind of prepare of one repository, and what a guest has that took it in."""

    def __init__(self, top: Path, kind: str) -> None:
        self._top = top
        self.kind = kind
        self.source = top / "here"
        repositories.plain(self.source)
        self._first = [self._recorded(exists=exists) for exists in (False, True)]
        if kind == "again":
            (self.source / "README").write_text("changed\n")
            (self.source / "more").write_text("more\n")
            repositories.commit(self.source)
        self._last = [self._recorded(exists=exists) for exists in (False, True)]
        self._names = repositories.tracked(self.source)
        self._whole = self._of(self.source)

    def repo(self, number: int) -> Path:
        return self._top / f"there-{number}" / "repo"

    def script(self, number: int, *, last: bool = True, discard: bool = False) -> str:
        """A file with what a client says that prepares this one."""
        request = transfers.PrepareRequest(
            path=str(self.repo(number)), discard=discard, full_copy=self.kind == "copy"
        )
        scripts = [[msgspec.json.encode(request)], *(self._last if last else self._first)]
        path = self._top / "script"
        path.write_bytes(msgspec.msgpack.encode(scripts))
        return str(path)

    def is_whole(self, number: int) -> bool:
        repo = self.repo(number)
        if self.kind == "copy":
            return (repo / "file").read_bytes() == b"copied"
        return self._of(repo) == self._whole

    def _of(self, repo: Path) -> tuple[bytes, object]:
        return repositories.status(repo), repositories.tree(repo, self._names)

    def _recorded(self, *, exists: bool) -> list[bytes]:
        exchange = Recorded(exists=exists)
        if self.kind == "copy":
            exchange.tell(transfers.PreparePlan(source=str(self.source)))
            exchange.send([oci_make.tar({"file": b"copied"})])
            return exchange.said
        with (
            snapshots.scratch(repository.find(self.source)) as scratch,
            contextlib.suppress(errors.ProtocolError),
        ):
            sending.send(exchange, scratch, scratch.take(), sending.Choice(), _unheard)
        return exchange.said[1:]


def _unheard(*_: object) -> None:
    """Progress."""


@pytest.fixture(params=KINDS)
def prepares(request: pytest.FixtureRequest, tmp_path: Path) -> Prepares:
    return Prepares(tmp_path, request.param)


@pytest.fixture
def inhabited(survivors: Host, native_agent: Path) -> Host:
    """Its guests run commands."""
    survivors.world.behaviour.agent = native_agent
    return survivors


async def judge(host: Host, life: Life, prepares: Prepares, number: int, where: str) -> None:
    """The row is true, there is no half of a workspace, and the next prepare makes a whole one."""
    row = (await host.true(life, where)).vms[0].workspace
    repo = prepares.repo(number)
    assert row is None or row.path != str(repo) or repo.exists(), where
    if prepares.kind != "again":
        assert not repo.exists() or prepares.is_whole(number), where
    done = await _again(life, prepares, number)
    assert done.error == "", f"{where}: {done.error}"
    assert prepares.is_whole(number), where
    assert [path.name for path in repo.parent.iterdir()] == ["repo"], where
    after = (await life.look()).vms[0].workspace
    assert after is not None
    assert after.path == str(repo), where


async def _again(life: Life, prepares: Prepares, number: int) -> Report:
    """What was cut off in a workspace that was there may say so, and wants to be told to go on."""
    if prepares.kind == "again":
        done = await life.make("prepare", prepares.script(number))
        if "an earlier prepare was interrupted" not in done.error:
            return done
    whole = prepares.repo(number).exists() and prepares.kind == "copy"
    return await life.make("prepare", prepares.script(number, discard=prepares.kind == "again" or whole))


async def test_a_daemon_killed_at_every_boundary_of_a_prepare(inhabited: Host, prepares: Prepares) -> None:
    """Before every message of the client's, answer, script in the guest and change of the row; and after."""
    passed: tuple[str, ...] = ()
    at, killed = -1, True
    while killed:
        async with inhabited.daemon(at) as life:
            if at < 0:
                await life.do("create")
            else:
                where = f"killed before {passed[at - 1 :][:1]}" if at else "not killed"
                await judge(inhabited, life, prepares, at - 1, f"{prepares.kind}, {where}")
            if prepares.kind == "again":
                first = await life.make("prepare", prepares.script(at, last=False))
                assert first.error == ""
            await life.arm()
            try:
                report = await life.make("prepare", prepares.script(at))
            except KilledError:
                at += 1
                continue
            assert report.error == ""
            assert prepares.is_whole(at)
            killed = at < 0
            passed = report.passed
        at += 1
    assert at > 8
    print(f"{at - 1} kills")


async def test_a_vmm_killed_around_everything_that_a_prepare_asks(
    inhabited: Host, prepares: Prepares
) -> None:
    """The prepare fails with a reason, or was done; and what it left is on the disk of the next start."""

    async def had(life: Life, number: int) -> None:
        if prepares.kind == "again":
            assert (await life.make("prepare", prepares.script(number, last=False))).error == ""
        await inhabited.answered()

    async with inhabited.daemon() as life:
        await life.do("create")
        await had(life, -1)
        inhabited.parts.clear()
        assert (await life.make("prepare", prepares.script(-1))).error == ""
        await inhabited.answered()
        parts = [name for name in inhabited.parts if name.startswith(AGENT)]
        assert {f"{AGENT} {kind.name} before" for kind in (guest.FrameType.EXEC, guest.FrameType.PUT)} <= {
            *parts
        }
        for number, name in enumerate(parts[:-1]):  # at the end of the last one, all is done
            where = f"{prepares.kind}, struck in {name}"
            await had(life, number)
            counting = itertools.count()

            async def strike(
                request: privileged.Request[Any] | None, at: int = number, counting: Iterator[int] = counting
            ) -> None:
                if request is None and next(counting) == at:
                    for vm in inhabited.world.vms.values():
                        assert vm.vmm is not None
                        await vm.vmm.kill()

            inhabited.strike = strike
            done = await life.make("prepare", prepares.script(number))
            await inhabited.answered()
            inhabited.strike = nothing
            assert next(counting) > number, f"{where}: it did not get so far"
            assert not done.error.startswith("unexpected"), f"{where}: {done.error}"
            if (await inhabited.true(life, where)).vms[0].state is not RUNNING:
                assert (await life.do("start")).error == "", where
            await judge(inhabited, life, prepares, number, where)
