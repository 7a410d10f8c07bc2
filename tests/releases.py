# SPDX-License-Identifier: MIT
"""Releases for tests: keys of their own, a wheel as another version, and what is signed by whom."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path


def key(directory: Path, name: str) -> Path:
    """A new key; its public half lies beside it."""
    made = directory / name
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(made)], check=True, timeout=30
    )
    return made


def signer(private: Path, *, name: str = "maintainer") -> str:
    """The line that lets this key sign releases."""
    return f'{name} namespaces="banger-release" {private.with_suffix(".pub").read_text()}'


def wheel(path: Path, files: Mapping[str, str | bytes]) -> Path:
    """One that holds these files."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def as_version(
    source: Path,
    directory: Path,
    version: str,
    changes: Mapping[str, tuple[str, str]],
    added: Mapping[str, str] | None = None,
) -> Path:
    """A wheel of banger with another version, one text in each of these files replaced, and files added."""
    old = source.name.split("-")[1]
    target = directory / source.name.replace(f"-{old}-", f"-{version}-", 1)
    with zipfile.ZipFile(source) as given, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as made:
        for member in given.infolist():
            data = given.read(member)
            if member.filename == "banger/__init__.py":
                data = data.replace(old.encode(), version.encode())
            if member.filename in changes:
                before, after = changes[member.filename]
                assert before.encode() in data, member.filename
                data = data.replace(before.encode(), after.encode(), 1)
            member.filename = member.filename.replace(
                f"banger-{old}.dist-info", f"banger-{version}.dist-info"
            )
            made.writestr(member, data)
        for name, text in (added or {}).items():
            made.writestr(name, text)
    return target
