# SPDX-License-Identifier: MIT
"""The helper's socket and a crowd: many connections of the owner's at once, more than there is room for."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import msgspec
import pytest

from banger.contract import privileged
from banger.helper import server
from tests.root.helper_world import OWNER, HelperWorld
from tests.root.test_helper_server import GET_HOST, ask_as, serving

# The owner's daemon with many connections at once. Each line it is given is a number of answers to wait for.
CROWD = """
import select, socket, struct, sys
wires, data = [], sys.argv[3].encode()
for _ in range(int(sys.argv[2])):
    wire = socket.socket(socket.AF_UNIX); wire.connect(sys.argv[1]); wire.settimeout(20)
    if data: wire.sendall(struct.pack('!I', len(data)) + data)
    wires.append(wire)
kept = list(wires)
print('asked', flush=True)
for line in sys.stdin:
    for _ in range(int(line)):
        ready = select.select(wires, [], [], 20)[0]
        if not ready: sys.exit('silence')
        wires.remove(ready[0])
        print(ready[0].recv(65536)[4:].decode(), flush=True)
print(len(select.select(wires, [], [], 0)[0]), flush=True)
"""


class Crowd:
    """`count` connections of the owner's, each with the same request, or silent."""

    def __init__(self, path: Path, count: int, text: str = "") -> None:
        argv = ["/usr/bin/python3", "-c", CROWD, str(path), str(count), text]
        self._process = subprocess.Popen(
            argv, user=OWNER, group=OWNER, extra_groups=[], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._line() == b"asked\n"

    def answers(self, count: int) -> list[privileged.Reply]:
        assert self._process.stdin is not None
        self._process.stdin.write(b"%d\n" % count)
        self._process.stdin.flush()
        return [msgspec.json.decode(self._line(), type=privileged.Reply) for _ in range(count)]

    def end(self) -> int:
        """How many more had been answered."""
        said, _ = self._process.communicate(timeout=30)
        return int(said)

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def test_the_owner_waits_its_turn_and_root_does_not(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "BURST", 2)
    monkeypatch.setattr(server, "RATE", 0.001)
    with serving(helper_world_here) as (path, served):
        crowd = Crowd(path, 3, GET_HOST)
        assert all(isinstance(each.result, privileged.HostInfo) for each in crowd.answers(2))
        for _ in range(3):
            assert isinstance(ask_as(0, path, GET_HOST).result, privileged.HostInfo)
        served.stop()
        assert isinstance(crowd.answers(1)[0].result, privileged.HostInfo), "stopping ends the wait"
        assert crowd.end() == 0


def test_no_number_of_the_owner_s_connections_keeps_root_waiting(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Silent ones have all threads that the owner has, others wait for those, the rest is sent away."""
    monkeypatch.setattr(server, "READ_DEADLINE_S", 60.0)
    before = threading.active_count()
    most, beyond = server.MAX_CONNECTIONS + server.MAX_WAITING, 30
    with serving(helper_world_here) as (path, _):
        crowd = Crowd(path, most + beyond)
        assert isinstance(ask_as(0, path, GET_HOST).result, privileged.HostInfo)
        assert threading.active_count() <= before + 1 + server.MAX_CONNECTIONS + 1
        for each in crowd.answers(beyond):
            assert each.error is not None
            assert each.error.code == "unavailable"
            assert "too many requests" in each.error.message
        assert crowd.end() == 0, "all others have a place, or wait for one"
        assert isinstance(ask_as(OWNER, path, GET_HOST).result, privileged.HostInfo), "places came back"
    assert capfd.readouterr().err.count("cannot take connections") == 1


def test_a_request_that_gets_no_thread_is_told_and_keeps_no_place(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = threading.Thread.start

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with serving(helper_world_here) as (path, _):
        monkeypatch.setattr(threading.Thread, "start", fail)
        crowd = Crowd(path, server.MAX_CONNECTIONS + 1)
        for each in crowd.answers(server.MAX_CONNECTIONS + 1):
            assert each.error is not None
            assert (each.error.code, "TasksMax=" in each.error.hint) == ("unavailable", True)
        monkeypatch.setattr(threading.Thread, "start", begin)
        assert crowd.end() == 0
        assert isinstance(ask_as(OWNER, path, GET_HOST).result, privileged.HostInfo)
