# SPDX-License-Identifier: MIT
"""The audit record: every request that changes something, every refusal, in root's own file."""

from __future__ import annotations

import json
import os
import resource
import socket
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.contract import audit as records
from banger.contract import errors, privileged
from banger.helper import audit, operations, server
from banger.system import audit as reader
from tests.root.helper_world import OWNER, STRANGER, VM, HelperWorld


def ask(world: HelperWorld, text: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        data = text.encode()
        ours.sendall(struct.pack("!I", len(data)) + data)
        ours.shutdown(socket.SHUT_WR)
        server.exchange(world.policy, theirs)


def directory(world: HelperWorld) -> Path:
    return world.root / records.DIRECTORY


def entry(**more: Any) -> records.Entry:
    return records.Entry("2026-01-01T00:00:00+00:00", "done", 0, 1, 1.0, **more)


def test_what_changes_something_and_what_is_refused_is_recorded(
    helper_world_here: HelperWorld, own_network: None
) -> None:
    world = helper_world_here
    ask(world, json.dumps({"request": {"op": "purge_logs", "vm_id": VM}, "op_id": "op-1"}))
    ask(world, json.dumps({"request": {"op": "find_vmm", "vm_id": VM}}))
    ask(world, json.dumps({"request": {"op": "check_runtime"}, "op_id": "op-2"}))
    ask(world, '{"request": {"op": "run_command", "argv": ["id"]}}')
    done, failed, refused = reader.read(directory(world))
    assert (done.op, done.outcome, done.vm, done.op_id) == ("purge_logs", "done", VM, "op-1")
    assert done.asked == {"op": "purge_logs", "vm_id": VM}
    assert (done.peer_uid, done.peer_pid) == (os.getuid(), os.getpid())
    assert (failed.op, failed.outcome, failed.code, failed.op_id) == (
        "check_runtime", "failed", "missing_tool", "op-2"
    )  # fmt: skip
    assert (refused.op, refused.outcome, refused.code) == ("", "refused", "bad_request")


def test_a_request_that_is_cut_off_is_recorded_as_begun(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The helper is killed in the middle of it: what it was about to do is on record before it does it."""
    world = helper_world_here
    seen: list[records.Entry] = []

    def cut_off(*_: object) -> privileged.Result:
        seen.extend(reader.read(directory(world)))
        raise SystemExit

    table: dict[Any, Any] = operations.OPERATIONS
    monkeypatch.setitem(table, privileged.PurgeLogs, cut_off)
    request = json.dumps({"request": {"op": "purge_logs", "vm_id": VM}, "op_id": "op-1"})
    with pytest.raises(SystemExit):
        ask(world, request)
    monkeypatch.undo()
    assert [(each.outcome, each.op, each.vm, each.asked["op"]) for each in seen] == [
        ("begun", "purge_logs", VM, "purge_logs")
    ]
    ask(world, request)
    assert [each.outcome for each in reader.read(directory(world))] == ["begun", "done"]


def test_a_flood_of_the_one_pushes_out_nothing_of_the_other(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_FILE_BYTES", 1000)
    policy = helper_world_here.policy
    audit.append(policy, entry(op_id="granted"))
    for _ in range(100):
        audit.append(policy, msgspec.structs.replace(entry(), outcome="refused"))
    assert [each.op_id for each in reader.read(directory(helper_world_here)) if each.op_id] == ["granted"]
    audit.append(policy, msgspec.structs.replace(entry(op_id="asked"), outcome="refused"))
    for _ in range(100):
        audit.append(policy, entry())
    assert [each.op_id for each in reader.read(directory(helper_world_here)) if each.op_id] == ["asked"]
    sizes = [path.stat().st_size for path in directory(helper_world_here).iterdir()]
    assert len(sizes) == len(records.FILES) + len(records.REFUSED)
    assert max(sizes) <= 1000


def test_it_is_root_s_and_the_owner_may_read_it(helper_world_here: HelperWorld) -> None:
    audit.append(helper_world_here.policy, entry())
    path = directory(helper_world_here) / records.FILES[0]
    for each, mode in ((path, 0o640), (path.parent, 0o750)):
        found = each.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, OWNER, mode)
    for uid, may in ((OWNER, True), (STRANGER, False)):
        done = subprocess.run(["cat", str(path)], user=uid, group=uid, extra_groups=[], capture_output=True)
        assert (done.returncode == 0) is may
        for words in (("truncate", "-s0"), ("rm", "-f"), ("mv", "-t", "/tmp")):
            command = [*words, str(path)]
            subprocess.run(command, user=uid, group=uid, extra_groups=[], capture_output=True)
    assert len(list(reader.read(path.parent))) == 1


def test_it_is_bounded_and_keeps_the_newest(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_FILE_BYTES", 1000)
    for number in range(100):
        audit.append(helper_world_here.policy, entry(op_id=f"op-{number}"))
    files = sorted(directory(helper_world_here).iterdir())
    assert [path.name for path in files] == list(records.FILES)
    assert all(path.stat().st_size <= 1000 for path in files)
    kept = [each.op_id for each in reader.read(directory(helper_world_here))]
    assert kept == [f"op-{number}" for number in range(100 - len(kept), 100)]


def test_a_line_that_a_full_disk_cuts_short_takes_no_other_with_it(
    helper_world_here: HelperWorld,
) -> None:
    world = helper_world_here
    audit.append(world.policy, entry(op="before"))
    path = directory(world) / records.FILES[0]
    whole = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 40, hard))
    try:
        with pytest.raises(OSError, match="No space left"):
            audit.append(world.policy, entry(op="cut-short"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    audit.append(world.policy, entry(op="after"))
    assert [each.op for each in reader.read(directory(world))] == ["before", "after"]


def test_a_link_in_its_place_is_not_followed(helper_world_here: HelperWorld, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("untouched")
    directory(helper_world_here).mkdir()
    (directory(helper_world_here) / records.FILES[0]).symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        audit.append(helper_world_here.policy, entry())
    assert target.read_text() == "untouched"


def test_a_record_that_cannot_be_written_keeps_no_vm_from_ending(
    helper_world_here: HelperWorld, capfd: pytest.CaptureFixture[str]
) -> None:
    (helper_world_here.root / records.DIRECTORY).write_text("no directory")
    (helper_world_here.root / "logs" / VM).mkdir(parents=True)
    ask(helper_world_here, json.dumps({"request": {"op": "purge_logs", "vm_id": VM}}))
    assert not (helper_world_here.root / "logs" / VM).exists()
    assert "the audit record cannot be written" in capfd.readouterr().err


def test_the_command_shows_it(helper_world_here: HelperWorld) -> None:
    policy = helper_world_here.policy
    audit.append(policy, entry(op="create_tap", vm=VM, op_id="op-1"))
    audit.append(
        policy, records.Entry("2026-01-01T00:00:01+00:00", "refused", OWNER, 9, 0.1, error="\x1b[2J")
    )
    with (directory(helper_world_here) / records.FILES[0]).open("ab") as file:
        file.write(b'{"time": "cut sh')

    def banger(*words: str) -> str:
        argv = [sys.executable, "-m", "banger.cli.start", "audit", *words]
        argv += ["--directory", str(directory(helper_world_here))]
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout

    shown = banger()
    assert "create_tap" in shown
    assert "\x1b" not in shown
    assert "\\x1b[2J" in shown
    assert [each["outcome"] for each in json.loads(banger("--refused", "--json"))] == ["refused"]
    assert [each["op"] for each in json.loads(banger("--vm", VM[:4], "--json"))] == ["create_tap"]
    assert json.loads(banger("--op-id", "op-2", "--json")) == []


def test_who_may_not_read_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFoundError):
        list(reader.read(tmp_path))
