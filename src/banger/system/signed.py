# SPDX-License-Identifier: MIT
"""A release: a directory with banger's wheel, those it needs, and a signed list. Verified before use.

    release.json        version, and name, size and sha256 of each wheel
    release.json.sig    made by `ssh-keygen -Y sign -n banger-release -f KEY release.json`
    *.whl

Whoever owns that directory may change it at any moment, so nothing in it is used: the list is read once, its
signature is checked, and each wheel is copied into a directory of root's while it is hashed. Nothing is
unpacked or run before every hash was right.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path
from typing import Final

import msgspec

from banger import run
from banger.contract import decoding, errors
from banger.system import versions

LIST: Final = "release.json"
SIGNATURE: Final = "release.json.sig"
NAMESPACE: Final = "banger-release"
"""What else a key signs is no release."""
MAX_LIST_BYTES: Final = 1 << 20
MAX_WHEEL_BYTES: Final = 256 << 20
MAX_WHEELS: Final = 200
_WHEEL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+]*(-[A-Za-z0-9._+]+){2,5}\.whl")
_CHUNK: Final = 1 << 20
_VERIFY_S: Final = 30.0


class Wheel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    size_bytes: int
    sha256: str


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What release.json says."""

    version: str
    wheels: tuple[Wheel, ...]


def read(directory: Path, signers: Path, scratch: Path) -> Release:
    """The list of a release that somebody in `signers` has signed; `scratch` is root's own.

    Raises NotFoundError for what is no release, UnauthorizedError for one that nobody of them has signed.
    """
    text = _read(directory / LIST)
    said = _read(directory / SIGNATURE)
    who = _verified(text, said, signers, scratch)
    try:
        release = decoding.json(text, Release)
    except msgspec.MsgspecError as error:
        raise errors.BadRequestError(
            f"{directory / LIST}, signed by {who}, is no list of a release: {error}"
        ) from error
    _check(release)
    return release


def copy(release: Release, directory: Path, target: Path) -> None:
    """Every wheel into `target`, which is root's own and empty, byte for byte as the list says."""
    for wheel in release.wheels:
        _copy(wheel, directory / wheel.name, target / wheel.name)


def _check(release: Release) -> None:
    versions.parse(release.version)
    if not 0 < len(release.wheels) <= MAX_WHEELS:
        raise errors.BadRequestError(f"a release has 1 to {MAX_WHEELS} wheels, not {len(release.wheels)}")
    names = [wheel.name for wheel in release.wheels]
    for name in names:
        if not _WHEEL_NAME.fullmatch(name):
            raise errors.BadRequestError(f"{name!r} is no name of a wheel")
    if len({name.lower() for name in names}) < len(names):
        raise errors.BadRequestError("a wheel is twice in the list")
    if sum(name.startswith(f"banger-{release.version}-") for name in names) != 1:
        raise errors.BadRequestError(f"the list has no wheel of banger {release.version}")


def _verified(text: bytes, signature: bytes, signers: Path, scratch: Path) -> str:
    """Whose signature it is."""
    if not any(_keys(signers)):
        raise errors.UnauthorizedError(
            f"nobody may sign releases for this host: {signers} names no key",
            hint="get the maintainers' public key by a way you trust, then: "
            "sudo banger system install --signers FILE",
        )
    held = scratch / SIGNATURE
    held.write_bytes(signature)
    tool = run.require("ssh-keygen", "openssh-client")
    common = ["-n", NAMESPACE, "-s", str(held)]
    found = run.run(
        [tool, "-Y", "find-principals", "-f", str(signers), "-s", str(held)],
        deadline_s=_VERIFY_S,
        ok=range(256),
    )
    who = (found.text.splitlines() or [""])[0] if found.status == 0 else ""
    if who:
        verify = [tool, "-Y", "verify", "-f", str(signers), "-I", who, *common]
        if run.run(verify, stdin=text, deadline_s=_VERIFY_S, ok=range(256)).status == 0:
            return who
    raise errors.UnauthorizedError(
        f"{LIST} is not signed by anybody in {signers}",
        hint="fetch the release again; if that does not help, it is not one of the maintainers'",
    )


def _keys(signers: Path) -> list[str]:
    try:
        lines = signers.read_text().splitlines()
    except FileNotFoundError:
        return []
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _open(path: Path) -> int:
    """A regular file, through no link in its last name, and without waiting for anybody."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise errors.NotFoundError(
            f"cannot read {path}: {error.strerror}", hint="name the directory of an unpacked release"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise errors.BadRequestError(f"{path} is no regular file")
    return descriptor


def _read(path: Path) -> bytes:
    with open(_open(path), "rb") as file:
        text = file.read(MAX_LIST_BYTES + 1)
    if len(text) > MAX_LIST_BYTES:
        raise errors.BadRequestError(f"{path} is larger than {MAX_LIST_BYTES} bytes")
    return text


def _copy(wheel: Wheel, source: Path, target: Path) -> None:
    if not 0 < wheel.size_bytes <= MAX_WHEEL_BYTES:
        raise errors.BadRequestError(f"{wheel.name} has {wheel.size_bytes} bytes")
    digest, left = hashlib.sha256(), wheel.size_bytes
    with open(_open(source), "rb", buffering=0) as file, target.open("xb") as copied:
        while chunk := file.read(min(_CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                break
            digest.update(chunk)
            copied.write(chunk)
    if left or digest.hexdigest() != wheel.sha256:
        target.unlink()
        raise errors.UnauthorizedError(
            f"{source} is not the file that was signed", hint="fetch the release again"
        )
