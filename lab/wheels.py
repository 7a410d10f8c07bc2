# SPDX-License-Identifier: MIT
"""Builds banger's wheel and fetches the pinned wheels it needs, cached by content; says how to install them.

Used by provision and image.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from lab import cache, command

log = logging.getLogger("lab")

TREE = Path(__file__).resolve().parent.parent
REQUIREMENTS = TREE / "requirements" / "run.txt"
VENV = "/usr/local/lib/banger"
PIP = (f"{VENV}/bin/pip", "--disable-pip-version-check", "install", "-q", "--no-index")
KEPT = 4
# What goes into the wheel; a change in any of these makes another wheel.
_INPUTS = ("src", "guest", "units", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")
_LEFT_OUT = ("__pycache__", "_guest", ".egg-info")
# The lab's host is Debian 12, whatever Python runs this.
_HOST_PYTHON = "3.11"


def pinned(root: Path) -> cache.Entry:
    """Open the directory with the wheels that requirements/run.txt pins, each verified by its hash."""

    def build(stage: Path) -> None:
        log.info("fetching the pinned wheels")
        argv = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        options = ["--only-binary=:all:", "--python-version", _HOST_PYTHON, "--require-hashes"]
        command.run([*argv, *options, "-r", REQUIREMENTS, "-d", stage], timeout_s=600)

    return cache.Cache(root, "wheels", KEPT).ensure(cache.key_of([REQUIREMENTS.read_bytes()]), build)


def installing(place: str) -> Iterator[tuple[str, list[str]]]:
    """What is done, and by which command, until there is banger's virtual environment without banger.

    `place` has the directory `wheels` and requirements.txt.
    """
    yield "making the virtual environment", ["python3", "-m", "venv", VENV]
    found = ["--require-hashes", "--find-links", f"{place}/wheels", "-r", f"{place}/requirements.txt"]
    yield "installing the pinned wheels", [*PIP, *found]


def own(root: Path) -> cache.Entry:
    """Open the directory with banger's own wheel, built from this tree as it is."""

    def build(stage: Path) -> None:
        log.info("building banger's wheel")
        argv = [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(stage),
            str(TREE),
        ]
        command.run(argv, timeout_s=600)

    return cache.Cache(root, "own-wheel", KEPT).ensure(cache.key_of(_sources()), build)


def _sources() -> Iterator[str | bytes]:
    for name in _INPUTS:
        top = TREE / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and not any(part in str(path) for part in _LEFT_OUT):
                yield str(path.relative_to(TREE))
                yield path.read_bytes()
