# SPDX-License-Identifier: MIT
"""A test whose lab hung runs once more, in another; a fault is no hang, and a second hang is a fault."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
CONFTEST = """
from tests.lab.conftest import pytest_runtest_makereport, pytest_runtest_protocol
import pytest
made = []
@pytest.fixture(scope="session")
def lab():
    made.append("lab")
    yield len(made)
    made.append("ended")
"""
TEST = """
from lab import errors
tries = []
def test_one(lab):
    tries.append(lab)
    if {hangs}:
        try:
            raise errors.HungError("it hangs")
        except errors.HungError:
            raise AssertionError("no answer")
    assert {holds}
def test_two(lab):
    assert lab == tries[-1]
"""


@pytest.mark.parametrize(
    ("hangs", "holds", "ended"),
    [
        ("len(tries) == 1", "tries == [1, 3]", "2 passed"),
        ("True", "True", "1 failed, 1 passed"),
        ("False", "len(tries) == 2", "1 failed, 1 passed"),
    ],
)
def test_a_test_whose_lab_hung_runs_once_more(tmp_path: Path, hangs: str, holds: str, ended: str) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TEST.format(hangs=hangs, holds=holds))
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--rootdir={tmp_path}",
        str(tmp_path),
    ]
    done = subprocess.run(argv, cwd=TREE, capture_output=True, text=True, timeout=50, check=False)
    assert done.stdout.splitlines()[-1].startswith(ended), done.stdout
