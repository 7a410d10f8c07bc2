# SPDX-License-Identifier: MIT
"""`banger doctor` on an installed host: all is well; what is broken is named, with what mends it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from lab import provision
from lab.session import Lab
from tests.lab import user

pytestmark = pytest.mark.timeout(600)
MODULE = "banger/helper/policy.py"
JAILER = "/var/lib/banger-root/runtime/jailer"
LACKING = {"mmdebstrap"}
"""What the lab's host does without: its image comes ready made."""
UNSEEN = {"versions", "leftovers", "dns", "root's interpreter"}
"""What only the daemon can tell, and what would be found by running code that others could change."""


def test_doctor_sees_what_is_wrong_and_says_what_mends_it(installed_host: Lab) -> None:
    host = installed_host
    well = _rows(host, "root")
    assert {name for name, row in well.items() if row["status"] != "pass"} == LACKING, well
    mine = _rows(host, user.NAME)
    assert {name for name, row in mine.items() if row["status"] not in ("pass", "skip")} == LACKING, mine
    assert mine["bangerd"]["status"] == mine["image"]["status"] == mine["leftovers"]["status"] == "pass"

    module = host.run(
        ["sh", "-c", f"echo {provision.VENV}/lib/python3*/site-packages/{MODULE}"]
    ).text.strip()
    with _writable_by_others(host, module):
        with _without_kernel_and_daemon(host):
            broken = _rows(host, "root", status=1)
        _check(broken, module)
        # What the report says to do is done, word for word.
        for name in ("root's code", "jailer"):
            host.run(["sh", "-c", broken[name]["remedy"]])
        again = _rows(host, "root")
    assert {name: row["status"] for name, row in again.items()} == {
        name: row["status"] for name, row in well.items()
    }


def _check(broken: dict[str, dict[str, Any]], module: str) -> None:
    found = {name for name, row in broken.items() if row["status"] == "fail"}
    assert found == {
        "root's code",
        "root's runtime",
        "jailer",
        "kernel",
        "bangerd",
        "bangerd socket",
        "units",
    }
    assert {name for name, row in broken.items() if row["status"] == "skip"} == UNSEEN
    assert module in broken["root's code"]["detail"]
    assert "inactive" in broken["bangerd"]["detail"]
    assert broken["units"]["remedy"] == "sudo systemctl start bangerd.service"
    assert re.search(r"lost \S+/vmlinux", broken["kernel"]["detail"])


@contextlib.contextmanager
def _writable_by_others(host: Lab, module: str) -> Iterator[None]:
    """The host is shared: it is mended afterwards, whatever doctor's words are worth."""
    host.run(["chmod", "g+w", module])
    host.run(["chown", user.NAME, JAILER])
    try:
        yield
    finally:
        host.run(["chmod", "g-w", module])
        host.run(["chown", "root", JAILER])


@contextlib.contextmanager
def _without_kernel_and_daemon(host: Lab) -> Iterator[None]:
    kernels = host.run(["sh", "-c", "ls -d /var/lib/banger/kernels/*/vmlinux"]).text.split()
    for path in kernels:
        host.run(["mv", path, f"{path}.aside"])
    host.run(["systemctl", "stop", "bangerd.service"])
    try:
        yield
    finally:
        host.run(["systemctl", "start", "bangerd.service"])
        for path in kernels:
            host.run(["mv", f"{path}.aside", path])


def _rows(host: Lab, name: str, *, status: int = 0) -> dict[str, dict[str, Any]]:
    """Row by check, as root or the owner sees it; the exit status must be this one."""
    done = host.run(
        ["banger", "doctor", "--timeout", "10m", "--json"], user=name, check=False, timeout_s=180
    )
    rows = {row["check"]: row for row in json.loads(done.text)["rows"]}
    assert done.status == status, [row for row in rows.values() if row["status"] == "fail"]
    return rows
