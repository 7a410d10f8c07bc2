# SPDX-License-Identifier: MIT
"""The daemon and the builder on a real socket, each hostile in turn."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from banger import artefacts, debian, run
from banger.builder import main
from banger.contract import building, errors, names
from banger.images import base
from banger.owner import builder
from tests.fakes import builder as fakes
from tests.fakes import origin as origins

WANTED: Final = building.Base(
    arch="x86_64",
    suite="bookworm",
    variant="minbase",
    packages=("busybox-static", "curl=7.88.1-10+deb12u5"),
    exclude_paths=("/usr/share/man/*",),
    mirror="http://mirror.example",
)
REQUEST: Final[dict[str, Any]] = msgspec.to_builtins(building.Request(base=WANTED))
Script = Callable[[str], None]


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """Where a test's mmdebstrap leaves what it saw."""
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


@pytest.fixture
def mmdebstrap(tmp_path: Path, marks: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """A program of that name, that does this; `$tar` is what it shall make. It notes that it was started."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(run, "SEARCH_PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(debian, "KEYRING", tmp_path)
    monkeypatch.setattr(base, "mode", lambda: "root")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def does(script: str) -> None:
        program = tmp_path / "bin/mmdebstrap"
        program.write_text(
            f'#!/bin/sh\nmarks={marks}\nprintf "%s\\n" "$@" >$marks/argv\n'
            f'for each in "$@"; do case $each in */root.tar) tar=$each;; esac; done\n{script}\n'
        )
        program.chmod(0o755)

    return does


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[fakes.Listening]:
    made = fakes.Listening(tmp_path / "b.sock")
    yield made
    made.close()


@pytest.fixture
def origin() -> Iterator[origins.Origin]:
    made = origins.Origin()
    yield made
    made.close()


def build(tmp_path: Path, on_line: base.OnLine | None = None, **how: Any) -> Path:
    target = tmp_path / "made.tar"
    builder.Builder(tmp_path / "b.sock", lambda: "op-1", **how)(WANTED, target, on_line)
    return target


def test_a_proxy_that_is_none_of_ours_is_said_before_a_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", "socks5h://me:hush@far.invalid:1080")
    with pytest.raises(errors.BadRequestError, match=r"ALL_PROXY is socks5h://far\.invalid:1080"):
        build(tmp_path)


def test_a_tar_and_what_is_said_on_the_way(
    tmp_path: Path,
    marks: Path,
    mmdebstrap: Script,
    listening: fakes.Listening,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/etc/ssl/ours.pem")
    monkeypatch.setenv("SSL_CERT_KEY", "/etc/ssl/ours.key")
    mmdebstrap('env >$marks/env; echo first >&2; echo second >&2; head -c 1000000 /dev/zero >"$tar"')
    lines: list[str] = []
    made = build(tmp_path, lines.append)
    assert made.read_bytes() == bytes(1_000_000)
    assert lines == ["first", "second"]
    argv = (marks / "argv").read_text().splitlines()
    assert argv[:5] == [
        "--mode=root",
        "--variant=minbase",
        "--architectures=amd64",
        "--format=tar",
        "--include=busybox-static,curl=7.88.1-10+deb12u5",
    ]
    seen = dict(line.split("=", 1) for line in (marks / "env").read_text().splitlines())
    assert seen["SSL_CERT_FILE"] == "/etc/ssl/ours.pem"
    assert "SSL_CERT_KEY" not in builder._environment()
    listening.wait()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_build_is_told_no_proxy_of_ours_but_the_way_out(
    tmp_path: Path,
    marks: Path,
    mmdebstrap: Script,
    listening: fakes.Listening,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the daemon's proxy wants as a password would else be every package's."""
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy", "no_proxy"):
        monkeypatch.setenv(name, "http://user:secret@proxy.example:3128")
    mmdebstrap('env >$marks/env; head -c 10 /dev/zero >"$tar"')
    build(tmp_path)
    text = (marks / "env").read_text()
    assert "secret" not in text
    seen = dict(line.split("=", 1) for line in text.splitlines() if "_proxy=" in line.lower())
    assert seen.keys() == set(main._PROXIES)
    [address] = set(seen.values())
    assert re.fullmatch(r"http://127\.0\.0\.1:[0-9]+", address)


def test_what_a_build_asks_for_is_fetched_by_the_daemon_from_package_sources_alone(
    tmp_path: Path, marks: Path, mmdebstrap: Script, listening: fakes.Listening, origin: origins.Origin
) -> None:
    """Else it would reach what listens on the host's loopback."""
    mmdebstrap(
        f"curl -s -w '%{{http_code}}' -o $marks/there {origin.url}/a >$marks/status\n"
        f"curl -s -w '%{{http_code}}' -o /dev/null http://127.0.0.1:1/ >$marks/refused\n"
        'head -c 10 /dev/zero >"$tar"'
    )
    target = tmp_path / "made.tar"
    wanted = msgspec.structs.replace(WANTED, mirror=origin.url)
    builder.Builder(tmp_path / "b.sock")(wanted, target, None)
    assert (marks / "status").read_text() == "200"
    assert (marks / "there").read_bytes() == origins.BODY
    assert (marks / "refused").read_text() == "403"


HOSTILE: Final[dict[str, Callable[[dict[str, Any]], object]]] = {
    "an option as package": lambda r: r["base"].update(packages=["--setup-hook=id"]),
    "an option after an =": lambda r: r["base"].update(packages=["a1= --hook-dir=/tmp"]),
    "two packages in one": lambda r: r["base"].update(packages=["good,?evil"]),
    "a line break": lambda r: r["base"].update(packages=["good\n"]),
    "no package": lambda r: r["base"].update(packages=[]),
    "a glob on two lines": lambda r: r["base"].update(exclude_paths=["/a\npost-invoke=id"]),
    "a glob that is none": lambda r: r["base"].update(include_paths=["post-invoke=id"]),
    "a mirror with options": lambda r: r["base"].update(mirror="http://m [trusted=yes]"),
    "a mirror by ssh": lambda r: r["base"].update(mirror="ssh://m/"),
    "a suite that is an option": lambda r: r["base"].update(suite="--help"),
    "a variant of its own": lambda r: r["base"].update(variant="minbase --mode=root"),
    "another processor": lambda r: r["base"].update(arch="../../x"),
    "a field that there is not": lambda r: r["base"].update(hook="id"),
    "another field": lambda r: r.update(argv=["id"]),
    "a preloaded library": lambda r: r.update(environment={"LD_PRELOAD": "/tmp/evil.so"}),
    "a proxy with a password": lambda r: r.update(environment={"http_proxy": "http://u:p@proxy:1"}),
    "another home": lambda r: r.update(environment={"HOME": "/root"}),
    "a variable on two lines": lambda r: r.update(environment={"SSL_CERT_DIR": "/x\nX: y"}),
    "an id that is no id": lambda r: r.update(op_id="<3>forged\n"),
}


def asked(data: bytes, owner_uid: int | None = None, *, end: bool = False) -> errors.ErrorBody:
    """What the builder says to these bytes."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(data)
        if end:
            ours.shutdown(socket.SHUT_WR)
        fakes.served(theirs, owner_uid)
        kind, size = building.FRAME.unpack(ours.recv(building.FRAME.size))
        assert kind == building.ANSWER
        body = msgspec.json.decode(ours.recv(size), type=building.Answer).error
    assert body is not None
    return body


def framed(content: bytes) -> bytes:
    return building.LENGTH.pack(len(content)) + content


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_request_starts_nothing(marks: Path, mmdebstrap: Script, what: str) -> None:
    mmdebstrap("exit 1")
    request = json.loads(json.dumps(REQUEST))
    HOSTILE[what](request)
    assert asked(framed(json.dumps(request).encode())).code == "bad_request"
    assert list(marks.iterdir()) == []


def test_what_is_no_request_is_refused() -> None:
    assert asked(framed(b"{")).code == "bad_request"
    assert asked(framed(b"\xff" * 10)).code == "bad_request"
    assert asked(framed(b"[" * 100_000)).code == "bad_request"
    assert "too long" in asked(building.LENGTH.pack(building.MAX_REQUEST_BYTES + 1)).message
    assert "before its time" in asked(framed(json.dumps(REQUEST).encode())[:-1], end=True).message


def test_one_that_does_not_go_on_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("banger.builder.main._READ_DEADLINE_S", 0.05)
    assert asked(b"\0").code == "timed_out"


def test_another_user_is_refused_before_a_byte_is_read(marks: Path, mmdebstrap: Script) -> None:
    mmdebstrap("exit 1")
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)  # root may build
    try:
        assert asked(b"", owner_uid=12345).code == "unauthorized"
    finally:
        os.seteuid(before)
    assert list(marks.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("echo 'E: no such package' >&2; exit 100", "operation_failed", "exited 100: E: no such package"),
        ("echo 'No space left on device' >&2; exit 1", "no_space", "no space left"),
        ("exec sleep 60", "timed_out", "not done after"),
    ],
)
def test_how_it_failed_comes_across(
    tmp_path: Path,
    mmdebstrap: Script,
    listening: fakes.Listening,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    code: str,
    said: str,
) -> None:
    if code == "timed_out":
        monkeypatch.setattr(base, "DEADLINE_S", 0.2)
    mmdebstrap(script)
    with pytest.raises(errors.BangerError, match=said) as caught:
        build(tmp_path)
    assert caught.value.code == code
    assert "--include=busybox-static" in caught.value.fields["replay"]
    assert code != "no_space" or "/var/tmp" in caught.value.hint


@pytest.mark.parametrize(
    "script", ['mkfifo "$tar"', 'rm -f "$tar"; ln -s /dev/zero "$tar"', 'rm -f "$tar"', 'mkdir "$tar"']
)
def test_what_is_made_and_is_no_file_is_not_read(
    tmp_path: Path, mmdebstrap: Script, listening: fakes.Listening, script: str
) -> None:
    """A pipe would be waited for, a device read, without end."""
    mmdebstrap(script)
    with pytest.raises(errors.OperationFailedError, match="no file"):
        build(tmp_path, deadline_s=20)


def test_what_the_host_lacks_comes_across(
    tmp_path: Path, mmdebstrap: Script, listening: fakes.Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "mode", lambda: "fakechroot")
    monkeypatch.setattr(run, "SEARCH_PATH", str(tmp_path))
    with pytest.raises(errors.MissingToolError, match="mmdebstrap, fakechroot, fakeroot") as caught:
        build(tmp_path)
    assert caught.value.hint == "`sudo apt install mmdebstrap fakechroot fakeroot`"


async def test_a_cancelled_build_ends_with_all_it_started(
    tmp_path: Path, marks: Path, mmdebstrap: Script, listening: fakes.Listening
) -> None:
    """Also what has left its process group."""
    mmdebstrap(
        "setsid sleep 1000 & echo $! >>$marks/pids; sleep 1000 & echo $! >>$marks/pids\n"
        "echo $$ >>$marks/pids; echo begun >&2; wait"
    )
    loop, begun = asyncio.get_running_loop(), asyncio.Event()

    def hear(line: str) -> None:
        loop.call_soon_threadsafe(begun.set)

    task = asyncio.create_task(run.in_thread(build, tmp_path, hear))
    await asyncio.wait_for(begun.wait(), 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(listening.wait)
    pids = (marks / "pids").read_text().split()
    assert len(pids) == 3
    assert not [pid for pid in pids if running(pid)]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_disk_that_fills_up_ends_the_build_and_all_it_started(
    tmp_path: Path,
    marks: Path,
    mmdebstrap: Script,
    listening: fakes.Listening,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mmdebstrap("setsid sleep 1000 & echo $! >>$marks/pids; echo $$ >>$marks/pids; echo begun >&2; wait")

    def hear(line: str) -> None:
        monkeypatch.setattr(artefacts, "RESERVE_BYTES", 1 << 60)

    with pytest.raises(errors.NoSpaceError, match="what is unpacked") as caught:
        build(tmp_path, hear)
    assert "/var/tmp" in caught.value.hint
    listening.wait()
    assert not [pid for pid in (marks / "pids").read_text().split() if running(pid)]


def running(pid: str) -> bool:
    """What init has not reaped yet is dead."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("uid", [0, 1000, names.BUILD_UIDS[0] - 1, names.UID_BASE])
def test_the_program_will_be_nobody_else(
    uid: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert main.main([]) == 1
    assert "no build's" in capsys.readouterr().err


def test_the_program_will_not_be_a_vms_uid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: names.BUILD_UIDS[-1])
    install = tmp_path / "install.toml"
    install.write_text(f"owner_uid = 1000\nuid_base = {names.UID_BASE - 2}\n")
    assert main.main(["--install", str(install)]) == 1
    assert "which a VM has" in capsys.readouterr().err


def test_where_there_is_no_builder_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(errors.UnavailableError, match="does not answer") as caught:
        build(tmp_path)
    assert "banger system install" in caught.value.hint
    assert not (tmp_path / "made.tar").exists()


def frame(kind: bytes, content: bytes) -> bytes:
    return building.FRAME.pack(kind, len(content)) + content


LIES: Final = {
    "nothing": (b"", "ended before its work did"),
    "half a frame": (frame(building.TAR, b"abc")[:-1], "ended before its work did"),
    "another kind": (frame(b"X", b""), "no answer"),
    "a frame without end": (building.FRAME.pack(building.TAR, 2**32 - 1), "no answer"),
    "a line without end": (frame(building.LINE, b"x" * (building.MAX_LINE_BYTES + 1)), "says too much"),
    "no JSON": (frame(building.ANSWER, b"{"), "not valid"),
    "deep JSON": (frame(building.ANSWER, b"[" * 100_000), "not valid"),
    "another field": (frame(building.ANSWER, b'{"path":"/etc/passwd"}'), "not valid"),
    "a way out without a socket": (frame(building.WAY_OUT, b""), "no answer"),
    "no text": (frame(building.ANSWER, b'{"error":{"code":"\xff","message":""}}'), "not valid"),
}


@contextlib.contextmanager
def lying(tmp_path: Path, says: Callable[[socket.socket], None]) -> Iterator[None]:
    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            size = building.LENGTH.unpack(connection.recv(4))[0]
            connection.recv(size, socket.MSG_WAITALL)
            says(connection)

    made = fakes.Listening(tmp_path / "b.sock", serve)
    try:
        yield
    finally:
        made.close()


@pytest.mark.parametrize("lie", LIES)
def test_a_hostile_answer_is_refused(tmp_path: Path, lie: str) -> None:
    data, said = LIES[lie]
    with lying(tmp_path, lambda c: c.sendall(data)), pytest.raises(errors.BangerError, match=said) as caught:
        build(tmp_path)
    assert caught.value.code in ("protocol", "unavailable")
    assert "journalctl -u 'bangerd-build@*'" in caught.value.hint


def handing(kind: bytes, *descriptors: int) -> Callable[[socket.socket], None]:
    def says(connection: socket.socket) -> None:
        socket.send_fds(connection, [frame(kind, b"")], descriptors)

    return says


def test_a_way_out_that_is_none_is_refused_and_none_stays_open(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.socket())
        datagrams = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        file = stack.enter_context(open(os.devnull))
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        unix.bind(str(tmp_path / "unix"))
        unix.listen()
        lies = [(building.WAY_OUT, each.fileno()) for each in (silent, datagrams, file, unix)]
        lies += [(building.LINE, listener.fileno()), (building.TAR, listener.fileno())]
        before = os.listdir("/proc/self/fd")
        for kind, descriptor in lies:
            with (
                lying(tmp_path, handing(kind, descriptor)),
                pytest.raises(errors.ProtocolError, match=r"way out|no answer"),
            ):
                build(tmp_path)
            (tmp_path / "b.sock").unlink()
            (tmp_path / "made.tar").unlink()
        assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_second_way_out_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def says(connection: socket.socket) -> None:
            for _ in range(2):
                socket.send_fds(connection, [frame(building.WAY_OUT, b"")], [listener.fileno()])

        with lying(tmp_path, says), pytest.raises(errors.ProtocolError, match="a second way out"):
            build(tmp_path)


def endless(kind: bytes, size: int) -> Callable[[socket.socket], None]:
    def says(connection: socket.socket) -> None:
        while True:
            connection.sendall(frame(kind, b"x" * size))

    return says


@pytest.mark.parametrize(("limit", "size"), [("MAX_LINES_BYTES", 1000), ("MAX_LINES", 1), ("MAX_LINES", 0)])
def test_lines_without_end_are_not_listened_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, size: int
) -> None:
    """Also when there is nothing in them."""
    monkeypatch.setattr(building, limit, 10_000)
    with (
        lying(tmp_path, endless(building.LINE, size)),
        pytest.raises(errors.ProtocolError, match="too much"),
    ):
        build(tmp_path)


def test_a_tar_without_end_leaves_room_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefacts, "RESERVE_BYTES", 1 << 60)
    monkeypatch.setattr(builder, "_LOOKED_AT", 1 << 20)
    says = endless(building.TAR, building.MAX_FRAME_BYTES)
    with lying(tmp_path, says), pytest.raises(errors.NoSpaceError) as caught:
        build(tmp_path)
    assert caught.value.hint
    assert (tmp_path / "made.tar").stat().st_size <= 2 << 20


def test_silence_ends_at_the_deadline(tmp_path: Path) -> None:
    def says_nothing(connection: socket.socket) -> None:
        connection.recv(1)

    with lying(tmp_path, says_nothing), pytest.raises(errors.DeadlineError, match="not done after"):
        build(tmp_path, deadline_s=0.1)


def test_a_tar_drop_by_drop_ends_at_the_deadline(tmp_path: Path) -> None:
    def drips(connection: socket.socket) -> None:
        while True:
            connection.sendall(frame(building.TAR, b"x"))
            time.sleep(0.01)

    with lying(tmp_path, drips), pytest.raises(errors.DeadlineError):
        build(tmp_path, deadline_s=0.2)
