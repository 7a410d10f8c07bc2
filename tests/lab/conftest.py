# SPDX-License-Identifier: MIT
"""Labs for tests, each named by the state it hands over. A lab that cannot run is an error, never a skip."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Generator, Iterator
from itertools import count
from pathlib import Path

import pytest
from _pytest import runner

from lab import cache, errors, instance, limits, rights
from lab.session import Lab
from tests.lab import turns

TREE = Path(__file__).parents[2]
TEST_LIMIT_S = 300
HUNG = pytest.StashKey[bool]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what lies here; fixtures are bounded by the lab's own limits, as the first one builds things."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.lab)
            limit = item.get_closest_marker("timeout")
            limit_s = limits.patient(limit.args[0] if limit else TEST_LIMIT_S)
            item.add_marker(pytest.mark.timeout(limit_s, func_only=True), append=False)
    wanted = os.environ.get("BANGER_LONG", "")
    long = [item for item in items if item.get_closest_marker("long")]
    others = [item for item in items if item not in long]
    chosen, left_out = {"": (others, long), "only": (long, others)}.get(wanted, (items, []))
    config.hook.pytest_deselected(items=left_out)
    items[:] = chosen


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Run a test when it is its turn; and once more, in new labs, when its lab hung: see docs/lab.md."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    with _turn(item):
        reports = _reports(item, nextitem)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _turn(item: pytest.Item) -> contextlib.AbstractContextManager[None]:
    """Of a test with a lab: this is asked for the others, too."""
    if item.get_closest_marker("lab") is None:
        return contextlib.nullcontext()
    return turns.taken(cache.default_root(), os.cpu_count() or 1)


def _reports(item: pytest.Item, nextitem: pytest.Item | None) -> list[pytest.TestReport]:
    reports = runner.runtestprotocol(item, nextitem=nextitem, log=False)
    if item.stash.get(HUNG, False):
        with contextlib.suppress(Exception):  # what a hung lab cannot take down goes with it
            item.session._setupstate.teardown_exact(None)
        reports = runner.runtestprotocol(item, nextitem=nextitem, log=False)
        reports[0].user_properties.append(("note", "its lab hung, and it was run again in a new one"))
    return reports


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Save evidence of a failed test from every lab it had, before they go down."""
    report = yield
    if call.excinfo and any(isinstance(each, errors.HungError) for each in _chain(call.excinfo.value)):
        item.stash[HUNG] = True
    if report.failed and report.when in ("setup", "call"):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", item.nodeid.partition("::")[2])
        used = (getattr(value, "lab", value) for value in getattr(item, "funcargs", {}).values())
        for lab in (value for value in used if isinstance(value, Lab)):
            directory = TREE / "build" / "evidence" / name / lab.name
            lab.evidence(directory)
            report.sections.append(("evidence", str(directory)))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Fail the test after which an installed host has something of banger's that nobody owns."""
    from tests.lab import user

    yield
    if item.get_closest_marker("without_rows"):
        return
    labs = {value for value in getattr(item, "funcargs", {}).values() if isinstance(value, Lab)}
    for lab in labs:
        if lab.is_on:
            left = user.unowned(lab)
            assert left == "", f"nobody owns:\n{left}"


@pytest.fixture(scope="session")
def new_name() -> Callable[[str], str]:
    """A function that names labs of this test session."""
    numbers = count()
    return lambda purpose: f"{purpose}-{os.getpid()}-{next(numbers)}"


@pytest.fixture(scope="session", autouse=True)
def no_lab_left() -> Iterator[None]:
    """Fail the session that leaves a lab behind."""
    yield
    left = [name for name in instance.names(cache.default_root()) if f"-{os.getpid()}-" in name]
    assert not left, f"labs left behind: {left}"


@pytest.fixture(scope="session")
def host(new_name: Callable[[str], str], no_lab_left: None) -> Iterator[Lab]:
    """A host that has booted, with nothing of ours installed; shared, so leave it as it was."""
    with Lab.up(new_name("host")) as lab:
        yield lab


@pytest.fixture
def fresh_host(new_name: Callable[[str], str], no_lab_left: None) -> Iterator[Lab]:
    """A host of the test's own, with nothing of ours installed."""
    with Lab.up(new_name("fresh")) as lab:
        yield lab


@pytest.fixture
def prepared_host(new_name: Callable[[str], str], no_lab_left: None) -> Iterator[Lab]:
    """A host of the test's own with the wheels that banger needs, in the place where banger will be."""
    from lab import provision

    with provision.prepared(new_name("prepared")) as lab:
        yield lab


@pytest.fixture(scope="session")
def installed_host(new_name: Callable[[str], str], no_lab_left: None) -> Iterator[Lab]:
    """A host with banger, its kernels and images; shared, so clean up what you make."""
    from lab import provision

    with provision.installed(new_name("installed")) as lab, rights.asked_for(lab):
        yield lab


@pytest.fixture
def fresh_installed_host(new_name: Callable[[str], str], no_lab_left: None) -> Iterator[Lab]:
    """A host of the test's own with banger installed, for tests that break or remove it."""
    from lab import provision

    with provision.installed(new_name("broken")) as lab:
        yield lab
