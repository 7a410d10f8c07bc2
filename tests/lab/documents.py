# SPDX-License-Identifier: MIT
"""The commands of a page, and whether what it shows came: in `console` blocks, `…` stands for any lines, and
within a line for anything. In `sh` blocks are commands alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

_BLOCK: Final = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMANDS: Final = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ANYTHING: Final = "…"


def console(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each command line and the lines shown below it."""
    for block in _BLOCK.findall(page.read_text()):
        command, shown = "", list[str]()
        for line in block.splitlines():
            if line.startswith("$ "):
                if command:
                    yield command, shown
                command, shown = line[2:], []
            else:
                shown.append(line)
        yield command, shown


def commands(page: Path) -> list[str]:
    """Each line of the `sh` blocks."""
    return [line for block in _COMMANDS.findall(page.read_text()) for line in block.splitlines()]


def is_shown(shown: list[str], text: str) -> bool:
    """Whether the output is what is shown; a page that shows nothing promises nothing."""
    if not shown:
        return True
    parts = ("(.*\n)*" if line == _ANYTHING else _line(line) for line in shown)
    return re.fullmatch("".join(parts), text) is not None


def _line(line: str) -> str:
    return ".*".join(map(re.escape, line.split(_ANYTHING))) + "\n"


def session(lines: Sequence[str], output: str) -> str:
    """A script of one shell for all lines, up to one that fails: `<number>.out`, `.err` and `.status`."""
    script = [f"mkdir -p {output}"]
    for number, line in enumerate(lines):
        place = f"{output}/{number}"
        # Braces, not a subshell: a line may change the directory.
        script.append(f"{{ {line}\n}} >{place}.out 2>{place}.err </dev/null; echo $? >{place}.status")
        script.append(f"[ $(cat {place}.status) = 0 ] || exit 1")
    return "\n".join(script)
