# SPDX-License-Identifier: MIT
"""The helper's socket against peers of every kind: other uids, unknown requests, the slow and the rude."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.contract import errors, names, privileged
from banger.helper import operations, server
from banger.owner import helper
from tests.root.helper_world import OWNER, STRANGER, VM, HelperWorld

# One request as another uid, in a process of its own: SO_PEERCRED cannot be put on like a hat.
ASK = """
import socket, struct, sys
wire = socket.socket(socket.AF_UNIX); wire.connect(sys.argv[1]); wire.settimeout(20)
data = sys.argv[2].encode()
wire.sendall(struct.pack('!I', len(data)) + data)
answer = b''
while part := wire.recv(65536): answer += part
sys.stdout.write(answer[4:].decode())
"""
TABLE: dict[Any, Any] = operations.OPERATIONS
GET_HOST = '{"request": {"op": "get_host"}, "op_id": "op-1"}'


@pytest.fixture
def socket_path(helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(server, "READ_DEADLINE_S", 600.0)  # nobody here is slow but who means to be
    with serving(helper_world_here) as (path, _):
        yield path


@contextlib.contextmanager
def serving(world: HelperWorld) -> Iterator[tuple[Path, server.Server]]:
    """A served socket that any uid may connect to, so that only the helper's own check is met."""
    path = world.root / "helper.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen(64)
        served = server.Server(world.policy, listener)
        thread = threading.Thread(target=served.serve, name="serves")
        thread.start()
        try:
            yield path, served
        finally:
            served.stop()
            thread.join(timeout=30)
        assert not thread.is_alive()


def ask_as(uid: int, path: Path, text: str, *, script: str = ASK) -> privileged.Reply:
    done = subprocess.run(
        ["/usr/bin/python3", "-c", script, str(path), text],
        user=uid,
        group=uid,
        extra_groups=[],
        check=True,
        capture_output=True,
        timeout=30,
    )
    return msgspec.json.decode(done.stdout, type=privileged.Reply)


def raw(path: Path, data: bytes, *, half_close: bool = False) -> bytes:
    with socket.socket(socket.AF_UNIX) as wire:
        wire.settimeout(20)
        wire.connect(str(path))
        wire.sendall(data)
        if half_close:
            wire.shutdown(socket.SHUT_WR)
        answer = b""
        while part := wire.recv(65536):
            answer += part
        return answer


def framed(text: str) -> bytes:
    return struct.pack("!I", len(text.encode())) + text.encode()


def error_of(answer: bytes) -> errors.ErrorBody:
    reply = msgspec.json.decode(answer[4:], type=privileged.Reply)
    assert reply.error is not None
    return reply.error


@pytest.mark.parametrize("uid", [0, OWNER])
def test_root_and_owner_are_answered(socket_path: Path, uid: int) -> None:
    assert isinstance(ask_as(uid, socket_path, GET_HOST).result, privileged.HostInfo)


def test_any_other_uid_is_refused(socket_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reply = ask_as(STRANGER, socket_path, GET_HOST)
    assert reply.result is None
    assert reply.error is not None
    assert reply.error.code == "unauthorized"
    line = next(line for line in capfd.readouterr().err.splitlines() if "refused" in line)
    assert line.startswith("<4>{")
    logged = json.loads(line[3:])
    assert logged["peer_uid"] == STRANGER
    assert "op" not in logged, "nothing of what it sent was read"


@pytest.mark.parametrize(
    "text",
    [
        '{"request": {"op": "run_command", "argv": ["id"]}}',
        '{"request": {"op": "get_host", "path": "/etc/shadow"}}',
        '{"request": {"op": "get_host"}, "sudo": true}',
        '{"request": {"op": "delete_tap", "vm_id": "../../../etc"}}',
        '{"request": {"op": "delete_tap", "vm_id": "0123456789AB"}}',
        '{"request": {"op": "delete_tap", "vm_id": "0123456789ab\\n"}}',
        '{"request": {"op": "delete_tap", "vm_id": 7}}',
        '{"request": {"op": "delete_tap"}}',
        '{"request": {"op": "create_tap", "vm_id": "0123456789ab", "slot": 0}}',
        '{"request": {"op": "create_tap", "vm_id": "0123456789ab", "slot": 4001}}',
        '{"request": {"op": "create_snapshot", "vm_id": "0123456789ab", "slot": 1, "image_id": "/etc/x"}}',
        '{"request": {"op": "patch_root", "vm_id": "0123456789ab", "slot": 1, "path": "/etc/passwd"}}',
        '{"request": {"op": "get_host"}, "op_id": "x\\ny"}',
        '{"op": "get_host"}',
        "[]",
        "",
        "\x00",
        "[" * 60000,
    ],
)
def test_what_is_not_exactly_a_request_is_refused(socket_path: Path, text: str) -> None:
    assert error_of(raw(socket_path, framed(text))).code == "bad_request"


@pytest.mark.parametrize("boot_args", ["a\nb", "a\x00b", "x" * 1901, " a", "a ", "a  b", "a\tb", "é"])
def test_boot_arguments_are_one_plain_line(socket_path: Path, boot_args: str) -> None:
    request = {
        "op": "launch_vmm",
        "vm_id": VM,
        "slot": 1,
        "kernel_id": VM,
        "initrd": False,
        "vcpus": 1,
        "memory_mib": 128,
        "boot_args": boot_args,
    }
    assert error_of(raw(socket_path, framed(json.dumps({"request": request})))).code == "bad_request"


def test_an_oversized_request_is_refused_unread(socket_path: Path) -> None:
    answer = raw(socket_path, struct.pack("!I", privileged.MAX_REQUEST_BYTES + 1))
    assert error_of(answer).code == "bad_request"


def test_half_a_request_is_answered_and_forgotten(socket_path: Path) -> None:
    assert error_of(raw(socket_path, framed(GET_HOST)[:10], half_close=True)).code == "bad_request"


@contextlib.contextmanager
def slow_peers(path: Path) -> Iterator[list[socket.socket]]:
    """Eight, of each of whom the first byte has come."""
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(8)]
        for wire in slow:
            wire.settimeout(30)
            wire.connect(str(path))
            wire.sendall(b"\x00")
        yield slow


def test_a_slow_peer_keeps_nobody_waiting(socket_path: Path) -> None:
    with slow_peers(socket_path) as slow:
        assert ask_as(OWNER, socket_path, GET_HOST).result is not None
        assert select.select(slow, [], [], 0)[0] == [], "they are waited for"


def test_a_slow_peer_is_cut_off(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "READ_DEADLINE_S", 0.2)
    with slow_peers(socket_path) as slow:
        assert {error_of(wire.recv(65536)).code for wire in slow} == {"timed_out"}


def test_a_byte_now_and_then_is_too_slow_as_well(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is for the whole request: each byte by itself came in time."""
    monkeypatch.setattr(server, "READ_DEADLINE_S", 0.5)
    with socket.socket(socket.AF_UNIX) as wire:
        wire.connect(str(socket_path))
        wire.sendall(struct.pack("!I", 60_000))
        deadline = time.monotonic() + 20
        while not select.select([wire], [], [], 0.1)[0]:
            assert time.monotonic() < deadline, "it is listened to for ever"
            with contextlib.suppress(OSError):
                wire.sendall(b"x")
        assert error_of(wire.recv(65536)).code == "timed_out"


def test_a_peer_that_takes_no_answer_keeps_no_place(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "WRITE_DEADLINE_S", 0.2)
    long = privileged.HostInfo(version="x" * (1 << 22), protocol=privileged.PROTOCOL_VERSION)
    monkeypatch.setitem(TABLE, privileged.GetHost, lambda *_: long)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(framed(GET_HOST))
        with pytest.raises(TimeoutError):
            server.exchange(helper_world_here.policy, theirs)


def test_a_stranger_that_says_nothing_is_refused_at_once(socket_path: Path) -> None:
    """The peer is judged before a byte of it is waited for: here that would be ten minutes."""
    silent = ASK.replace("wire.sendall", "(lambda _: None)")
    assert silent != ASK
    reply = ask_as(STRANGER, socket_path, "", script=silent)
    assert reply.error is not None
    assert reply.error.code == "unauthorized"


def test_a_peer_that_leaves_does_no_harm(socket_path: Path) -> None:
    for _ in range(20):
        wire = socket.socket(socket.AF_UNIX)
        wire.connect(str(socket_path))
        wire.sendall(framed(GET_HOST))
        wire.close()
    assert ask_as(OWNER, socket_path, GET_HOST).result is not None


def test_each_request_is_logged_once(socket_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = json.dumps({"request": {"op": "purge_logs", "vm_id": VM}, "op_id": "op-42"})
    assert ask_as(OWNER, socket_path, text).result == privileged.Done()
    lines = [line for line in capfd.readouterr().err.splitlines() if "op-42" in line]
    assert len(lines) == 1
    logged = json.loads(lines[0][3:])
    assert (logged["op"], logged["vm"], logged["outcome"]) == ("purge_logs", VM, "done")
    assert logged["elapsed_ms"] >= 0


def test_an_unexpected_error_is_answered_and_logged(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> privileged.Result:
        raise RuntimeError("surprise")

    monkeypatch.setitem(TABLE, privileged.GetHost, fail)
    answer = error_of(raw(socket_path, framed(GET_HOST)))
    assert answer.code == "operation_failed"
    assert answer.op_id == "op-1"
    assert "<3>" in capfd.readouterr().err


def test_a_journal_that_went_away_keeps_nobody_without_an_answer(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor without a place: each connection that ended by it was counted for ever."""
    read, write = os.pipe()
    os.close(read)
    journal = os.fdopen(write, "w", buffering=1)
    with monkeypatch.context() as away:
        away.setattr(sys, "stderr", journal)
        answer = raw(socket_path, framed(GET_HOST))
        refusal = error_of(raw(socket_path, framed('{"request": {"op": "no_such"}}')))
    with contextlib.suppress(BrokenPipeError):
        journal.close()
    assert msgspec.json.decode(answer[4:], type=privileged.Reply).error is None
    assert refusal.code == "bad_request"


def test_an_error_that_names_a_file_of_a_vmm_s_is_answered(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its name may be any bytes; Python hands those that are no text over as halves of characters."""

    def fail(*_: object) -> privileged.Result:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), os.fsdecode(b"a\xffb"))

    monkeypatch.setitem(TABLE, privileged.GetHost, fail)
    answer = error_of(raw(socket_path, framed(GET_HOST)))
    assert (answer.code, answer.message) == ("conflict", "get_host: a?b: Device or resource busy")
    assert "a?b" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (MemoryError(), "more memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "more memory"),
        (OSError(errno.EMFILE, "Too many open files"), "LimitNOFILE="),
    ],
    ids=repr,
)
def test_what_root_has_run_out_of_is_named(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, hint: str
) -> None:
    def fail(*_: object) -> privileged.Result:
        raise error

    monkeypatch.setitem(TABLE, privileged.GetHost, fail)
    answer = error_of(raw(socket_path, framed(GET_HOST)))
    assert (answer.code, hint in answer.hint) == ("unavailable", True)


def test_stopping_lets_a_request_finish(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process ends with `serve`, and all that root was doing would with it."""
    begun, go = threading.Event(), threading.Event()

    def slow(*_: object) -> privileged.Result:
        begun.set()
        assert go.wait(20)
        return privileged.HostInfo(version="1", protocol=privileged.PROTOCOL_VERSION)

    monkeypatch.setitem(TABLE, privileged.GetHost, slow)
    with serving(helper_world_here) as (path, served), futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(raw, path, framed(GET_HOST))
        assert begun.wait(20)
        [serving_it] = [each for each in threading.enumerate() if each.name == "serves"]
        served.stop()
        serving_it.join(0.3)
        assert serving_it.is_alive()
        go.set()
        assert msgspec.json.decode(answer.result()[4:], type=privileged.Reply).error is None


def test_one_vm_at_a_time_others_at_once(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[str] = []
    seen: list[tuple[str, ...]] = []
    guard, met = threading.Lock(), threading.Barrier(2)

    def watch(_: object, request: privileged.PurgeLogs) -> privileged.Result:
        with guard:
            is_first = request.vm_id not in {each for at_once in seen for each in at_once}
            running.append(request.vm_id)
            seen.append(tuple(running))
        if is_first:
            met.wait(20)  # for the first of the other VM
        time.sleep(0.1)
        with guard:
            running.remove(request.vm_id)
        return privileged.Done()

    monkeypatch.setitem(TABLE, privileged.PurgeLogs, watch)
    ids = [VM, VM, VM, "ba9876543210"]
    threads = [
        threading.Thread(
            target=operations.run, args=(helper_world_here.policy, privileged.PurgeLogs(vm_id=each))
        )
        for each in ids
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert all(at_once.count(VM) <= 1 for at_once in seen)
    assert any(len(at_once) == 2 for at_once in seen)


def test_a_settled_list_waits_for_what_is_under_way_and_for_nothing_later(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that starts must see what the last one asked for; others see at once what is there now."""
    started, release, listed = threading.Event(), threading.Event(), threading.Event()

    def slow(*_: object) -> privileged.Result:
        started.set()
        assert release.wait(10)
        return privileged.Done()

    def settled() -> None:
        operations.execute(helper_world_here.policy, privileged.ListWorld(settled=True))
        listed.set()

    monkeypatch.setitem(TABLE, privileged.PurgeLogs, slow)
    work = privileged.PurgeLogs(vm_id=VM)
    threads = [
        threading.Thread(target=operations.run, args=(helper_world_here.policy, work)),
        threading.Thread(target=settled),
    ]
    threads[0].start()
    assert started.wait(10)
    threads[1].start()
    operations.execute(helper_world_here.policy, privileged.ListWorld())
    assert not listed.wait(0.2)
    release.set()
    assert listed.wait(10)
    for thread in threads:
        thread.join(10)


def test_every_operation_of_the_contract_is_in_the_table() -> None:
    assert set(operations.OPERATIONS) == set(privileged.REQUEST_TYPES)


# --- the client ---


async def test_client_asks_and_is_answered(socket_path: Path) -> None:
    client = helper.Client(socket_path, op_id=lambda: "op-7")
    assert (await client.call(privileged.GetHost())).protocol == privileged.PROTOCOL_VERSION
    with pytest.raises(errors.MissingToolError):
        await client.call(privileged.CheckRuntime())


async def test_client_says_when_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(errors.UnavailableError) as caught:
        await helper.Client(tmp_path / "none.sock").call(privileged.GetHost())
    assert "systemctl" in caught.value.hint


@pytest.mark.parametrize(
    "answer", [b"", b"\x00\x00\x00\x02{}", b"\x00\x00\x00\x05hello", b"\xff\xff\xff\xff"]
)
async def test_client_does_not_believe_nonsense(tmp_path: Path, answer: bytes) -> None:
    path = tmp_path / "odd.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                wire, _ = listener.accept()
                with wire:
                    wire.recv(65536)
                    wire.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises((errors.ProtocolError, errors.UnavailableError)):
            await helper.Client(path).call(privileged.GetHost())
        thread.join(timeout=10)


def test_tear_down_of_nothing_succeeds(helper_world_here: HelperWorld) -> None:
    operations.execute(helper_world_here.policy, privileged.TearDown(vm_id=VM))
    assert operations.execute(helper_world_here.policy, privileged.FindVmm(vm_id=VM)).pid == 0


def test_tear_down_goes_on_and_reports_all(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    jail = Path(helper_world_here.policy.jails) / "firecracker" / VM
    jail.mkdir(parents=True)

    def fail(_: object, request: privileged.DeleteTap | privileged.DeleteSnapshot) -> privileged.Done:
        raise OSError(5, "broken", type(request).__name__)

    monkeypatch.setitem(TABLE, privileged.DeleteTap, fail)
    monkeypatch.setitem(TABLE, privileged.DeleteSnapshot, fail)
    with pytest.raises(errors.OperationFailedError, match="DeleteTap") as caught:
        operations.execute(helper_world_here.policy, privileged.TearDown(vm_id=VM))
    assert any("DeleteSnapshot" in note for note in caught.value.__notes__)
    assert not jail.exists()


def test_world_lists_what_is_there(helper_world_here: HelperWorld) -> None:
    world = helper_world_here
    (world.root / "jails" / "firecracker" / VM).mkdir(parents=True)
    (world.root / "logs" / VM).mkdir(parents=True)
    (world.root / "logs" / "not an id").mkdir()
    listed = operations.execute(world.policy, privileged.ListWorld())
    mine = [vm for vm in listed.vms if vm.jail or vm.logs]
    assert mine == [privileged.VmWorld(vm_id=VM, jail=True, logs=True)]
    assert names.is_id(VM)
    assert os.path.isdir(world.root)
