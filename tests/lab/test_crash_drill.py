# SPDX-License-Identifier: MIT
"""The crash drill on the real thing: a random walk of operations and kills, judged after every kill.

`BANGER_DRILL_KILLS` sets its length, `BANGER_DRILL_SEED` repeats one; the seed is printed. What is drawn for
a kill follows from the seed and its number: `BANGER_DRILL_FIRST` can begin just before the one that failed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import artefacts
from lab.session import Lab
from tests.lab import crash_walk, user

KILLS = int(os.environ.get("BANGER_DRILL_KILLS", "25"))
FIRST = int(os.environ.get("BANGER_DRILL_FIRST", "0"))
SEED = int(os.environ.get("BANGER_DRILL_SEED") or random.SystemRandom().randrange(10**6))
DRIVER = "/root/crash_walk.py"
_S_PER_KILL = 60

pytestmark = pytest.mark.timeout(300 + KILLS * _S_PER_KILL)


@pytest.fixture
def drilled(installed_host: Lab) -> Iterator[Lab]:
    yield installed_host
    for vm in ("one", "two", "web"):
        user.banger(installed_host, "vm", "delete", vm, check=False)


def test_a_random_walk_of_kills(drilled: Lab) -> None:
    """The host's power is cut from out here; the next walk goes on, and judges it."""
    print(f"seed {SEED}, {KILLS} kills")
    drilled.write(DRIVER, Path(__file__).with_name("crash_walk.py").read_bytes())
    first, end, after, limit_s = FIRST, FIRST + KILLS, -1, 200 + KILLS * _S_PER_KILL
    while True:
        words = [str(SEED), str(first), str(end), str(after), *artefacts.IMAGES]
        done = drilled.run(["python3", DRIVER, *words], check=False, timeout_s=limit_s)
        print(done.text)
        if done.status != crash_walk.POWER:
            break
        drilled.power_cut()
        drilled.start()
        after = next(number for number in range(first, end) if crash_walk.is_power(number))
        first = after + 1
    assert done.status == 0, f"BANGER_DRILL_SEED={SEED}: {done.error_text}"
    assert user.leftovers(drilled) == ""


@pytest.mark.long
def test_what_was_flushed_is_there_after_a_kill_and_a_restart(drilled: Lab) -> None:
    """Of the VMM, in the middle of the guest's life. The walk looks for it too, every few kills."""
    user.banger(drilled, "vm", "create", "web", *user.TINY)
    script = "echo flushed > /root/kept; echo flushed > /kept; sync"
    user.banger(drilled, "vm", "exec", "web", "--", "sh", "-c", script)
    drilled.run(["kill", "-KILL", str(user.shown(drilled, "web")["pid"])])
    assert user.unowned(drilled) == ""
    assert "its VMM was ended by SIGKILL" in user.banger(drilled, "vm", "explain", "web").text
    user.banger(drilled, "vm", "start", "web")
    read = ("vm", "exec", "web", "--", "cat", "/root/kept", "/kept", "/proc/sys/kernel/random/boot_id")
    *kept, before = user.banger(drilled, *read).text.split()
    assert kept == ["flushed", "flushed"]
    user.banger(drilled, "vm", "restart", "web")
    *kept, after = user.banger(drilled, *read).text.split()
    assert kept == ["flushed", "flushed"]
    assert before != after == user.shown(drilled, "web")["boot_id"]
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


@pytest.mark.long
def test_a_host_that_goes_down_loses_nothing(fresh_installed_host: Lab) -> None:
    """Nobody flushed what is written last, and nobody starts the VM again."""
    host = fresh_installed_host
    user.banger(host, "vm", "create", "web", *user.TINY, "--autostart")
    user.banger(host, "vm", "exec", "web", "--", "sh", "-c", "echo late > /root/kept; echo late > /kept")
    host.reboot()
    started = user.banger(host, "vm", "start", "web", check=False)  # it waits for the start that goes on
    assert "web is running already" in started.error_text
    assert user.banger(host, "vm", "exec", "web", "--", "cat", "/root/kept", "/kept").text == "late\nlate\n"
    assert user.unowned(host) == ""
