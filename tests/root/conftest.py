# SPDX-License-Identifier: MIT
"""Everything here needs root on this machine: loop devices, network namespaces, other uids."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.root import helper_world


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.root)


@pytest.fixture(scope="session", autouse=True)
def root_user() -> None:
    """A machine without root is an error, never a skip."""
    assert os.geteuid() == 0, "tests/root must run as root"


@pytest.fixture
def helper_world_here() -> Iterator[helper_world.HelperWorld]:
    """A host of the helper's in a directory that every uid can reach."""
    with tempfile.TemporaryDirectory(prefix="banger-root-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)
        yield helper_world.make(Path(directory))


@pytest.fixture
def own_network() -> Iterator[None]:
    """This thread is in a network namespace of its own."""
    with helper_world.network_namespace():
        yield
