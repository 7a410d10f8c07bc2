# SPDX-License-Identifier: MIT
"""Commands over the real WebSocket and the guest's protocol: intact, bounded, and gone with their client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
from websockets import exceptions
from websockets.asyncio import client as websockets

from banger.contract import errors, guest, resources
from tests.contract import api_served, conftest

Served = api_served.Served
_MIB = 1 << 20


@pytest.fixture
async def served(daemon: conftest.Daemon) -> AsyncIterator[Served]:
    """With one running VM, `web`."""
    async with api_served.with_web(daemon) as made:
        yield made


def _request(*argv: str, **fields: object) -> str:
    return msgspec.json.encode({"argv": argv, **fields}).decode()


async def _end(link: websockets.ClientConnection) -> resources.ExecEnd:
    return await api_served.last_word(link, resources.ExecEnd)


async def test_the_exit_status_is_exact(served: Served) -> None:
    async with served.command("web") as link:
        await link.send(_request("exit", "7"))
        assert await _end(link) == resources.ExecEnd(exit_status=7)


async def test_a_signal_is_128_and_its_number(served: Served) -> None:
    async with served.command("web") as link:
        await link.send(_request("cat"))
        await link.send('{"signal": 15}')
        assert await _end(link) == resources.ExecEnd(exit_status=143, signal=15)


async def test_a_command_takes_its_own_vm_along_and_no_other_of_that_name(served: Served) -> None:
    daemon = served.daemon
    async with served.command("web") as link:
        await link.send(_request("true", remove=True, hold=True))
        async with asyncio.timeout(30):
            while not daemon.services.vms._store.throw_aways():  # noqa: ASYNC110 - nothing says that it read it
                await asyncio.sleep(0.005)
        await daemon.done(await daemon.services.vms.delete("web"))
        await daemon.create("web")
        await link.send('{"begin": true}')
        end = await _end(link)
    assert end.error is not None
    assert end.error.code == "not_found"
    for operation in daemon.services.operations.list():
        await daemon.done(operation)
    assert [vm.name for vm in await daemon.services.vms.list()] == ["web"]


@pytest.mark.parametrize(
    ("ref", "message", "code"),
    [
        ("nothing", _request("true"), "not_found"),
        ("web", "{", "bad_request"),
        ("web", _request("true", privileged=True), "bad_request"),
        ("web", "{}", "bad_request"),
    ],
)
async def test_a_wrong_request_ends_with_the_error(
    served: Served, ref: str, message: str, code: str
) -> None:
    async with served.command(ref) as link:
        await link.send(message)
        end = await _end(link)
    assert end.error is not None
    assert (end.error.code, end.exit_status) == (code, None)
    assert len(end.error.op_id) == 12


async def test_twenty_commands_at_once(served: Served) -> None:
    async def ask(number: int) -> int | None:
        async with served.command("web") as link:
            await link.send(_request("exit", str(number)))
            return (await _end(link)).exit_status

    assert await asyncio.gather(*map(ask, range(20))) == list(range(20))


async def test_a_client_that_goes_away_takes_its_vm_along_when_asked(served: Served) -> None:
    link = await served.command("web")
    await link.send(_request("cat", remove=True))
    await link.send(b"here")
    assert await link.recv() == b"\x01here"
    link.transport.abort()
    await _wait_until_deleted(served)


async def test_a_client_is_missed_even_while_its_input_waits(served: Served) -> None:
    """The command reads nothing, so the daemon stopped reading; only the kernel can say that it left."""
    begun = asyncio.Event()

    async def heard(_kind: guest.FrameType, _part: str) -> None:
        begun.set()

    served.daemon.world.behaviour.on_agent = heard
    link = await served.command("web")
    await link.send(_request("deaf", remove=True))
    async with asyncio.timeout(30):
        await begun.wait()
        sent: list[int] = []
        flood = asyncio.create_task(_flood(link, sent))
        before = -1
        while len(sent) != before:
            before = len(sent)
            await asyncio.sleep(0.3)  # nothing says that nobody reads on
    flood.cancel()
    link.transport.abort()
    await _wait_until_deleted(served)


async def test_input_that_a_command_does_not_take_holds_up_nothing_else(served: Served) -> None:
    """The guest has a window of it, and the daemon another."""
    window = resources.EXEC_WINDOW_BYTES
    async with served.command("web") as link:
        await link.send(_request("deaf", windowed=True))
        for _ in range(4):
            await link.send(bytes(window // 4))
            notice = msgspec.json.decode(await link.recv(), type=resources.ExecNotice)
            assert notice.taken == window // 4
        await link.send(bytes(window))
        await link.send('{"signal": 15}')
        assert await _end(link) == resources.ExecEnd(exit_status=143, signal=15)
    async with served.command("web") as link:
        await link.send(_request("deaf", windowed=True))
        await link.send(bytes(window))
        await link.recv()
        await link.send(bytes(window))
        await link.send(b"x")
        end = await _end(link)
    assert end.error is not None
    assert end.error.code == "bad_request"


async def _flood(link: websockets.ClientConnection, sent: list[int]) -> None:
    while True:
        await link.send(bytes(_MIB // 2))
        sent.append(_MIB // 2)


async def _wait_until_deleted(served: Served) -> None:
    operations = served.daemon.services.operations
    async with asyncio.timeout(30):
        # Nothing announces the start of an operation.
        while not any(each.kind == "vm.delete" for each in operations.list()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        [deleting] = [each for each in operations.list() if each.kind == "vm.delete"]
        assert (await operations.wait(deleting.id)).status is resources.OperationStatus.SUCCEEDED
    assert served.daemon.world.leftovers() == {}


async def test_the_vm_goes_when_the_command_ends(served: Served) -> None:
    async with served.command("web") as link:
        await link.send(_request("exit", "3", remove=True))
        assert (await _end(link)).exit_status == 3
    await _wait_until_deleted(served)
    with pytest.raises(errors.NotFoundError):
        await served.daemon.services.vms.get("web")


async def test_a_frame_over_the_limit_ends_the_connection(served: Served) -> None:
    link = await served.command("web")
    await link.send(_request("cat"))
    with pytest.raises(exceptions.ConnectionClosed):
        await _send_too_much(link)


async def _send_too_much(link: websockets.ClientConnection) -> None:
    """The refusal may come while it is still being sent."""
    await link.send(bytes(2 * _MIB))
    await link.recv()
