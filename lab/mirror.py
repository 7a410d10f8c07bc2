# SPDX-License-Identifier: MIT
"""A small mirror that is genuine: the suite's own signed release and index, and of its packages a few.

Fetched by this machine's apt from the sources it is set up with, once for each list of packages, and kept
by content. A lab reaches no mirror: it is handed this. `python -m lab.mirror PACKAGE…` makes one.
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from banger import debian
from lab import cache, command, errors

log = logging.getLogger("lab")

SUITE: Final = "bookworm"
ESSENTIAL: Final = "?essential"
"""A pattern of apt's: what every system has."""
KEPT: Final = 3
_INDEX: Final = "main/binary-amd64"
_HASHED: Final = re.compile(rf"^ ([0-9a-f]{{64}}) +\d+ {_INDEX}/Packages\.xz$", re.MULTILINE)
_LISTED: Final = re.compile(r"^'([^']+)' (\S+) \d+ ", re.MULTILINE)
_FETCH_LIMIT_S: Final = 900


def ensure(root: Path, packages: Sequence[str]) -> cache.Entry:
    """Open the directory `dists/ pool/` of these packages and all that they need; fetched when needed."""

    def build(stage: Path) -> None:
        log.info("fetching a mirror of %s", " ".join(packages))
        _fetch(stage, packages)

    key = cache.key_of([Path(__file__).read_bytes(), *packages])
    return cache.Cache(root, "mirror", KEPT).ensure(key, build)


def _fetch(stage: Path, packages: Sequence[str]) -> None:
    source = next((each for each in debian.sources(SUITE) if each.split()[-2] == SUITE), None)
    if source is None:
        raise errors.LabError(f"no package source of this machine serves {SUITE}")
    uri = source.split()[-3]
    apt = _Apt(stage / "apt", source)
    apt("apt-get", "update", "-qq", "--error-on=any")
    _release(stage / "dists" / SUITE, apt, f"{uri.rstrip('/')}/dists/{SUITE}")
    wanted = ("install", "-qq", "--yes", *packages)
    listed = _LISTED.findall(apt("apt-get", "--print-uris", *wanted))
    apt("apt-get", "--download-only", *wanted)
    for address, name in listed:
        path = stage / urllib.parse.unquote(address.removeprefix(uri).lstrip("/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        (apt.archives / name).rename(path)
    apt.forget()
    for path in (stage, *stage.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _release(directory: Path, apt: _Apt, uri: str) -> None:
    """The release as it was signed, and the index that it names."""
    (directory / _INDEX).mkdir(parents=True)
    [signed] = apt.lists.glob("*_InRelease")
    shutil.copyfile(signed, directory / "InRelease")
    found = _HASHED.search((directory / "InRelease").read_text())
    if found is None:
        raise errors.LabError(f"the release of {SUITE} names no index of {_INDEX}")
    by_hash = directory / _INDEX / "by-hash/SHA256" / found[1]
    by_hash.parent.mkdir(parents=True)
    address = f"{uri}/{_INDEX}/by-hash/SHA256/{found[1]}"
    apt("/usr/lib/apt/apt-helper", "download-file", address, str(by_hash), f"SHA256:{found[1]}")
    (directory / _INDEX / "Packages.xz").hardlink_to(by_hash)


class _Apt:
    """This machine's apt, which knows how mirrors are reached, for one source in a directory of its own."""

    def __init__(self, directory: Path, source: str) -> None:
        self._directory = directory
        self.lists = directory / "lists"
        self.archives = directory / "cache/archives"
        for each in (self.lists, self.archives):
            (each / "partial").mkdir(parents=True)
        (directory / "status").touch()
        (directory / "sources.list").write_text(f"{source}\n")
        self._options = [
            f"-o{name}={value}"
            for name, value in {
                "Dir::State::Lists": self.lists,
                "Dir::State::status": directory / "status",
                "Dir::Cache": directory / "cache",
                "Dir::Etc::SourceList": directory / "sources.list",
                "Dir::Etc::SourceParts": "/dev/null",
                "Acquire::Languages": "none",
                "APT::Architecture": "amd64",
                "APT::Architectures": "amd64",
                "APT::Install-Recommends": "false",
                "APT::Keep-Downloaded-Packages": "true",
                "APT::Sandbox::User": "root",
            }.items()
        ]

    def __call__(self, program: str, *words: str) -> str:
        return command.run([program, *self._options, *words], timeout_s=_FETCH_LIMIT_S).text

    def forget(self) -> None:
        shutil.rmtree(self._directory)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    entry = ensure(cache.default_root(), sys.argv[1:])
    print(entry.path)
    entry.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
