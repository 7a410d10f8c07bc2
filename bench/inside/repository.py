# SPDX-License-Identifier: MIT
"""A repository into a guest by `vm workspace prepare`, and by git and tar through `vm exec`; lines of JSON.

`python -m bench.inside.repository FILES ROUNDS`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from banger.cli import client
from bench.inside import ours

DEADLINE_S: Final = 900.0
_CLONE: Final = "rm -rf /root/rival; cat > /root/b && git clone -q -b main /root/b /root/rival && rm /root/b"
_UNPACK: Final = "cd /root/rival && tar -x"


def main(files: int, rounds: int) -> None:
    api = client.Client(ours.API)
    with ours.running(api), tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        repository = Path(name) / "repository"
        _make(repository, files)
        for number in range(rounds):
            _banger("vm", "exec", "--cwd", "/", ours.NAME, "--", "rm", "-rf", "/root/repo", "/root/rival")
            found = {"first": (_timed(lambda: _prepare(repository)), _timed(lambda: _clone(repository)))}
            for changed in range(10):
                (repository / "d1" / f"f{changed}").write_text(f"round {number}\n")
            found["again"] = (_timed(lambda: _prepare(repository)), _timed(lambda: _changes(repository)))
            print(json.dumps(found), flush=True)


def _timed(work: Callable[[], None]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _make(repository: Path, files: int) -> None:
    """Files of up to 8 KB that hardly compress, in a hundred directories, in one commit."""
    for number in range(files):
        path = repository / f"d{number % 100}" / f"f{number // 100}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(number * 7919 % 8192))
    _git(repository, "init", "-q", "-b", "main")
    _git(repository, "add", "-A")
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    _git(repository, *author, "-c", "gc.auto=0", "commit", "-q", "-m", "all")
    _git(repository, "gc", "-q")
    (repository / "d0" / "f0").write_text("changed\n")


def _prepare(repository: Path) -> None:
    _banger("vm", "workspace", "prepare", ours.NAME, str(repository))


def _clone(repository: Path) -> None:
    with _producer(repository, "git", "bundle", "create", "-q", "-", "--all") as bundle:
        _into(bundle, _CLONE)
    _changes(repository)


def _changes(repository: Path) -> None:
    """What rsync would find, as far as git knows it already."""
    names = subprocess.run(
        ["git", "-C", str(repository), "ls-files", "-m", "-z"], check=True, capture_output=True
    ).stdout
    with tempfile.TemporaryFile() as listed:
        listed.write(names)
        listed.seek(0)
        with _producer(repository, "tar", "-c", "--null", "-T", "-", stdin=listed.fileno()) as archive:
            _into(archive, _UNPACK)


def _producer(repository: Path, *argv: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, cwd=repository, stdin=stdin, stdout=subprocess.PIPE)


def _into(source: subprocess.Popen[bytes], script: str) -> None:
    _banger("vm", "exec", "--cwd", "/", ours.NAME, "--", "sh", "-c", script, stdin=source)
    if source.wait() != 0:
        raise RuntimeError(f"{source.args!r} failed")


def _banger(*words: str, stdin: subprocess.Popen[bytes] | None = None) -> None:
    subprocess.run(
        ["banger", *words],
        check=True,
        stdin=stdin.stdout if stdin is not None else subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=DEADLINE_S,
    )


def _git(repository: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=repository, check=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
