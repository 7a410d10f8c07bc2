# SPDX-License-Identifier: MIT
"""Connections to ports of a guest over the real WebSocket: intact, bounded, and gone with their client."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from websockets.asyncio import client as websockets

from banger.contract import errors, reach
from tests.contract import api_served, conftest

Served = api_served.Served
_MIB = 1 << 20


@pytest.fixture
async def served(daemon: conftest.Daemon) -> AsyncIterator[Served]:
    """With one running VM, `web`, whose port 22 echoes."""
    async with api_served.with_web(daemon) as made:
        yield made


def _request(port: int = 22, **fields: object) -> str:
    return msgspec.json.encode({"port": port, **fields}).decode()


async def _end(link: websockets.ClientConnection) -> reach.ConnectEnd:
    return await api_served.last_word(link, reach.ConnectEnd)


async def test_32_mib_travel_each_way_intact(served: Served) -> None:
    piece = os.urandom(_MIB // 2)
    sent, received = hashlib.sha256(), hashlib.sha256()
    async with served.connection("web") as link:
        await link.send(_request())

        async def send() -> None:
            for _ in range(64):
                sent.update(piece)
                await link.send(piece)
            await link.send(b"")

        sending = asyncio.create_task(send())
        async for message in link:
            if isinstance(message, str):
                assert msgspec.json.decode(message, type=reach.ConnectEnd).error is None
                break
            received.update(message)
        await sending
    assert received.digest() == sent.digest()


@pytest.mark.parametrize(
    ("ref", "message", "code"),
    [
        ("nothing", _request(), "not_found"),
        ("web", _request(80), "refused"),
        ("web", _request(0), "bad_request"),
        ("web", _request(22, host="192.0.2.1"), "bad_request"),
        ("web", "{", "bad_request"),
    ],
)
async def test_a_wrong_request_ends_with_the_error(
    served: Served, ref: str, message: str, code: str
) -> None:
    async with served.connection(ref) as link:
        await link.send(message)
        end = await _end(link)
    assert end.error is not None
    assert (end.error.code, len(end.error.op_id)) == (code, 12)


async def test_a_lost_connection_is_told(served: Served) -> None:
    async with served.connection("web") as link:
        await link.send(_request(81))
        await link.send(b"x")
        end = await _end(link)
    assert end.error is not None
    assert "lost" in end.error.message


async def test_a_service_that_comes_late_is_waited_for(served: Served) -> None:
    served.daemon.world.behaviour.late_service = 3
    async with served.connection("web") as link:
        await link.send(_request(wait_s=20))
        await link.send(b"hello")
        assert await link.recv() == b"hello"


async def test_without_an_ssh_server_the_error_says_where_to_look(served: Served) -> None:
    served.daemon.world.behaviour.late_service = 1000
    async with served.connection("web") as link:
        await link.send(_request(wait_s=0.3))
        end = await _end(link)
    assert end.error is not None
    assert end.error.code == "refused"
    assert "vm logs web" in end.error.hint
    assert "vm exec web" in end.error.hint


async def test_a_client_that_leaves_ends_the_wait(served: Served) -> None:
    served.daemon.world.behaviour.late_service = 1_000_000
    [vm] = served.daemon.world.vms.values()
    guest = vm.vmm
    assert guest is not None
    link = await served.connection("web")
    await link.send(_request(wait_s=120))
    async with asyncio.timeout(30):
        while guest.knocks < 2:  # noqa: ASYNC110 - the fake announces nothing
            await asyncio.sleep(0.01)
        link.transport.abort()
        before = -1
        while guest.knocks != before:
            before = guest.knocks
            await asyncio.sleep(0.5)


async def test_the_key_pair_is_the_owners_alone_and_stays(served: Served) -> None:
    access = await served.get("/v1/ssh", reach.SshAccess)
    identity = Path(access.identity_file)
    assert identity.parent == served.daemon.paths.state / "ssh"
    modes = [os.stat(path).st_mode & 0o777 for path in (identity, identity.parent)]
    assert modes == [0o600, 0o700]
    assert access.public_key.startswith("ssh-ed25519 ")
    assert await served.get("/v1/ssh", reach.SshAccess) == access


async def test_a_host_key_is_forgotten_with_its_vm_and_with_its_name(served: Served) -> None:
    access = await served.get("/v1/ssh", reach.SshAccess)
    pinned = Path(access.host_keys_dir) / "web.vm"
    other = Path(access.host_keys_dir) / "webb.vm"
    for path in (pinned, other):
        path.write_text(f"{path.name} ssh-ed25519 AAAA\n")
    await served.done("POST", "/v1/vms/web/stop")
    assert pinned.exists()
    await served.http.patch("/v1/vms/web", json={"name": "renamed"})
    assert not pinned.exists()
    (Path(access.host_keys_dir) / "renamed.vm").write_text("x")
    await served.done("DELETE", "/v1/vms/renamed")
    assert os.listdir(access.host_keys_dir) == [other.name]


async def test_without_ssh_keygen_a_vm_starts_and_ssh_says_what_is_missing(
    daemon: conftest.Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    from banger import run

    def absent(tool: str, **_: object) -> str:
        raise errors.MissingToolError(f"program {tool!r} is not installed", tool=tool)

    monkeypatch.setattr(run, "require", absent)
    assert daemon.services.ssh.public_key() == ""
    with pytest.raises(errors.MissingToolError, match="ssh-keygen"):
        daemon.services.ssh.access()
