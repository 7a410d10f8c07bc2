# SPDX-License-Identifier: MIT
"""Files of the owner's home in the guest: exact, and only what lies in that home."""

from __future__ import annotations

import asyncio
import datetime
import os
import stat
from pathlib import Path
from typing import Any, cast

import pytest

from banger.contract import errors, names, resources
from banger.owner import config
from banger.owner import guest as guests
from banger.vm import capabilities, host, record
from banger.vm.capabilities import file_sync
from tests.contract import conftest

Entry = file_sync.Entry


@pytest.fixture
def home(tmp_path: Path) -> Path:
    made = tmp_path / "home"
    (made / ".config" / "tool").mkdir(parents=True, mode=0o700)
    (made / ".config").chmod(0o700)
    (made / ".config" / "tool" / "settings").write_text("set\n")
    (made / ".config" / "tool" / "settings").chmod(0o600)
    (made / "dotfiles").mkdir()
    (made / "dotfiles" / "gitconfig").write_text("[user]\n")
    (made / ".gitconfig").symlink_to("dotfiles/gitconfig")
    (tmp_path / "outside").write_text("not yours\n")
    return made


@pytest.fixture
def context(daemon: conftest.Daemon, native_agent: Path) -> capabilities.Context:
    """A VM whose agent runs here."""
    agent = guests.GuestClient(lambda: asyncio.open_unix_connection(str(native_agent)))
    world = host.Host(
        ops=daemon.world,
        records=cast("Any", None),
        layout=daemon.paths.layout,
        network=conftest.NETWORK,
        agent=lambda _: agent,
        vmm_gone=cast("Any", None),
        keeper=cast("Any", None),
    )
    vm = record.VmRecord(
        id=names.VmId("0" * 12),
        name=names.VmName("web"),
        slot=1,
        image_id=names.ImageId(conftest.IMAGE_ID),
        kernel_id=names.KernelId(conftest.KERNEL_ID),
        vcpus=1,
        memory_mib=128,
        disk_size_mib=16,
        network=False,
        state=resources.VmState.CREATED,
        created_at=datetime.datetime.now(datetime.UTC),
    )
    return capabilities.Context(host=world, vm=vm)


async def test_files_arrive_as_roots(context: capabilities.Context, home: Path, tmp_path: Path) -> None:
    target = tmp_path / "guest"
    target.mkdir()
    entries = [Entry(".gitconfig", ".gitconfig"), Entry(".config/tool", ".config/other/tool")]
    syncing = file_sync.FileSync(home, entries, guest_home=str(target))
    await syncing.check(context)
    await syncing.after_start(context)
    settings = target / ".config" / "other" / "tool" / "settings"
    assert settings.read_text() == "set\n"
    assert (stat.S_IMODE(settings.stat().st_mode), settings.stat().st_uid) == (0o600, 0)
    assert stat.S_IMODE((target / ".config").stat().st_mode) == 0o700
    assert (target / ".gitconfig").read_text() == "[user]\n"
    assert not (target / ".gitconfig").is_symlink()
    (home / "dotfiles" / "gitconfig").write_text("[core]\n")
    await syncing.after_start(context)
    assert (target / ".gitconfig").read_text() == "[core]\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing", "no such file"),
        ("escape", "leads out of the home"),
        ("loop", "cannot go into the VM"),
        ("pipe", "neither a file nor a directory"),
        ("large", "more than 64 MiB"),
    ],
)
async def test_what_cannot_be_copied_is_refused_before_anything_is_made(
    context: capabilities.Context, home: Path, source: str, message: str
) -> None:
    (home / "escape").symlink_to("../outside")
    (home / "loop").symlink_to("loop")
    os.mkfifo(home / "pipe")
    (home / "large").touch()
    os.truncate(home / "large", file_sync.MAX_BYTES + 1)
    with pytest.raises(errors.BadRequestError, match=message):
        await file_sync.FileSync(home, [Entry(source, source)]).check(context)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("/etc/passwd", None),
        ("~/../other", None),
        ("~other/x", None),
        ("~/", None),
        ("~/a//b", None),
        ("~/a", "/etc/x"),
        ("~/a", "../x"),
        ("~/a\0", None),
    ],
)
def test_paths_outside_a_home_are_refused_with_the_configuration(source: str, target: str | None) -> None:
    with pytest.raises(ValueError, match="is not a path below"):
        config.FileSync(source=source, target=target)


def test_paths_are_below_both_homes() -> None:
    assert config.FileSync(source="~/.gitconfig").entry == Entry(".gitconfig", ".gitconfig")
    assert config.FileSync(source="a/b", target="/root/c").entry == Entry("a/b", "c")
    both = (config.FileSync(source="a"), config.FileSync(source="b", target="a"))
    with pytest.raises(ValueError, match="one target"):
        config.Config(file_sync=both)
