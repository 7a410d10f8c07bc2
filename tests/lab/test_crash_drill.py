# SPDX-License-Identifier: MIT
"""The crash drill on the real thing: a random walk of operations and kills, judged after every kill.

`BANGER_DRILL_KILLS` sets its length, `BANGER_DRILL_SEED` repeats one; the seed is printed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.session import Lab
from tests.lab import user

KILLS = int(os.environ.get("BANGER_DRILL_KILLS", "25"))
SEED = int(os.environ.get("BANGER_DRILL_SEED") or random.SystemRandom().randrange(10**6))
DRIVER = "/root/crash_walk.py"
IMAGE = "busybox"
_S_PER_KILL = 30

pytestmark = pytest.mark.timeout(300 + KILLS * _S_PER_KILL)


@pytest.fixture
def drilled(installed_host: Lab) -> Iterator[Lab]:
    """With the smallest image there is: a kill is worth more than a boot."""
    yield installed_host
    for vm in ("one", "two", "web"):
        user.banger(installed_host, "vm", "delete", vm, check=False)


def test_a_random_walk_of_kills(drilled: Lab) -> None:
    print(f"seed {SEED}, {KILLS} kills")
    drilled.write(DRIVER, Path(__file__).with_name("crash_walk.py").read_bytes())
    done = drilled.run(
        ["python3", DRIVER, str(SEED), str(KILLS), IMAGE], check=False, timeout_s=200 + KILLS * _S_PER_KILL
    )
    print(done.text)
    assert done.status == 0, f"BANGER_DRILL_SEED={SEED}: {done.error_text}"
    assert user.leftovers(drilled) == ""


def test_what_was_flushed_is_there_after_a_kill(drilled: Lab) -> None:
    """Of the VMM, in the middle of the guest's life: nobody was asked to stop."""
    user.banger(drilled, "vm", "create", "web", *user.TINY)
    script = "echo flushed > /root/kept; echo flushed > /kept; sync"
    user.banger(drilled, "vm", "exec", "web", "--", "sh", "-c", script)
    drilled.run(["kill", "-KILL", str(user.shown(drilled, "web")["pid"])])
    assert user.unowned(drilled) == ""
    assert "its VMM was ended by SIGKILL" in user.banger(drilled, "vm", "explain", "web").text
    user.banger(drilled, "vm", "start", "web")
    read = user.banger(drilled, "vm", "exec", "web", "--", "cat", "/root/kept", "/kept")
    assert read.text == "flushed\nflushed\n"
    user.banger(drilled, "vm", "delete", "web")


def test_a_host_that_loses_power_loses_nothing_that_was_flushed(fresh_installed_host: Lab) -> None:
    """Flushed in the guest, and by nobody else: the disks of the host were not."""
    host = fresh_installed_host
    user.banger(host, "vm", "create", "web", *user.TINY)
    host.run(["sync"])
    script = "echo flushed > /root/kept; echo flushed > /kept; sync"
    user.banger(host, "vm", "exec", "web", "--", "sh", "-c", script)
    host.power_cut()
    host.start()
    assert user.unowned(host) == ""
    assert user.leftovers(host) == ""
    shown = user.shown(host, "web")
    assert (shown["state"], shown["pid"]) == ("error", 0), shown
    assert "the host restarted while it ran" in shown["last_error"]["message"]
    user.banger(host, "vm", "start", "web")
    read = user.banger(host, "vm", "exec", "web", "--", "cat", "/root/kept", "/kept")
    assert read.text == "flushed\nflushed\n"
