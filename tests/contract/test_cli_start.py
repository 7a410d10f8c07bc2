# SPDX-License-Identifier: MIT
"""What a short command loads before it answers, by the modules that its process ends with; and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tests.contract import cli_process

COMPLETING = {"_BANGER_COMPLETE": "bash_complete", "COMP_WORDS": "banger vm stop ", "COMP_CWORD": "3"}
# A module that only stands in for another has no spec.
REPORTING = """
import os, sys
from banger.cli import start

def end(status):
    names = (name for name, module in sys.modules.items() if getattr(module, "__spec__", None))
    os.write(3, " ".join(names).encode())
    leave(status)

leave, os._exit = os._exit, end
start.main()
"""
DAEMONS = {
    "asyncio",
    "websockets",
    "litestar",
    "uvicorn",
    "httpx",
    "banger.owner",
    "banger.system",
}
SLOW = DAEMONS | {"rich", "http.client", "email", "ssl", "h11", "inspect", "typing_extensions", "platform"}
DATA = {"msgspec", "httptools", "socket", "banger.cli.client", "banger.contract.resources"}


def loaded(cli: cli_process.Cli, *arguments: str, says: str, **env: str) -> set[str]:
    """The modules of a command that succeeds and prints `says`."""
    reading, writing = os.pipe()
    script = f"import os; os.dup2({writing}, 3)\n{REPORTING}"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=cli.environment(**env),
        pass_fds=(writing,),
        capture_output=True,
        timeout=cli_process.DEADLINE_S,
        check=False,
    )
    os.close(writing)
    with open(reading) as report:
        modules = set(report.read().split())
    assert (done.returncode, done.stderr) == (0, b"")
    assert says in done.stdout.decode()
    assert "banger.cli.main" in modules
    return modules


def test_help_loads_click_and_nothing_else_that_takes_time(cli: cli_process.Cli) -> None:
    found = loaded(cli, "--help", says="Create, run and look after VMs.")
    assert "click" in found
    assert found & (SLOW | DATA | {"dataclasses", "banger.cli.vm"}) == set()


def test_a_list_loads_what_it_shows_and_no_more(cli: cli_process.Cli) -> None:
    found = loaded(cli, "vm", "list", says="web")
    assert found >= DATA
    assert found & (SLOW | {"dataclasses", "hashlib", "urllib.parse", "shutil"}) == set()


def test_completing_a_name_loads_no_slow_library(cli: cli_process.Cli) -> None:
    assert loaded(cli, says="plain,web", **COMPLETING) & SLOW == set()


def test_a_command_in_a_guest_loads_no_slow_library(cli: cli_process.Cli) -> None:
    assert loaded(cli, "vm", "exec", "web", "--", "echo", "here", says="here") & SLOW - {"inspect"} == set()


def test_what_stands_in_gives_way_to_the_real_one() -> None:
    script = (
        "from banger.cli import start; start._put_stand_ins(); import inspect, platform, typing_extensions\n"
        "line = inspect.cleandoc('  one\\ttwo ')\n"
        "assert inspect.cleandoc(' a\\n   b\\n  ') == 'a\\nb'\n"
        "system = platform.system()\n"
        "import inspect as again\n"
        "assert again is not inspect and again.__file__ and inspect.signature is again.signature\n"
        "assert line == again.cleandoc('  one\\ttwo '), line\n"
        "from typing_extensions import Protocol\n"
        "from platform import machine\n"
        "import platform as real\n"
        "assert real.__file__ and system == real.system(), system\n"
    )
    subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": os.pathsep.join(sys.path)}, check=True)


def test_output_that_nobody_takes_is_no_success(cli: cli_process.Cli) -> None:
    with open("/dev/full", "w") as full, cli.started("vm", "list", stdout=full) as process:
        assert process.wait(cli_process.DEADLINE_S) != 0


def test_ctrl_c_while_modules_load_ends_it_without_a_traceback(cli: cli_process.Cli) -> None:
    script = (
        "import os, signal, sys\n"
        "from banger.cli import start\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'banger.cli.main':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "start.main()\n"
    )
    argv = [sys.executable, "-c", script, "--version"]
    done = subprocess.run(argv, env=cli.environment(), capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")
    ignoring = subprocess.run(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *argv],
        env=cli.environment(),
        capture_output=True,
        check=True,
    )
    assert ignoring.stdout.startswith(b"banger ")
