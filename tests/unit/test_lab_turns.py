# SPDX-License-Identifier: MIT
"""As many at once as there are places, and each in the end; who dies takes no place with it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.lab import turns

TREE = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from tests.lab import turns
with turns.taken(Path(sys.argv[1]), 1):
    print("taken", flush=True)
    time.sleep(60)
"""


def test_no_more_at_once_than_places_and_all_in_the_end(tmp_path: Path) -> None:
    busy: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        with turns.taken(tmp_path, 2):
            busy.append(number)
            most.append(len(busy))
            time.sleep(0.05)
            busy.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(most) == 5
    assert max(most) == 2


def test_the_place_of_who_was_killed_is_free(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=TREE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "taken\n"
        holder.kill()
        holder.wait()
    with turns.taken(tmp_path, 1):
        pass
