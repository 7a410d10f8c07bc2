# SPDX-License-Identifier: MIT
"""The tutorial, and the page about agents and CI, line by line in one shell of an installed host's user."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.session import Lab
from tests.lab import documents, user

DOCS = Path(__file__).parents[2] / "docs"
OUTPUT = "/tmp/tutorial"
pytestmark = pytest.mark.timeout(600)


@pytest.mark.long
def test_who_follows_the_tutorial_gets_what_it_shows(installed_host: Lab) -> None:
    pages = [
        (line, shown)
        for name in ("tutorial.md", "agents.md")
        for line, shown in documents.console(DOCS / name)
        if not line.startswith("banger doctor")  # test_doctor.py has that
    ]
    # The second page works in the first one's repository and VMs; it ends with deleting both.
    try:
        done = installed_host.run(
            ["bash", "-c", documents.session([line for line, _ in pages], OUTPUT)],
            user=user.NAME,
            check=False,
            timeout_s=560,
        )
        for number, (line, shown) in enumerate(pages):
            status, said, complained = (
                installed_host.run(["cat", f"{OUTPUT}/{number}.{what}"], check=False).text
                for what in ("status", "out", "err")
            )
            assert status == "0\n", (line, said, complained, done.error_text)
            assert documents.is_shown(shown, said), (line, shown, said)
    finally:
        user.banger(installed_host, "vm", "delete", "work", "agent", check=False)
        installed_host.run(["rm", "-rf", f"/home/{user.NAME}/greeting", OUTPUT])
    assert user.leftovers(installed_host) == ""
