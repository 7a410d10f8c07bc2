# SPDX-License-Identifier: MIT
"""Firecracker and its jailer: which versions, whether they are here, where they come from.

The owner (daemon or command line) fetches into its cache; what root executes is a copy that root makes
with `install_runtime`, verified against the pinned sha256 while it is copied. A file the user supplies is
accepted with its own sha256 and recorded as such. `runtime.json` beside the copies says which is which.
"""

from __future__ import annotations

import importlib.resources
import platform
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from banger import pinned, run
from banger.contract import decoding, errors

RECORD: Final = "runtime.json"
MIN_VERSION: Final = (1, 12, 0)
_VERSION_DEADLINE_S: Final = 20.0
_VERSION_LINE = re.compile(r"^(?:Firecracker|Jailer) v(\d+\.\d+\.\d+\S*)", re.MULTILINE)


class _Catalog(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    file: tuple[pinned.PinnedFile, ...]


class Installed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of `runtime.json`: what was put there and on whose word."""

    sha256: str
    version: str
    source: Literal["catalog", "user"]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about one runtime file. `problem` is empty when it can be used."""

    name: str
    path: str
    present: bool
    version: str = ""
    sha256: str = ""
    source: str = ""
    sha256_ok: bool = False
    problem: str = ""


def machine() -> str:
    return platform.machine()


def catalog(arch: str | None = None) -> tuple[pinned.PinnedFile, ...]:
    """The pinned files for an architecture; empty where the catalog has none."""
    text = importlib.resources.files(__package__).joinpath("runtime.toml").read_bytes()
    files = decoding.toml(text, _Catalog).file
    return tuple(file for file in files if file.arch == (arch or machine()))


def pull(
    cache_dir: Path,
    *,
    local_dirs: Sequence[Path] = (),
    arch: str | None = None,
    on_line: Callable[[str], None] | None = None,
) -> dict[str, pinned.Fetched]:
    """Fetches and verifies every runtime file; the result names each one's place in the cache."""
    wanted = catalog(arch)
    if not wanted:
        raise errors.NotFoundError(
            f"the catalog has no runtime files for {arch or machine()}",
            hint="supply your own with --firecracker PATH and --jailer PATH",
        )
    return {
        file.name: pinned.fetch(file, cache_dir, local_dirs=local_dirs, on_line=on_line) for file in wanted
    }


def install_runtime(
    directory: Path, files: Mapping[str, Path], *, user_files: Mapping[str, Path] | None = None
) -> dict[str, Installed]:
    """Installs catalog files (verified) and the user's own (recorded); run by root for root's directory."""
    known = {file.name: file for file in catalog()}
    record: dict[str, Installed] = {}
    for name, path in {**files, **(user_files or {})}.items():
        if user_files is not None and name in user_files:
            record[name] = _install_own(directory, name, path)
        elif name in known:
            pinned.install(path, directory, name, known[name].sha256)
            record[name] = Installed(known[name].sha256, known[name].version, "catalog")
        else:
            raise errors.BadRequestError(f"{name!r} is not a runtime file")
    _write_record(directory, read_record(directory) | record)
    return record


def status(directory: Path) -> list[Status]:
    """One row per runtime file, found by looking, not by believing the record."""
    record = read_record(directory)
    pins = {file.name: file.sha256 for file in catalog()}
    return [
        _status(directory / name, record.get(name), pins.get(name, "")) for name in ("firecracker", "jailer")
    ]


def read_record(directory: Path) -> dict[str, Installed]:
    """An absent record is empty; a broken one is empty too, for every file is then judged by its pin."""
    try:
        return decoding.json((directory / RECORD).read_bytes(), dict[str, Installed])
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return {}


def own_files(directory: Path, *, but: Collection[str] = ()) -> set[str]:
    """The user's own that are installed. Raises ConflictError when one is not what was given then."""
    found = {name for name, file in read_record(directory).items() if file.source == "user"} - set(but)
    for row in status(directory):
        if row.name in found and row.problem:
            raise errors.ConflictError(
                f"in {directory}: {row.problem}",
                hint=f"give yours again: --{row.name} PATH; or: --pinned",
            )
    return found


def program_version(program: Path) -> str:
    """What the program says of itself; raises when it cannot run or says something else."""
    said = run.run([str(program), "--version"], deadline_s=_VERSION_DEADLINE_S).text
    match = _VERSION_LINE.search(said)
    if match is None:
        raise errors.OperationFailedError(f"{program} --version says no version: {said.splitlines()[:1]}")
    return match[1]


def parse_version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _install_own(directory: Path, name: str, path: Path) -> Installed:
    try:
        digest = pinned.sha256_of_path(path)
    except OSError as error:
        raise errors.BadRequestError(f"cannot read {path}: {error.strerror}") from error
    pinned.install(path, directory, name, digest)
    return Installed(digest, program_version(directory / name), "user")


def _write_record(directory: Path, record: Mapping[str, Installed]) -> None:
    staged = directory / f".{RECORD}.new"
    staged.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
    staged.chmod(0o644)
    pinned.publish(staged, directory / RECORD)


def _status(path: Path, recorded: Installed | None, pin: str) -> Status:
    name = path.name
    if not path.exists():
        return Status(name=name, path=str(path), present=False, problem=f"{name} is not installed")
    digest = pinned.sha256_of_path(path)
    ok = digest == pin or (recorded is not None and digest == recorded.sha256 and recorded.source == "user")
    source = "catalog" if digest == pin else recorded.source if recorded is not None else "unknown"
    found = Status(name=name, path=str(path), present=True, sha256=digest, source=source, sha256_ok=ok)
    if not ok:
        return msgspec.structs.replace(
            found, problem=f"{name} is neither the pinned file nor one you supplied"
        )
    try:
        version = program_version(path)
    except errors.BangerError as error:
        return msgspec.structs.replace(found, problem=str(error))
    too_old = parse_version(version) < MIN_VERSION
    problem = f"{name} {version} is older than {'.'.join(map(str, MIN_VERSION))}" if too_old else ""
    return msgspec.structs.replace(found, version=version, problem=problem)
