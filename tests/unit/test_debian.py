# SPDX-License-Identifier: MIT
"""The host's package sources, and what a server gives for a suite; with the real apt, on a directory."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import pytest

from banger import debian
from banger.contract import errors

ARCH = platform.machine()
PACKAGES = b"Package: sample\nVersion: 1\nArchitecture: all\nFilename: x.deb\nSize: 1\nSHA256: 00\n"


def archive(root: Path, *, codename: str, suite: str) -> str:
    """One that is trusted, as its signature is that of any of the distribution's suites; its entry."""
    where = f"main/binary-{debian.ARCHITECTURES[ARCH]}/Packages"
    index = root / "dists/bookworm" / where
    index.parent.mkdir(parents=True)
    index.write_bytes(PACKAGES)
    (root / "dists/bookworm/Release").write_text(
        f"Origin: Debian\nSuite: {suite}\nCodename: {codename}\nComponents: main\n"
        f"Architectures: {debian.ARCHITECTURES[ARCH]}\nDate: Sat, 01 Jan 2022 10:00:00 UTC\n"
        f"SHA256:\n {hashlib.sha256(PACKAGES).hexdigest()} {len(PACKAGES)} {where}\n"
    )
    return f"deb [trusted=yes] file:{root} bookworm main"


@pytest.mark.parametrize(("codename", "suite"), [("bookworm", "oldstable"), ("trixie", "bookworm")])
def test_a_suite_by_its_codename_or_its_suite_name(tmp_path: Path, codename: str, suite: str) -> None:
    entry = archive(tmp_path / "archive", codename=codename, suite=suite)
    apt = debian.Apt(tmp_path / "apt", [entry], ARCH)
    apt.update()
    assert apt.listed("sample").version == "1"


def test_a_server_that_gives_another_suite_is_refused(tmp_path: Path) -> None:
    entry = archive(tmp_path / "archive", codename="bullseye", suite="oldoldstable")
    with pytest.raises(errors.UnavailableError, match=r"archive/? gives bullseye, and not bookworm"):
        debian.Apt(tmp_path / "apt", [entry], ARCH).update()
