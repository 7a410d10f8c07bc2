# SPDX-License-Identifier: MIT
"""A daemon killed in every stage of a real build, as an ordinary user who can gain no privileges.

What the next daemon lists is whole; neither files nor programs of the last one are left; a build then works.
The crash drill has every instant of what comes after the packages.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401  # asyncio loads it when it is late: that user cannot
import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from banger import guest_binary, workers
from banger.contract import requests
from banger.images import ext4, recipe
from banger.owner import composition, operations
from tests.contract import conftest
from tests.fakes import world as worlds
from tests.root import test_image_build as builds

RECIPE: Final = "busybox"
IN_MMDEBSTRAP: Final = ("running apt-get update", "downloading packages", "extracting archives")
STAGES: Final = (*IN_MMDEBSTRAP, "unpacking layer 1", "making the file system")


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory of the ordinary user's."""
    with tempfile.TemporaryDirectory(prefix="banger-killed-") as name:
        path = Path(name)
        (path / "guest").write_bytes(b"\x7fELF stand-in")
        os.chown(path, builds.NOBODY, builds.NOBODY)
        path.chmod(0o755)
        try:
            yield path
        finally:
            workers.end(path)


@pytest.mark.timeout(180)
def test_a_daemon_killed_in_every_stage_of_a_build(home: Path) -> None:
    text = recipe.shipped(RECIPE).decode()  # that user may not read this tree
    builds.as_nobody(home, lambda: _kill_in_every_stage(home, text))


def _kill_in_every_stage(home: Path, text: str) -> None:
    """Each daemon judges the one before it."""
    left: list[Path] = []
    went_on = []
    for stage in STAGES:
        assert _ended(home, text, stage) == -signal.SIGKILL, stage
        assert not any(workers.at_work(each) for each in left), f"before {stage}"
        left = [*home.glob("c/recipes/.build-*")]
        went_on += [stage for each in left if workers.at_work(each)]
    assert went_on, "no program outlived its daemon, so this proves nothing"
    assert _ended(home, text) == 0
    print(f"programs outlived their daemon while: {', '.join(went_on)}")


def _ended(home: Path, definition: str, last_stage: str = "") -> int:
    """How a daemon ended that built an image: killed as it says that this stage begins, or 0."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            asyncio.run(_live(home, definition, last_stage))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


async def _live(home: Path, definition: str, last_stage: str) -> None:
    guest_binary.path = lambda arch: home / "guest"
    tell = operations.Progress.line

    def line(progress: operations.Progress) -> Callable[[str], None]:
        say = tell(progress)

        def heard(text: str) -> None:
            if last_stage and last_stage in text:
                os.kill(os.getpid(), signal.SIGKILL)
            say(text)

        return heard

    operations.Progress.line = line  # type: ignore[method-assign, assignment]
    paths = conftest.laid_out(home)
    paths.state.mkdir(exist_ok=True)
    world = worlds.World(state=paths.state, jails=home / "h" / "jails", logs=home / "h" / "logs")
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64) as services:
        assert services.images.list() == []
        assert (await services.inventory.take()).leftovers == ()
        assert [path.name for path in paths.cache.glob("recipes/.*")] == []
        begun = await services.images.build(requests.BuildImage(definition=definition))
        ended = await services.operations.wait(begun.id)
        assert ended.error is None, ended.error
        [made] = services.images.list()
        ext4.check(services.images.records.rootfs(made.id))
