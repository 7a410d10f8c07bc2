# SPDX-License-Identifier: MIT
"""What the owner's files have lost, or say no more: it is named, and keeps nothing from being taken away."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from banger.contract import resources
from banger.owner import composition, config
from tests.contract import conftest
from tests.fakes import world as worlds


async def test_an_image_that_lost_its_seed_gives_no_vm_an_empty_home(daemon: conftest.Daemon) -> None:
    seed = daemon.paths.state / "images" / conftest.IMAGE_ID / "work-seed.tar"
    kept = seed.read_bytes()
    seed.unlink()
    created = await daemon.create()
    assert created.error is not None
    assert (created.error.code, created.error.step) == ("not_found", "prepare_host_features")
    assert str(seed) in created.error.message
    assert daemon.world.leftovers() == {}
    seed.write_bytes(kept)
    assert (await daemon.done(await daemon.services.vms.start("web"))).error is None


async def test_a_vm_whose_row_is_corrupt_is_deleted_like_any_other(
    paths: config.Paths, world: worlds.World
) -> None:
    """By what its columns say, or by its id: what it has on the host follows from that."""
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        daemon = conftest.Daemon(services, paths, world)
        for name in ("web", "other", "third"):
            assert (await daemon.create(name)).error is None
        _spoil(paths.database, "web")
        assert (await daemon.done(await services.vms.delete("web"))).error is None
        assert {vm.name for vm in await services.vms.list()} == {"other", "third"}
        _spoil(paths.database, "third")
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        daemon = conftest.Daemon(services, paths, world)
        found = {vm.name: vm for vm in await services.vms.list()}
        assert found["other"].state is resources.VmState.RUNNING
        assert found["third"].last_error is not None
        assert "banger vm delete third" in found["third"].last_error.hint
        assert (await daemon.done(await services.vms.delete("third"))).error is None
        assert set(world.leftovers()) == {found["other"].id}
        assert [path.name for path in (paths.state / "vms").iterdir()] == [found["other"].id]


def _spoil(database: Path, name: str) -> None:
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as outside:
        outside.execute("UPDATE vms SET record = '{' WHERE name = ?", (name,))
