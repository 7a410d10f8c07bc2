# SPDX-License-Identifier: MIT
"""The real helper plays the cases that the fake plays, as far as this machine can: the lab plays all."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger import inprocess
from banger.contract import errors, privileged
from banger.helper import server
from tests.contract import privileged_cases
from tests.root import helper_world


class Sources:
    image = helper_world.IMAGE
    kernel = helper_world.KERNEL
    initrd = False


HERE = [case for case in privileged_cases.cases(Sources()) if not case.needs_machine]
IN_PROCESS = (
    "the helper says what it speaks",
    "a bridge with a tap is kept",
    "a name needs NAT",
    "a slot belongs to one VM",
    "a jail is made anew where it exists",
    "a work disk is attached once",
)


@pytest.fixture
def furnished(helper_world_here: helper_world.HelperWorld, own_network: None) -> helper_world.HelperWorld:
    """A host with a network of its own, an image, and the disks of two VMs to be."""
    here = helper_world_here
    here.owned(f"images/{Sources.image}/rootfs.ext4")
    here.owned(f"kernels/{Sources.kernel}/vmlinux")
    for vm_id in (privileged_cases.VM, privileged_cases.OTHER):
        here.owned(f"vms/{vm_id}/overlay.cow")
        helper_world.make_ext4(here.owned(f"vms/{vm_id}/work.ext4"))
    return here


@pytest.fixture
def served(furnished: helper_world.HelperWorld) -> Iterator[Path]:
    """The socket of a helper that serves there."""
    here, path = furnished, furnished.root / "helper.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        serving = server.Server(here.policy, listener)
        thread = threading.Thread(target=serving.serve)
        thread.start()
        yield path
        serving.stop()
        thread.join(timeout=30)
        assert not thread.is_alive()


def exchange(path: Path, data: bytes) -> privileged.Reply:
    with socket.socket(socket.AF_UNIX) as wire:
        wire.settimeout(30)
        wire.connect(str(path))
        wire.sendall(struct.pack("!I", len(data)) + data)
        wire.shutdown(socket.SHUT_WR)
        answer = b""
        while part := wire.recv(65536):
            answer += part
    return msgspec.json.decode(answer[4:], type=privileged.Reply)


def batch(path: Path, requests: Sequence[privileged.Request[Any]]) -> list[privileged.Reply]:
    replies: list[privileged.Reply] = []
    for request in requests:
        replies.append(exchange(path, msgspec.json.encode({"request": request, "op_id": "op-1"})))
        if replies[-1].error is not None:
            break
    return replies


@pytest.mark.parametrize("case", HERE, ids=str)
def test_case(served: Path, case: privileged_cases.Case) -> None:
    privileged_cases.judge(case, lambda requests: batch(served, requests))


@pytest.mark.parametrize("name", IN_PROCESS)
def test_case_in_process(furnished: helper_world.HelperWorld, name: str) -> None:
    """The same operations behind the other adapter; some of each kind are enough for it."""
    [case] = [each for each in HERE if str(each) == name]

    async def asked(requests: Sequence[privileged.Request[Any]]) -> list[privileged.Reply]:
        adapter = inprocess.InProcess(furnished.policy)
        replies: list[privileged.Reply] = []
        for request in requests:
            try:
                replies.append(privileged.Reply(result=await adapter.call(request)))
            except errors.BangerError as error:
                replies.append(privileged.Reply(error=errors.to_body(error)))
                break
        adapter.close()
        return replies

    privileged_cases.judge(case, lambda requests: asyncio.run(asked(requests)))


@pytest.mark.parametrize("name", privileged_cases.MALFORMED)
def test_a_malformed_request_is_refused(served: Path, name: str) -> None:
    reply = exchange(served, privileged_cases.MALFORMED[name])
    assert reply.error is not None
    assert reply.error.code == "bad_request"
