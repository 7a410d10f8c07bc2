# SPDX-License-Identifier: MIT
"""The door for programs, on real programs."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from banger import run
from banger.contract import errors


def _gone(pid: int) -> bool:
    """True when no live process has this number (a zombie of another parent counts as gone).

    Killed descendants have closed their pipes when `run` returns; on a busy machine they may be listed for a
    moment longer.
    """
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.005)
    return False


def _read_pid(path: Path) -> int:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < deadline, "the program never wrote its pid"
        time.sleep(0.005)
    return int(path.read_text())


def test_captures_both_streams() -> None:
    result = run.run(["sh", "-c", "echo out; echo err >&2"], deadline_s=5)
    assert (result.stdout, result.stderr, result.status) == (b"out\n", b"err\n", 0)


def test_feeds_large_input_and_reads_large_output() -> None:
    data = os.urandom(3 << 20)
    assert run.run(["cat"], stdin=data, deadline_s=20).stdout == data


def test_input_is_closed_by_default() -> None:
    assert run.run(["cat"], deadline_s=5).stdout == b""


def test_a_program_that_ignores_its_input_is_no_error() -> None:
    assert run.run(["true"], stdin=b"x" * (1 << 20), deadline_s=5).status == 0


def test_environment_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("PIP_RETRIES", "1")
    assert "LD_PRELOAD" not in run.run(["env"], deadline_s=5).text
    inherited = run.run(["env"], deadline_s=5, env=run.environment("PIP_*")).text
    assert "PIP_RETRIES=1" in inherited
    assert "LD_PRELOAD" not in inherited


@pytest.mark.parametrize("script", ["exit 3", "exec sleep 60"])
def test_a_password_in_an_address_is_in_no_error(script: str) -> None:
    """Such as that of a package source: it is an argument, and programs say what they were given."""
    argv = ["sh", "-c", f'echo "E: no $0" >&2; {script}', "deb https://user:se/cret@mirror.example/x suite"]
    with pytest.raises(errors.BangerError) as caught:
        run.run(argv, deadline_s=0.5)
    said = f"{caught.value} {caught.value.fields}"
    assert "cret" not in said
    assert "user" not in said
    assert "https://mirror.example/x suite" in caught.value.fields["replay"]


def test_failure_can_be_replayed() -> None:
    with pytest.raises(errors.OperationFailedError) as caught:
        run.run(["sh", "-c", "echo 'no such thing' >&2; exit 3"], deadline_s=5)
    assert str(caught.value) == "sh exited 3: no such thing"
    assert caught.value.fields["replay"] == """sh -c 'echo '"'"'no such thing'"'"' >&2; exit 3'"""
    assert caught.value.fields["exit_status"] == "3"


def test_accepted_exit_status() -> None:
    assert run.run(["sh", "-c", "exit 1"], deadline_s=5, ok=(0, 1)).status == 1


def test_death_by_signal_is_told() -> None:
    with pytest.raises(errors.OperationFailedError, match="ended by signal 11"):
        run.run(["sh", "-c", "kill -SEGV $$"], deadline_s=5)


def test_full_disk_has_its_own_error() -> None:
    with pytest.raises(errors.NoSpaceError) as caught:
        run.run(["sh", "-c", "echo 'cp: x: No space left on device' >&2; exit 1"], deadline_s=5)
    assert caught.value.hint


def test_more_memory_than_its_limit_is_refused_to_a_program() -> None:
    with pytest.raises(errors.OperationFailedError, match=r"tail exited 1: .*memory exhausted"):
        run.run(["tail", "/dev/zero"], deadline_s=30, memory_bytes=64 << 20)


def test_missing_program_names_the_package() -> None:
    with pytest.raises(errors.MissingToolError) as caught:
        run.require("no-such-program", "some-package")
    assert "some-package" in caught.value.hint


def test_deadline_ends_the_whole_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which comes once all of it is there, and deaf to a request."""
    pid_file = tmp_path / "pid"
    script = (
        f"trap '' TERM; (trap '' TERM; sh -c 'echo $PPID' > {pid_file}; echo there >&2; "
        "while :; do sleep 0.1; done) & wait"
    )
    really, ahead_s = time.monotonic, 0.0

    def jump(_: str) -> None:
        nonlocal ahead_s
        ahead_s = 60.0

    monkeypatch.setattr(time, "monotonic", lambda: really() + ahead_s)
    with pytest.raises(errors.DeadlineError, match=r"after 50 s"):
        run.run(["sh", "-c", script], deadline_s=50, on_line=jump)
    assert _gone(_read_pid(pid_file))


def test_leftover_children_die_with_the_program(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    run.run(["sh", "-c", f"sleep 100 & echo $! > {pid_file}"], deadline_s=5)
    assert _gone(_read_pid(pid_file))


def test_lines_arrive_while_it_runs() -> None:
    seen: list[str] = []
    run.run(["sh", "-c", "echo one >&2; echo; printf two >&2"], deadline_s=5, on_line=seen.append)
    assert seen == ["one", "two"]


def test_output_goes_to_a_file(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        result = run.run(["echo", "hello"], deadline_s=5, stdout=out)
    assert result.stdout == b""
    assert (tmp_path / "out").read_bytes() == b"hello\n"


async def test_cancelling_ends_the_program_first(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    task = asyncio.create_task(
        run.run_async(["sh", "-c", f"echo $$ > {pid_file}; sleep 100"], deadline_s=50)
    )
    pid = await asyncio.to_thread(_read_pid, pid_file)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert _gone(pid)


async def test_cancelling_twice_still_waits(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = f"trap '' TERM; echo $$ > {pid_file}; while :; do sleep 0.05; done"
    task = asyncio.create_task(run.run_async(["sh", "-c", script], deadline_s=50))
    pid = await asyncio.to_thread(_read_pid, pid_file)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert _gone(pid)


async def test_blocking_work_sees_the_cancellation() -> None:
    laps, loop, begun = 0, asyncio.get_running_loop(), asyncio.Event()

    def work() -> None:
        nonlocal laps
        while True:
            run.check_cancelled()
            laps += 1
            loop.call_soon_threadsafe(begun.set)
            time.sleep(0.001)

    working = asyncio.create_task(run.in_thread(work))
    await begun.wait()
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    seen = laps
    await asyncio.sleep(0.05)
    assert laps == seen > 0


async def test_in_thread_hands_over_result_and_error() -> None:
    assert await run.in_thread(divmod, 7, 3) == (2, 1)
    with pytest.raises(ZeroDivisionError):
        await run.in_thread(divmod, 7, 0)


async def test_a_hundred_at_once() -> None:
    results = await asyncio.gather(*(run.run_async(["echo", str(i)], deadline_s=30) for i in range(100)))
    assert [int(r.stdout) for r in results] == list(range(100))


def test_no_descriptor_is_left() -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    run.run(["true"], deadline_s=5)
    before = count()
    for _ in range(3):
        run.run(["cat"], stdin=b"x", deadline_s=5)
        with pytest.raises(errors.DeadlineError):
            run.run(["sleep", "5"], deadline_s=0.02)
    assert count() <= before, "what other tests left may go meanwhile"


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    "number", [errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM], ids=errno.errorcode.get
)
def test_a_program_that_the_host_has_no_room_for_is_not_blamed(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(subprocess, "Popen", full)
    with pytest.raises(errors.UnavailableError, match=r"more files|memory|process"):
        run.run(["true"], deadline_s=5)


def test_a_program_that_cannot_be_watched_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It would go on writing what is taken back meanwhile."""
    pids: list[int] = []

    def full(pid: int, flags: int = 0) -> int:
        pids.append(pid)
        raise OSError(errno.EMFILE, "Too many open files")

    run.run(["true"], deadline_s=5)
    before = _descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", full)
        with pytest.raises(OSError, match="Too many open files"):
            run.run(["sleep", "60"], deadline_s=5)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    assert _descriptors() <= before


async def test_work_for_which_there_is_no_thread_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    await run.in_thread(divmod, 7, 3)
    before = _descriptors()
    monkeypatch.setattr(threading.Thread, "start", full)
    with pytest.raises(RuntimeError, match="new thread"):
        await run.in_thread(divmod, 7, 3)
    assert _descriptors() <= before
