# SPDX-License-Identifier: MIT
"""What a file system has, as e2fsprogs see it: written without any of the code under test."""

from __future__ import annotations

import re
import stat as stats_of
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_STAT = re.compile(
    rb"Inode: (?P<inode>\d+)\s+Type: (?P<kind>[A-Za-z ]+?)\s+Mode:\s+(?P<mode>[0-7]+).*?"
    rb"User:\s+(?P<uid>-?\d+)\s+Group:\s+(?P<gid>-?\d+).*?Size: (?P<size>\d+).*?"
    rb"Links: (?P<links>\d+)\s+Blockcount: (?P<sectors>\d+).*?"
    rb"mtime: (?P<mtime>0x[0-9a-f]+):(?P<extra>[0-9a-f]+)",
    re.DOTALL,
)
_TYPES = {
    "regular": stats_of.S_IFREG,
    "directory": stats_of.S_IFDIR,
    "symlink": stats_of.S_IFLNK,
    "character special": stats_of.S_IFCHR,
    "block special": stats_of.S_IFBLK,
    "FIFO": stats_of.S_IFIFO,
}


@dataclass(frozen=True, slots=True)
class Stat:
    inode: int
    kind: str
    permissions: int
    uid: int
    gid: int
    size: int
    links: int
    sectors: int
    mtime_ns: int
    text: str

    @property
    def mode(self) -> int:
        """With its type bits."""
        return _TYPES[self.kind] | self.permissions


def check(image: Path) -> str:
    """e2fsck finds nothing, and says nothing that is not said of every file system."""
    done = subprocess.run(["e2fsck", "-f", "-n", image], capture_output=True, timeout=300)
    text = done.stdout.decode(errors="replace")
    assert done.returncode == 0, text + done.stderr.decode(errors="replace")
    said = [line for line in text.splitlines() if not re.match(r"Pass \d|.*: \d+/\d+ files", line)]
    assert not any(said), text
    return text


def ask(image: Path, *requests: str) -> list[bytes]:
    """Many questions in one debugfs; the answer to each."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", errors="surrogateescape") as script:
        script.writelines(f"{request}\n" for request in requests)
        script.flush()
        argv = ["debugfs", "-f", script.name, str(image)]
        done = subprocess.run(argv, capture_output=True, timeout=120, check=True)
    _, *answers = re.split(rb"^debugfs: .*\n", done.stdout, flags=re.MULTILINE)
    assert len(answers) == len(requests)
    return answers


def stats(image: Path, *paths: str) -> list[Stat]:
    return [_stat(answer) for answer in ask(image, *(f'stat "{path}"' for path in paths))]


def stat(image: Path, path: str) -> Stat:
    return stats(image, path)[0]


def find(image: Path, path: str) -> Stat | None:
    """None when there is nothing."""
    answer = ask(image, f'stat "{path}"')[0]
    return _stat(answer) if _STAT.search(answer) else None


def _stat(answer: bytes) -> Stat:
    match = _STAT.search(answer)
    assert match is not None, answer
    low, extra = int(match["mtime"], 16), int(match["extra"], 16)
    seconds = (low ^ 1 << 31) - (1 << 31) + ((extra & 3) << 32)
    return Stat(
        inode=int(match["inode"]),
        kind=match["kind"].decode(),
        permissions=int(match["mode"], 8),
        uid=int(match["uid"]) % (1 << 32),
        gid=int(match["gid"]) % (1 << 32),
        size=int(match["size"]),
        links=int(match["links"]),
        sectors=int(match["sectors"]),
        mtime_ns=seconds * 10**9 + (extra >> 2),
        text=answer.decode(errors="replace"),
    )


def content(image: Path, path: str) -> bytes:
    done = subprocess.run(["debugfs", "-R", f'cat "{path}"', image], capture_output=True, timeout=120)
    return done.stdout


def names(image: Path, path: str) -> set[bytes]:
    """Names in a directory, without the two dots."""
    answer = ask(image, f'ls -p "{path}"')[0]
    found = {line.split(b"/")[5] for line in answer.split(b"\n") if line.startswith(b"/")}
    return found - {b".", b"..", b""}
