# SPDX-License-Identifier: MIT
"""Users and groups as an image's own files have them, however long their lines."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from banger.contract import errors, guest
from banger.owner import guest as guests
from guest import build_hook
from tests.contract import agent
from tests.root import rooted_agent

CROWD = ",".join(f"member{number}" for number in range(20_000))
ACCOUNTS = {
    "plain": "dev:x:1000:100:Dev:/home/dev:/bin/sh\n",
    "after a long one": f"long:x:1:1:{'n' * 9000}:/:/bin/sh\ndev:x:1000:100:Dev:/home/dev:/bin/sh\n",
    "long": f"dev:x:1000:100:{'n' * 9000}:/home/dev:/bin/sh\n",
    "without an end": "dev:x:1000:100:Dev:/home/dev:/bin/sh",
    "after nonsense": "dev\n\n:::\ndev:x:none:100:::\ndev:x:1000:100:Dev:/home/dev:/bin/sh:more:columns\n",
}
GROUPS = {
    "nobody": ("crowd:x:5:\n", [100]),
    "alone": ("crowd:x:5:dev\nother:x:6:develop,de,vdev\n", [100, 5]),
    "last of many": (f"crowd:x:5:{CROWD},dev\n", [100, 5]),
    "first of many": (f"crowd:x:5:dev,{CROWD}\n", [100, 5]),
    "between many": (f"crowd:x:5:{CROWD},dev,{CROWD}\nmore:x:6:{CROWD},dev", [100, 5, 6]),
    "behind many": (f"none:x:4:{CROWD}\ncrowd:x:5:dev\n", [100, 5]),
    "of many": ("".join(f"g{n}:x:{n}:dev\n" for n in range(200, 500)), [100, *range(200, 500)]),
    "amid nonsense": ("x:4:dev\ncrowd:x::dev\n\nx:y\ndev\ncrowd:x:5:,,dev:dev\n", [100, 5]),
    "a name that does not fit": (f"other:x:4:{'m' * 9000},\n{'n' * 9000}:x:7:dev\n", [100, 7]),
}
KINDS = {"shipped": lambda: None, "sanitized": build_hook.build_sanitized}


@contextmanager
def running(kind: str, accounts: str, groups: str) -> Iterator[guests.GuestClient]:
    with tempfile.TemporaryDirectory(prefix="b-", dir="/tmp") as name:
        own = {"/etc/passwd": Path(name, "passwd"), "/etc/group": Path(name, "group")}
        for path, text in zip(own.values(), (accounts, groups), strict=True):
            path.write_text(text)
        with rooted_agent.running(Path(name), own, KINDS[kind]()) as path:
            yield guests.GuestClient(lambda: asyncio.open_unix_connection(str(path)))


async def output(client: guests.GuestClient, script: str, user: str) -> list[str]:
    spec = guest.ExecSpec(argv=("sh", "-c", script), user=user)
    async with client.exec(spec) as running:
        return (
            b"".join([event[1] async for event in running.output() if isinstance(event, tuple)])
            .decode()
            .split()
        )


@pytest.mark.parametrize("kind", agent.KINDS)
@pytest.mark.parametrize("which", ACCOUNTS)
async def test_an_account_is_found_however_long_lines_are(kind: str, which: str) -> None:
    with running(kind, ACCOUNTS[which], "") as client:
        for user in ("dev", "1000"):
            said = await output(client, "id -u; id -g; echo $HOME $USER $LOGNAME $SHELL", user)
            assert said == ["1000", "100", "/home/dev", "dev", "dev", "/bin/sh"]


@pytest.mark.parametrize("kind", agent.KINDS)
@pytest.mark.parametrize("which", GROUPS)
async def test_a_user_is_in_each_of_its_groups(kind: str, which: str) -> None:
    text, wanted = GROUPS[which]
    with running(kind, ACCOUNTS["plain"], text) as client:
        assert await output(client, "id -G", "dev") == [str(gid) for gid in wanted]


@pytest.mark.parametrize("kind", agent.KINDS)
async def test_a_group_is_found_by_name_however_long_lines_are(kind: str) -> None:
    text = f"none:x:4:{CROWD}\ncrowd:x:5:{CROWD}\nlast:x:6:"
    with running(kind, ACCOUNTS["plain"], text) as client:
        for name, number in (("none", "4"), ("crowd", "5"), ("last", "6"), ("77", "77")):
            assert await output(client, "id -u; id -G", f"dev:{name}") == ["1000", number]
        with pytest.raises(errors.NotFoundError, match="dev:nowhere"):
            await output(client, "true", "dev:nowhere")
        for user in ("member7", "dev:"):
            with pytest.raises(errors.NotFoundError, match="no such user"):
                await output(client, "true", user)


@pytest.mark.parametrize("kind", agent.KINDS)
@pytest.mark.parametrize("tty", [False, True])
async def test_a_user_may_open_what_its_command_was_given(kind: str, *, tty: bool) -> None:
    """As scripts do it that say `>/dev/stderr`."""
    script = (
        "echo out >/proc/self/fd/1; echo err >/proc/self/fd/2; read -r line </proc/self/fd/0; echo $line"
    )
    with running(kind, ACCOUNTS["plain"], "") as client:
        async with client.exec(guest.ExecSpec(argv=("sh", "-c", script), user="dev", tty=tty)) as command:
            await command.write(b"in\n")
            said = [event async for event in command.output()]
        assert said[-1] == guest.ExitStatus(0)
        text = b"".join(event[1] for event in said if isinstance(event, tuple))
        assert {b"out", b"err", b"in"} <= set(text.split())
