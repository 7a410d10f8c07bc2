# SPDX-License-Identifier: MIT
"""banger-console on this machine's kernel: starts the jailer in its group, keeps logs, tells how VMMs end.

The jailer here is a shell that leaves a child behind, as the real one does.
"""

from __future__ import annotations

import contextlib
import os
import platform
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from banger import guest_binary
from banger.contract import errors, names, privileged
from banger.helper import cgroup, filesystem, process
from banger.helper import policy as policies
from banger.vm import ending
from tests.root import helper_world

VM = names.VmId(helper_world.VM)
UID = 2_100_000_001
LIMIT = 64 * 1024
"""No less than a pipe holds: what is left in one when all have ended is kept up to the limit."""
LOOK = """
id -u
grep ^0: /proc/self/cgroup
ls /proc/self/fd
"""
PROGRAM = guest_binary.path(platform.machine()).with_name(f"banger-console-{platform.machine()}")


def cgroup_tree() -> Path:
    """Version 2's, wherever that is mounted."""
    lines = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    return Path(next(line[1] for line in lines if line[2] == "cgroup2"))


@pytest.fixture
def groups() -> Iterator[list[Path]]:
    """Two control groups: the log writer's and the VM's."""
    made = [Path(cgroup_tree(), f"banger-{name}-{os.getpid()}") for name in ("consoles", "vm")]
    for path in made:
        path.mkdir()
    yield made
    for path in made:
        while (path / "cgroup.procs").read_text():
            time.sleep(0.01)  # a process that was told to end is nobody's child here
        path.rmdir()


class Started:
    """A log writer with two logs, whose first is the jailer's output, as the helper starts it."""

    def __init__(self, directory: Path, groups: list[Path], jailer: str, *, events: str = "") -> None:
        self.logs = [directory / name for name in ("console.log", "vmm.log")]
        fds = [os.open(group / "cgroup.procs", os.O_WRONLY) for group in groups]
        self.told, telling = os.pipe()
        counted = directory / "memory.events"
        counted.write_text(events)
        ending_log = os.open(directory / "ending.log", os.O_RDWR | os.O_CREAT, 0o600)
        source, output = os.pipe()
        logger, unused = os.pipe()
        streams = []
        for log, end in zip(self.logs, (source, logger), strict=True):
            kept = [os.open(f"{log}{old}", os.O_RDWR | os.O_CREAT, 0o600) for old in ("", ".1")]
            streams.append((end, *kept))
        fds += [telling, os.open(counted, os.O_RDONLY), ending_log]
        numbers = (UID, fds[0], *fds[2:], LIMIT, *(":".join(map(str, each)) for each in streams))
        fds += [fd for stream in streams for fd in stream]
        argv = [*map(str, numbers), "--", str(fds[1]), "/bin/sh", "-c", jailer]
        self.process = subprocess.Popen(
            [PROGRAM, *argv], stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=fds
        )
        for fd in (*fds, output, unused):
            os.close(fd)

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.told)

    def end(self) -> bytes:
        """What was told of the jailer, once all has ended."""
        assert self.process.wait(20) == 0
        return os.read(self.told, 8)


@pytest.fixture
def fifos(tmp_path: Path) -> list[Path]:
    """The VMM waits at the first, and says there in the second that it went on."""
    made = [tmp_path / name for name in ("wait", "said")]
    for path in made:
        os.mkfifo(path)
    return made


@pytest.mark.parametrize(
    ("last", "seen"),
    [
        ("kill -KILL $$", "its VMM was ended by SIGKILL"),
        ("kill -SEGV $$", "its VMM was ended by SIGSEGV"),
        ("exec >&- 2>&-; kill -KILL $$", "its VMM was ended by SIGKILL"),
        ("exit 150", "its VMM ended on SIGSEGV (status 150)"),
        ("exit 1", "its VMM ended unexpectedly, with status 1"),
        ("exit 0", "its VMM ended unexpectedly, with status 0"),
    ],
)
def test_how_the_vmm_ended_is_told(tmp_path: Path, groups: list[Path], last: str, seen: str) -> None:
    with Started(tmp_path, groups, f"sh -c '{last}' & exit 0") as started:
        assert started.end() == b"0"
    assert str(ending.read(tmp_path)) == seen


@pytest.mark.parametrize(
    ("hits", "whose"), [(1, "its control group was full"), (0, "the host had none left")]
)
def test_what_its_control_group_counted_is_told(
    tmp_path: Path, groups: list[Path], hits: int, whose: str
) -> None:
    events = f"low 0\nhigh 0\nmax 7\noom {hits}\noom_kill 1\noom_group_kill 0\n"
    with Started(tmp_path, groups, "sh -c 'kill -KILL $$' & exit 0", events=events) as started:
        started.end()
    seen = ending.read(tmp_path)
    assert seen == ending.Ending(signal=9, limit_hits=hits, memory_kills=1)
    assert str(seen) == f"the kernel ended its VMM for want of memory: {whose}"


@pytest.mark.parametrize("jailer", ["exit 3", "kill -KILL $$"])
def test_a_jailer_that_fails_is_told_by_silence(tmp_path: Path, groups: list[Path], jailer: str) -> None:
    with Started(tmp_path, groups, f"echo no; {jailer}") as started:
        assert started.end() == b""
    assert started.logs[0].read_text() == "no\n"
    assert ending.read(tmp_path) is None


def test_the_vmm_is_in_its_group_as_root_and_the_log_writer_is_not(
    tmp_path: Path, groups: list[Path], fifos: list[Path]
) -> None:
    jailer = f"sh -c '{LOOK} read line < {fifos[0]}' & exit 0"
    with Started(tmp_path, groups, jailer) as started:
        assert os.read(started.told, 8) == b"0"
        here = Path(f"/proc/{started.process.pid}")
        status = dict(line.split(":\t", 1) for line in (here / "status").read_text().splitlines())
        assert set((status["Uid"] + "\t" + status["Gid"]).split()) == {str(UID)}
        assert (status["Groups"].strip(), int(status["CapEff"], 16)) == ("", 0)
        assert (here / "cgroup").read_text().endswith(f"/{groups[0].name}\n")
        fifos[0].write_text("go\n")
        started.end()
    uid, where, *fds = started.logs[0].read_text().splitlines()
    assert uid == "0"
    assert where.endswith(f"/{groups[1].name}")
    assert set(fds) <= {"0", "1", "2", "3"}, "nothing of the log writer's; 3 is that of ls"


def test_a_vmm_outlives_its_log_writer(tmp_path: Path, groups: list[Path], fifos: list[Path]) -> None:
    jailer = f"sh -c 'read line < {fifos[0]}; echo lives > {fifos[1]}' & exit 0"
    with Started(tmp_path, groups, jailer) as started:
        assert os.read(started.told, 8) == b"0"
        vmm = os.pidfd_open(int((groups[1] / "cgroup.procs").read_text()))
        started.process.kill()
        started.process.wait()
        fifos[0].write_text("go\n")
        assert fifos[1].read_text() == "lives\n"
        assert select.select([vmm], [], [], 20)[0]
        os.close(vmm)


def test_nobody_believes_what_a_vmm_says_of_its_end(
    tmp_path: Path, groups: list[Path], fifos: list[Path]
) -> None:
    lie = "by signal 9;oom 1 oom_kill 1"
    lies = f'for fd in 0 1 2 3 4 5 6 7 8 9; do echo "{lie}" >&$fd; done'
    jailer = f"sh -c '{lies}; read line < {fifos[0]}' & exit 0"
    with Started(tmp_path, groups, jailer) as started:
        assert os.read(started.told, 8) == b"0"
        while lie not in started.logs[0].read_text():
            time.sleep(0.01)  # a log announces nothing
        started.process.kill()
        started.process.wait()
        assert ending.read(tmp_path) is None
        fifos[0].write_text("go\n")


def test_logs_stay_bounded(tmp_path: Path, groups: list[Path]) -> None:
    with Started(tmp_path, groups, "sh -c 'seq 40000' & exit 0") as started:
        started.end()
    old, current = (Path(f"{started.logs[0]}{end}").read_text() for end in (".1", ""))
    assert max(len(old), len(current)) <= LIMIT
    assert "".join((old, current)).splitlines()[-100:] == [str(n) for n in range(39901, 40001)]


@pytest.mark.parametrize("uid", ["", "x", "-1", "0", "1x", "4294967296"])
def test_what_is_no_uid_of_a_vm_is_refused(uid: str) -> None:
    """Reading it as 0 would leave it root."""
    said = subprocess.run([PROGRAM, uid, "0", "0", "-1", "0", str(LIMIT), "0:0:0", "--", "0", "/bin/true"])
    assert said.returncode == 2


def test_without_the_group_nothing_is_started() -> None:
    with open(os.devnull, "rb") as not_writable:
        fd = str(not_writable.fileno())
        argv = [
            str(UID),
            fd,
            fd,
            "-1",
            fd,
            str(LIMIT),
            f"{fd}:{fd}:{fd}",
            "--",
            fd,
            "/bin/true",
        ]
        said = subprocess.run([PROGRAM, *argv], pass_fds=[int(fd)], capture_output=True, text=True)
    assert said.returncode == 126
    assert said.stderr == "banger-console: cannot enter our control group: Bad file descriptor\n"


@pytest.fixture
def policy(tmp_path: Path) -> Iterator[policies.Policy]:
    """A helper's, with everything that it needs to start a VMM by its own log writer."""
    tree = cgroup_tree() / f"banger-helper-{os.getpid()}"
    leaves = [tree / names.CGROUP_PARENT / leaf for leaf in (cgroup.CONSOLES, VM)]
    for leaf in leaves:
        leaf.mkdir(parents=True)
    made = msgspec.structs.replace(helper_world.make(tmp_path).policy, cgroup_mount=str(tree))
    shutil.copy(PROGRAM, made.guest_dir)
    filesystem.make_logs(made, VM)
    for name in ("vmm.log", "metrics.log"):
        os.mkfifo(tmp_path / name)
    yield made
    process.delete_jail(made, privileged.DeleteJail(vm_id=VM))
    for path in (leaves[0], *leaves[0].parents):
        if tree in (path, *path.parents):
            path.rmdir()


def launch(policy: policies.Policy, directory: Path, jailer: str) -> privileged.Vmm:
    """As the helper does, with a shell as the jailer."""
    path = Path(policy.jailer)
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{jailer}\n")
    path.chmod(0o755)
    with contextlib.ExitStack() as stack:
        root = os.open(directory, os.O_PATH)
        stack.callback(os.close, root)
        started = stack.enter_context(process._started(policy, VM, UID, root))
        process._await_jailer(policy, VM, started, time.monotonic() + 20)
    return process.find(policy, VM)


def test_the_helper_finds_what_the_jailer_left_and_what_it_ended_of(
    tmp_path: Path, policy: policies.Policy, fifos: list[Path]
) -> None:
    vmm = launch(policy, tmp_path, f"sh -c 'read line < {fifos[0]}' & exit 0")
    os.kill(vmm.pid, signal.SIGKILL)
    process._await_console(VM, deadline_s=20)
    assert process.find(policy, VM).pid == 0
    assert ending.read(Path(filesystem.logs(policy, VM))) == ending.Ending(signal=9)


def test_the_helper_quotes_a_jailer_that_failed(tmp_path: Path, policy: policies.Policy) -> None:
    with pytest.raises(errors.OperationFailedError, match=r"jailer failed, for VM [0-9a-f]+: no such jail"):
        launch(policy, tmp_path, "echo no such jail >&2; exit 1")
