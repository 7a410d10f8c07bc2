# SPDX-License-Identifier: MIT
"""Measures which lines of the helper its own tests reach, beside all others in one run.

BANGER_COVERAGE has the files of these tests. Nothing is measured in others: a traced process is slower. What
modules do when they are imported counts as well, so it begins before any is. Each process keeps its share
below build/coverage/; `make test` and `make coverage` add them up.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

_TREE = Path(__file__).parents[1]


class HelperCoverage:
    """A plugin of xdist's workers."""

    def __init__(self, files: str) -> None:
        import coverage  # runs that measure nothing do not load it

        self._files = {_TREE / name for name in files.split()}
        self._coverage = coverage.Coverage(config_file=str(_TREE / "pyproject.toml"))
        self._exit = os._exit
        ends = signal.getsignal(signal.SIGTERM)
        self._coverage.start()
        signal.signal(signal.SIGTERM, ends)  # it is for programs that are started, not for what tests fork
        self._measures = True

    def pytest_collection_finish(self) -> None:
        self._measure(False)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._measure(item.path in self._files)
        return (yield)

    def pytest_sessionfinish(self) -> None:
        self._measure(False)
        self._coverage.save()

    def _measure(self, wanted: bool) -> None:
        if wanted and not self._measures:
            self._coverage.start()
        elif self._measures and not wanted:
            self._coverage.stop()
            # So much of what it changes for processes that are started stays.
            os._exit = self._exit
            os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
        self._measures = wanted


def begun() -> HelperCoverage | None:
    """Measuring from now on, in a worker of a run that asked for it."""
    files = os.environ.get("BANGER_COVERAGE", "")
    return HelperCoverage(files) if files and "PYTEST_XDIST_WORKER" in os.environ else None
