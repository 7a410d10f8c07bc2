# SPDX-License-Identifier: MIT
"""`make screens`: what banger shows on a terminal, from a lab, as pictures for the documentation."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich import console, terminal_theme, text

from lab import command, errors, provision, session

log = logging.getLogger("lab")

TO: Final = Path(__file__).parents[1] / "docs" / "screens"
COLUMNS: Final = 100
PROMPT: Final = "$ "
LIMIT_S: Final = 120.0

_HIDDEN: Final = """
rm -rf ~/greeting; git init -q -b main ~/greeting; cd ~/greeting
git config user.name Ada; git config user.email ada@example.org
printf '#!/bin/sh\\necho hello world\\n' >greet; chmod +x greet; git add greet; git commit -qm 'Say hello'
"""


@dataclass(frozen=True, slots=True)
class Line:
    """What is typed, and what the screen ends with once that has been done."""

    typed: str
    until: str = PROMPT


@dataclass(frozen=True, slots=True)
class Screen:
    name: str
    title: str
    lines: tuple[Line, ...]
    rows: int


SCREENS: Final = (
    Screen(
        "run",
        "your repository in a clean machine",
        (
            Line("banger vm run --name work .", "# "),
            Line("git log --oneline; uname -r; ./greet", "# "),
            Line("echo 'echo hello you' >>greet; exit"),
            Line("banger vm workspace diff work"),
        ),
        rows=24,
    ),
    Screen(
        "explain",
        "where the time went",
        (Line("banger vm list"), Line("banger vm explain work")),
        rows=44,
    ),
)


class Terminal:
    """A shell of the owner's in the lab, in a window of this machine's tmux."""

    def __init__(self, lab: session.Lab, socket: Path) -> None:
        self._tmux = ["tmux", "-S", str(socket), "-f", "/dev/null"]
        self._cwd = lab.directory
        shell = [*lab.shell.ssh_argv("-tt", user=provision.OWNER), "bash --norc --noprofile"]
        self._run("new-session", "-d", "-x", str(COLUMNS), "-y", "60", shlex.join(shell))

    def _run(self, *words: str) -> str:
        return command.run([*self._tmux, *words], timeout_s=20, cwd=self._cwd).text

    def type(self, line: Line) -> None:
        """Types it as a user would, and waits until the cursor is behind what it ends with."""
        before = self.shown()
        self._run("send-keys", "-l", line.typed)
        self._run("send-keys", "Enter")
        deadline = time.monotonic() + LIMIT_S
        while not (self.shown() != before and self._before_cursor().endswith(line.until)):
            if time.monotonic() > deadline:
                raise errors.LabError(f"{line.typed!r} did not end in {LIMIT_S:g} s", hint=self.shown())
            time.sleep(0.5)  # nothing announces what a terminal shows

    def _before_cursor(self) -> str:
        x, y = self._run("display-message", "-p", "#{cursor_x} #{cursor_y}").split()
        return self.shown().split("\n")[int(y)].ljust(int(x))[: int(x)]

    def shown(self, *, styled: bool = False) -> str:
        return self._run("capture-pane", "-p", *(["-e"] if styled else []))

    def resize(self, rows: int) -> None:
        self._run("resize-window", "-x", str(COLUMNS), "-y", str(rows))

    def end(self) -> None:
        command.run([*self._tmux, "kill-server"], timeout_s=20, check=False)


@contextmanager
def _terminal(lab: session.Lab) -> Iterator[Terminal]:
    with tempfile.TemporaryDirectory(prefix="banger-screens-") as directory:
        made = Terminal(lab, Path(directory, "tmux"))
        try:
            yield made
        finally:
            made.end()


def take(terminal: Terminal, screen: Screen) -> str:
    """The picture as SVG."""
    terminal.resize(screen.rows)
    terminal.type(Line("echo"))  # or an empty screen would not change
    terminal.type(Line("clear"))
    for line in screen.lines:
        log.info("$ %s", line.typed)
        terminal.type(line)
    styled = terminal.shown(styled=True).rstrip("\n").split("\n")
    if terminal.shown().rstrip("\n").split("\n")[-1] == PROMPT.rstrip():
        styled.pop()
    return drawn("\n".join(styled), screen.title)


def drawn(styled: str, title: str) -> str:
    """Text with ANSI styles as a picture; with the fonts of whoever looks at it, none is fetched."""
    with open(os.devnull, "w") as nowhere:
        sheet = console.Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        sheet.print(text.Text.from_ansi(styled), end="")
        picture = sheet.export_svg(title=title, theme=terminal_theme.MONOKAI, unique_id="screen")
    while "@font-face" in picture:
        begin = picture.index("@font-face")
        picture = picture[:begin] + picture[picture.index("}", begin) + 1 :]
    return "\n".join(line.rstrip() for line in picture.split("\n") if line.strip()) + "\n"


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    TO.mkdir(exist_ok=True)
    try:
        with provision.installed(f"screens-{os.getpid()}") as lab, _terminal(lab) as terminal:
            lab.run(["sh", "-ec", _HIDDEN], user=provision.OWNER, cwd="/home/dev", env={"HOME": "/home/dev"})
            # The services start with the first request, and that is not what is shown.
            terminal.type(Line("banger vm run --rm -- true"))
            terminal.type(Line("export PS1='$ ' TERM=xterm-256color; cd ~/greeting; clear"))
            for screen in SCREENS:
                (TO / f"{screen.name}.svg").write_text(take(terminal, screen))
    except errors.LabError as error:
        print(f"screens: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
