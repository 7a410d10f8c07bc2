# SPDX-License-Identifier: MIT
"""What holds for every tier, however the suite was started and whatever else the machine has to do."""

from __future__ import annotations

import signal

import hypothesis
import pytest

from tests import helper_coverage, order

SHOWN_LINES = 60
MEASURED = helper_coverage.begun()

# nohup, and a shell in the background, ignore some. What is ignored stays so in every program that a test
# starts; what is handled does not.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)
hypothesis.settings.register_profile(
    "banger", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("banger")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One order for all workers: they get the files as they come."""
    items[:] = order.by_file(items)


def pytest_configure(config: pytest.Config) -> None:
    """Where reports are shown, and not in xdist's workers, show failures as they happen."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailuresAtOnce(config))
    if MEASURED is not None:
        config.pluginmanager.register(MEASURED)


class FailuresAtOnce:
    """Says at once what failed: of a run that is ended before its summary nothing else is known."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Print the end of a failure, and how long it took."""
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is None:
            return
        for note in (text for name, text in report.user_properties if name == "note"):
            terminal.write_line(f"\n{report.nodeid}: {note}")
        if not report.failed:
            return
        lines = report.longreprtext.splitlines()[-SHOWN_LINES:]
        said = "\n".join(f"    {line}" for line in lines)
        terminal.write_line("")
        terminal.write_line(f"{report.when} failed after {report.duration:.1f} s: {report.nodeid}\n{said}")
