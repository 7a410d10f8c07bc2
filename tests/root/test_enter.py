# SPDX-License-Identifier: MIT
"""banger-enter on this machine's kernel: the group first, then the user, then the program."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import guest_binary

UID = 2_100_000_001
LOOK = """
id -u; id -g; id -G
grep CapEff /proc/self/status | cut -f2
grep ^0: /proc/self/cgroup
ls /proc/self/fd
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group, in version 2's tree wherever that is mounted."""
    lines = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    path = Path(next(line[1] for line in lines if line[2] == "cgroup2"), f"banger-enter-{os.getpid()}")
    path.mkdir()
    yield path
    path.rmdir()


def enter(procs: int, uid: str, *argv: str) -> subprocess.CompletedProcess[str]:
    program = guest_binary.path(platform.machine()).with_name(f"banger-enter-{platform.machine()}")
    return subprocess.run(
        [program, str(procs), uid, *argv],
        pass_fds=[procs],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
    )


@pytest.fixture
def procs(group: Path) -> Iterator[int]:
    fd = os.open(group / "cgroup.procs", os.O_WRONLY)
    yield fd
    os.close(fd)


def test_the_program_is_in_the_group_as_the_user(procs: int, group: Path) -> None:
    said = enter(procs, str(UID), "/bin/sh", "-c", LOOK)
    uid, gid, groups, capabilities, where, *fds = said.stdout.splitlines()
    assert (uid, gid, groups) == (str(UID),) * 3, said
    assert int(capabilities, 16) == 0
    assert where.endswith(f"/{group.name}")
    assert str(procs) not in fds, "the way into the group is not the program's"


def test_root_stays_root_where_no_user_is_told(procs: int, group: Path) -> None:
    said = enter(procs, "0", "/bin/sh", "-c", LOOK)
    assert said.stdout.splitlines()[0] == "0"
    assert f"/{group.name}\n" in said.stdout


def test_without_the_group_there_is_no_program() -> None:
    with open(os.devnull, "rb") as not_writable:
        said = enter(not_writable.fileno(), "0", "/bin/echo", "ran")
    assert (said.returncode, said.stdout) == (126, "")
    assert said.stderr == "banger-enter: cannot enter the control group: Bad file descriptor\n"


def test_a_program_that_is_not_there(procs: int) -> None:
    said = enter(procs, "0", "/no/such/program")
    assert said.returncode == 126
    assert said.stderr == "banger-enter: /no/such/program: No such file or directory\n"


@pytest.mark.parametrize("uid", ["", "x", "-1", "1x", "4294967296"])
def test_what_is_no_uid_is_refused(procs: int, uid: str) -> None:
    """Reading it as 0 would leave the program root."""
    said = enter(procs, uid, "/bin/echo", "ran")
    assert (said.returncode, said.stdout) == (2, "")
