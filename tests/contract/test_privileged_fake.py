# SPDX-License-Identifier: MIT
"""The fake helper plays the cases of every helper, over its socket: what is tested on it means something."""

from __future__ import annotations

import asyncio
import signal
import struct
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.contract import errors, names, privileged, resources
from banger.owner import composition, config, helper, operations, store
from tests.contract import conftest, privileged_cases
from tests.fakes import helper as fakes
from tests.fakes import world as worlds


class Sources:
    image = conftest.IMAGE_ID
    kernel = conftest.KERNEL_ID
    initrd = False


@pytest.fixture
async def fake(world: worlds.World, paths: config.Paths) -> AsyncIterator[fakes.FakeHelper]:
    """A helper over an empty world, with the disks of two VMs to be."""
    for vm_id in (privileged_cases.VM, privileged_cases.OTHER):
        directory = paths.state / "vms" / vm_id
        directory.mkdir(parents=True)
        for name in ("overlay.cow", "work.ext4"):
            (directory / name).write_bytes(b"x")
    async with fakes.FakeHelper(world).serving(paths.helper_socket) as serving:
        yield serving


def batch(socket: Path, requests: Sequence[privileged.Request[Any]]) -> list[privileged.Reply]:
    """The daemon's own client, in a thread's loop; ends at the first error."""

    async def ask() -> list[privileged.Reply]:
        client = helper.Client(socket, lambda: "op-1", deadline_s=10)
        replies: list[privileged.Reply] = []
        for request in requests:
            try:
                replies.append(privileged.Reply(result=await client.call(request)))
            except errors.BangerError as error:
                replies.append(privileged.Reply(error=errors.to_body(error)))
                break
        return replies

    return asyncio.run(ask())


@pytest.mark.parametrize("case", privileged_cases.cases(Sources()), ids=str)
async def test_case(fake: fakes.FakeHelper, paths: config.Paths, case: privileged_cases.Case) -> None:
    socket = paths.helper_socket
    await asyncio.to_thread(privileged_cases.judge, case, lambda requests: batch(socket, requests))
    assert fake.world.leftovers() == {}
    assert {record.op_id for record in fake.records} == {"op-1"}


def test_the_cases_ask_for_every_operation() -> None:
    asked = {type(e.request) for case in privileged_cases.cases(Sources()) for e in case.exchanges}
    left_out = {privileged.CheckRuntime}  # needs an installed runtime; tests/lab asks it
    assert asked | left_out == set(privileged.REQUEST_TYPES)


@pytest.mark.parametrize("name", privileged_cases.MALFORMED)
async def test_a_malformed_request_is_refused(
    fake: fakes.FakeHelper, paths: config.Paths, name: str
) -> None:
    data = privileged_cases.MALFORMED[name]
    reply = await exchange(paths.helper_socket, struct.pack("!I", len(data)) + data)
    assert reply.error is not None
    assert reply.error.code == "bad_request"
    assert fake.world.requests == []
    assert [record.outcome for record in fake.records] == ["bad_request"]


async def test_a_request_too_long_is_refused_unread(fake: fakes.FakeHelper, paths: config.Paths) -> None:
    reply = await exchange(paths.helper_socket, struct.pack("!I", privileged.MAX_REQUEST_BYTES + 1))
    assert reply.error is not None
    assert "too long" in reply.error.message


async def test_another_uid_is_refused(fake: fakes.FakeHelper, paths: config.Paths) -> None:
    fake.uids = frozenset({12345})
    with pytest.raises(errors.UnauthorizedError):
        await helper.Client(paths.helper_socket).call(privileged.GetHost())
    assert fake.world.requests == []


async def exchange(socket: Path, data: bytes) -> privileged.Reply:
    reader, writer = await asyncio.open_unix_connection(str(socket))
    writer.write(data)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return msgspec.json.decode(answer[4:], type=privileged.Reply)


# --- the daemon over the socket ---


@pytest.fixture
async def wired(fake: fakes.FakeHelper, paths: config.Paths) -> AsyncIterator[conftest.Daemon]:
    """A daemon whose root is at the other end of a real socket."""
    store.Store(paths.database).close()  # no daemon begins without rows where disks are
    client = helper.Client(paths.helper_socket, operations.current_op_id.get, deadline_s=10)
    async with composition.compose(conftest.SETTINGS, conftest.NETWORK, paths, client, "0" * 64) as services:
        yield conftest.Daemon(services, paths, fake.world)


async def test_every_request_of_a_start_carries_its_operation(
    wired: conftest.Daemon, fake: fakes.FakeHelper
) -> None:
    fake.records.clear()
    operation = await wired.create()
    assert operation.status is resources.OperationStatus.SUCCEEDED, operation.error
    assert {record.op_id for record in fake.records} == {operation.id}


_ASKED_BY_A_START = (
    privileged.TearDown,
    privileged.EnsureBridge,
    privileged.CreateSnapshot,
    privileged.PatchRoot,
    privileged.AttachWorkDisk,
    privileged.CreateTap,
    privileged.PrepareJail,
    privileged.CheckRuntime,
    privileged.LaunchVmm,
    privileged.GrantApiSocket,
    privileged.GrantVsock,
)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", _ASKED_BY_A_START, ids=lambda kind: kind.__name__)
async def test_a_helper_killed_in_the_middle_of_a_start(
    wired: conftest.Daemon, fake: fakes.FakeHelper, kind: type[privileged.Request[Any]], after: bool
) -> None:
    """Its answer is lost, so the daemon cannot know whether the work was done: the undo must not care."""
    fake.dies(kind, after=after)
    operation = await wired.create()
    assert operation.error is not None
    assert operation.error.code == "unavailable"
    assert operation.error.also == ()
    assert wired.world.leftovers() == {}
    again = await wired.done(await wired.services.vms.start("web"))
    assert again.status is resources.OperationStatus.SUCCEEDED, again.error


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "kind",
    [privileged.KillVmm, privileged.TearDown, privileged.DetachWorkDisk],
    ids=lambda kind: kind.__name__,
)
async def test_a_helper_killed_in_the_middle_of_a_delete(
    wired: conftest.Daemon, fake: fakes.FakeHelper, kind: type[privileged.Request[Any]], after: bool
) -> None:
    await wired.create()
    fake.dies(kind, after=after)
    operation = await wired.done(await wired.services.vms.delete("web"))
    if kind is privileged.KillVmm and after:  # the next one sees that this is done
        assert operation.status is resources.OperationStatus.SUCCEEDED, operation.error
    else:
        assert operation.status is resources.OperationStatus.FAILED
        assert [vm.name for vm in await wired.services.vms.list()] == ["web"]
        again = await wired.done(await wired.services.vms.delete("web"))
        assert again.status is resources.OperationStatus.SUCCEEDED, again.error
    assert wired.world.leftovers() == {}
    assert await wired.services.vms.list() == []


async def test_a_hundred_starts_at_once(wired: conftest.Daemon) -> None:
    made = await asyncio.gather(*(wired.create(f"vm-{n}") for n in range(100)))
    assert [operation.error for operation in made if operation.error] == []
    assert len({vm.address for vm in await wired.services.vms.list()}) == 100


# --- as a program ---


async def test_the_fake_is_a_program_too(paths: config.Paths) -> None:
    program = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.fakes.helper",
        *("--socket", str(paths.helper_socket)),
        *("--state", str(paths.state)),
        *("--helper-dir", str(paths.helper_dir)),
        cwd=Path(__file__).parents[2],
    )
    try:
        client = helper.Client(paths.helper_socket, deadline_s=10)
        await answers(client)
        await client.call(privileged.EnsureBridge())
        await client.call(privileged.CreateTap(vm_id=privileged_cases.VM, slot=1))
        world = await client.call(privileged.ListWorld())
        assert [(vm.vm_id, vm.tap) for vm in world.vms] == [(privileged_cases.VM, True)]
        assert names.is_id(world.vms[0].vm_id)
    finally:
        program.send_signal(signal.SIGTERM)
        status = await program.wait()
    assert status == 1, "it says of how many VMs something was left"


async def answers(client: helper.Client) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                await client.call(privileged.GetHost())
                return
            except errors.UnavailableError:
                await asyncio.sleep(0.02)  # a program's socket appears; nothing announces it
