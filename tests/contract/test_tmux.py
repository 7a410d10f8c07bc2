# SPDX-License-Identifier: MIT
"""Terminals as users see them, through tmux: the real agent's shell, an editor, Ctrl-C, sizes, progress."""

from __future__ import annotations

import asyncio
import shlex
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from banger.contract import privileged
from tests.contract import cli_process, workspaces

Guest = workspaces.Guest
DEADLINE_S = 40.0
PROMPT = "here> "


class Screen:
    """A terminal of 80 by 24 with a shell of this machine, in which `banger` is the program."""

    def __init__(self, socket: Path, server: Path) -> None:
        self._tmux = ["tmux", "-S", str(socket), "-f", "/dev/null"]
        cli = cli_process.Cli(server)
        words = shlex.join(cli.argv())
        env = [f"{name}={value}" for name, value in cli.environment(TERM="tmux", PS1=PROMPT).items()]
        self._run("new-session", "-d", "-x", "80", "-y", "24", shlex.join(["env", "-i", *env, "sh", "-i"]))
        self.type(f"alias banger={shlex.quote(words)}; clear\n")
        self.wait(lambda text: text.strip() == PROMPT.strip())

    def _run(self, *words: str) -> str:
        done = subprocess.run([*self._tmux, *words], capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    def text(self) -> str:
        return self._run("capture-pane", "-p")

    def type(self, text: str) -> None:
        for line in text.splitlines(keepends=True):
            self._run("send-keys", "-l", line.rstrip("\n"))
            if line.endswith("\n"):
                self.press("Enter")

    def press(self, *keys: str) -> None:
        self._run("send-keys", *keys)

    def resize(self, columns: int, rows: int) -> None:
        self._run("resize-window", "-x", str(columns), "-y", str(rows))

    def wait(self, is_so: Callable[[str], bool]) -> str:
        """The screen, once it is so. Nothing announces what a terminal shows."""
        deadline = time.monotonic() + DEADLINE_S
        while not is_so(text := self.text()):
            assert time.monotonic() < deadline, f"the screen shows:\n{text}"
            time.sleep(0.05)
        return text

    def see(self, wanted: str) -> str:
        return self.wait(lambda text: wanted in text)

    def end(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], capture_output=True, timeout=20, check=False)


@pytest.fixture
async def screen(guest: Guest, short_path: Path) -> AsyncIterator[Screen]:
    """Beside a served daemon with a VM, `web`, whose agent is a real one."""
    made = await asyncio.to_thread(Screen, short_path / "tmux", guest.served.path)
    yield made
    await asyncio.to_thread(made.end)


def _shell_in_guest(screen: Screen) -> None:
    screen.type("banger vm exec --cwd / --env PS1='inside> ' web -- sh -i\n")
    screen.see("\ninside>")  # the prompt, and not the words above that make it


async def test_a_shell_its_size_and_ctrl_c(screen: Screen) -> None:
    def use() -> None:
        _shell_in_guest(screen)
        screen.type("stty size\n")
        screen.see("24 80")
        screen.resize(100, 30)
        # It travels on its own, and what is typed may overtake it.
        screen.type('until [ "$(stty size)" = "$((20 + 10)) 100" ]; do sleep 0.1; done\n')
        screen.type("clear; stty size\n")
        screen.see("30 100")
        # Until the shell has given the terminal to the command, Ctrl-C is the shell's own.
        screen.type("clear; sh -c 'echo sleeps-$((20 + 22)); exec sleep 1000'\n")
        screen.see("sleeps-42")
        screen.press("C-c")
        screen.see("^C")
        screen.type("clear; echo still-$((20 + 22))\n")
        screen.see("still-42")
        screen.type("exit 3\n")
        screen.see(PROMPT.strip())
        screen.type("echo status $?\n")
        screen.see("status 3")
        screen.type("clear; stty -a\n")
        assert " icanon" in screen.see("icanon")
        assert " echo " in screen.text()

    await asyncio.to_thread(use)


async def test_a_full_screen_editor(screen: Screen, tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_text("first line\n")

    def use() -> None:
        screen.type("echo before\n")
        screen.see("before")
        _shell_in_guest(screen)
        screen.type(f"vi -u NONE -N {file}\n")
        screen.wait(lambda text: text.startswith("first line") and "~" in text)
        screen.resize(60, 12)
        screen.wait(lambda text: text.count("\n~") >= 9 and text.startswith("first line"))
        screen.type("osecond ü line")
        screen.press("Escape")
        screen.see("second ü line")
        screen.type(":wq\n")
        screen.wait(lambda text: "~" not in text and "inside>" in text)

    await asyncio.to_thread(use)
    assert file.read_text() == "first line\nsecond ü line\n"


async def test_progress_is_seen_and_leaves_nothing(screen: Screen, guest: Guest) -> None:
    released, reached = asyncio.Event(), asyncio.Event()

    async def stand_still(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.LaunchVmm):
            reached.set()
            await released.wait()

    guest.served.daemon.world.before = stand_still
    await asyncio.to_thread(screen.type, "banger vm run --rm -- sh -c 'echo out-$((20 + 22))'\n")
    await asyncio.wait_for(reached.wait(), DEADLINE_S)
    shown = await asyncio.to_thread(screen.see, "boot_firecracker")
    assert "prepare_rootfs" in shown
    released.set()
    shown = await asyncio.to_thread(
        screen.wait, lambda text: "out-42" in text and text.rstrip().endswith(PROMPT.strip())
    )
    assert "prepare_rootfs  " not in shown, "the table of stages is gone"


async def test_ctrl_c_while_it_starts_leaves_nothing(screen: Screen, guest: Guest) -> None:
    reached = asyncio.Event()

    async def fall_silent(request: privileged.Request[Any]) -> None:
        if isinstance(request, privileged.GrantVsock):
            guest.served.daemon.world.behaviour.silent = True
            reached.set()

    guest.served.daemon.world.before = fall_silent
    await asyncio.to_thread(screen.type, "banger vm run --rm --name shop -- true\n")
    await asyncio.wait_for(reached.wait(), DEADLINE_S)
    await asyncio.to_thread(screen.see, "wait_vsock_agent")
    await asyncio.to_thread(screen.press, "C-c")
    await asyncio.to_thread(screen.see, "nothing is left of shop")
    assert [vm.name for vm in await guest.served.daemon.services.vms.list()] == ["web"]
