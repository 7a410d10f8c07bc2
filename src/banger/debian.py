# SPDX-License-Identifier: MIT
"""The distribution's signed archive: which of the host's package sources serve a suite, and files from them.

apt verifies everything against the archive's own keyring, whatever the host trusts besides. Works as any
user, in a directory of its own, and leaves the host's apt state alone. Used by `images` and `kernels`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from banger import run
from banger.contract import errors

KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
APT_ENVIRONMENT: Final = ("*_proxy", "*_PROXY", "SSL_CERT_*", "HOME", "TMPDIR")
_TARGETS_FORMAT: Final = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
_ORIGIN_FORMAT: Final = "$(REPO_URI)|$(RELEASE)|$(ORIGIN)"
_ORIGIN: Final = "Debian"
_RELEASE_FORMAT: Final = "$(RELEASE)|$(CODENAME)|$(SUITE)|$(REPO_URI)"
_UPDATE_DEADLINE_S: Final = 300.0
_DOWNLOAD_DEADLINE_S: Final = 600.0
_QUERY_DEADLINE_S: Final = 60.0
_UNVERIFIED: Final = (
    *("Acquire::AllowInsecureRepositories", "Acquire::AllowDowngradeToInsecureRepositories"),
    *("Acquire::AllowWeakRepositories", "APT::Get::AllowUnauthenticated"),
)
"""What a host's own apt.conf may allow; whoever is between it and a mirror would then choose the kernel."""
_UNREACHED: Final = re.compile(r"^[EW]: ?(.*(?:resolv|connect|timed out).*)", re.IGNORECASE | re.MULTILINE)
_LOGIN: Final = re.compile(r"[!-~]+")
"""A blank would begin another word of the file."""
_FIELD = re.compile(r"^(Version|Depends|Size): (.*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True, slots=True)
class Package:
    """A package file that apt fetched and verified."""

    name: str
    version: str
    path: Path


@dataclasses.dataclass(frozen=True, slots=True)
class Listed:
    """A package as the signed index lists it."""

    name: str
    version: str
    size_bytes: int


def sources(suite: str, *, mirror: str = "") -> list[str]:
    """One-line sources for a suite and its updates: of the mirror if one is named, or the host's.

    Of a suite that the host has no sources for, those of the same servers. An address may hold a password:
    who gives the entries to a program, or writes them, asks `without_logins` first.
    """
    if not KEYRING.exists():
        raise errors.MissingToolError(
            f"the keyring {KEYRING} is not here", hint="install the package debian-archive-keyring"
        )
    if mirror:
        return [_entry(mirror, release) for release in (suite, f"{suite}-updates")]
    wanted = (suite, f"{suite}-updates", f"{suite}-security")
    rows = _of_distribution(_targets("--no-release-info", "--format", _TARGETS_FORMAT))
    entries = {
        _entry(uri, release) for uri, release, component in rows if release in wanted and component == "main"
    }
    return sorted(entries) or sorted({_entry(*each) for each in _elsewhere(rows, wanted)})


def without_logins(entries: Sequence[str], file: Path) -> list[str]:
    """The entries as everybody may see them; the logins that were in them are in `file`, which others cannot
    read.

    It is as apt_auth.conf(5) says, and is not made where there are none. Raises BadRequestError for a login
    that has no place in it.
    """
    found = [_apart(entry) for entry in entries]
    logins = dict.fromkeys(login for _, login in found if login)
    if logins:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            out.writelines(logins)
    return [entry for entry, _ in found]


def _apart(entry: str) -> tuple[str, str]:
    """An entry without a login, and a line with it; empty when there is none."""
    before, uri, release, component = entry.rsplit(" ", 3)
    scheme, _, rest = uri.partition("://")
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    if not at:
        return entry, ""
    public = f"{scheme}://{host}{slash}{path}"
    name, _, password = user.partition(":")
    words = ["login", urllib.parse.unquote(name)]
    if password:
        words += ["password", urllib.parse.unquote(password)]
    if not all(map(_LOGIN.fullmatch, words)):
        raise errors.BadRequestError(
            f"the login of the package source {public} is none that apt_auth.conf(5) can hold",
            hint="it takes a name, and neither there nor in the password a blank or what is not ASCII",
        )
    return f"{before} {public} {release} {component}", f"machine {public} {' '.join(words)}\n"


def _targets(*how: str) -> list[list[str]]:
    said = run.run(
        ["apt-get", "indextargets", *how, "Created-By: Packages"],
        deadline_s=_QUERY_DEADLINE_S,
        env=run.environment(*APT_ENVIRONMENT),
    ).text
    return [line.split("|") for line in said.splitlines() if line.count("|") == 2]


def _of_distribution(rows: list[list[str]]) -> list[list[str]]:
    """Without those of others, whose releases and components may have the same names.

    Where the host has fetched lists, apt knows whose each is. Of the others all may be the distribution's.
    """
    origins = {
        (uri, release): origin for uri, release, origin in _targets("--format", _ORIGIN_FORMAT) if origin
    }
    own = {release for (_, release), origin in origins.items() if origin == _ORIGIN}

    def is_own(uri: str, release: str) -> bool:
        origin = origins.get((uri, release))
        return origin == _ORIGIN or (origin is None and release not in own)

    return [row for row in rows if is_own(row[0], row[1])]


def _elsewhere(rows: list[list[str]], wanted: tuple[str, str, str]) -> Iterator[tuple[str, str]]:
    """Where the host's own release comes from, the others come from too; apt says so when they do not."""
    suite, updates, security = wanted
    for uri, release, component in rows:
        if component == "main" and release.endswith("-security"):
            yield uri, security
        elif component == "main":
            yield uri, suite
            yield uri, updates


def _entry(uri: str, release: str) -> str:
    return f"deb [signed-by={KEYRING}] {uri} {release} main"


class Apt:
    """apt for one suite in a directory of its own."""

    def __init__(self, directory: Path, entries: Sequence[str], arch: str) -> None:
        if not entries:
            raise errors.UnavailableError(
                "none of the host's package sources serves this suite",
                hint="add one to the host's apt sources",
            )
        self._directory = directory
        for name in ("lists/partial", "cache/archives/partial", "downloads"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        (directory / "status").touch()
        logins = directory / "auth.conf"
        public = without_logins(entries, logins)
        (directory / "sources.list").write_text("".join(f"{entry}\n" for entry in public))
        self._options = [
            *("-o", f"APT::Architecture={ARCHITECTURES[arch]}"),
            *("-o", f"APT::Architectures={ARCHITECTURES[arch]}"),
            *("-o", f"Dir::State::Lists={directory / 'lists'}"),
            *("-o", f"Dir::State::status={directory / 'status'}"),
            *("-o", f"Dir::Cache={directory / 'cache'}"),
            *("-o", f"Dir::Etc::SourceList={directory / 'sources.list'}"),
            *("-o", "Dir::Etc::SourceParts=/dev/null"),
            *(("-o", f"Dir::Etc::netrc={logins}") if logins.exists() else ()),
            *("-o", "Acquire::Languages=none"),
            *("-o", "APT::Sandbox::User=root"),
            *(word for each in _UNVERIFIED for word in ("-o", f"{each}=false")),
        ]

    def update(self) -> None:
        """Raises UnavailableError when a server gives another suite: an older one is signed as well."""
        try:
            self._apt("apt-get", "update", "-qq", "--error-on=any", deadline_s=_UPDATE_DEADLINE_S)
        except errors.OperationFailedError as error:
            raise _unreached(error) or error from None
        asked = ("indextargets", "--format", _RELEASE_FORMAT, "Created-By: Packages")
        for line in self._apt("apt-get", *asked, deadline_s=_QUERY_DEADLINE_S).text.splitlines():
            release, codename, suite, uri = line.split("|", 3)
            if release not in (codename, suite):
                raise errors.UnavailableError(
                    f"{uri} gives {codename}, and not {release}",
                    hint="use another mirror, or the host's own package sources",
                )

    def depends(self, package: str) -> list[str]:
        """The names that the newest version of a package depends on, first alternatives only."""
        shown = dict(_FIELD.findall(self._show(package)))
        parts = shown.get("Depends", "").split(",")
        return [re.split(r"[ |(:]", part.strip())[0] for part in parts if part.strip()]

    def listed(self, package: str) -> Listed:
        """What the signed index says of the newest version of a package."""
        shown = dict(_FIELD.findall(self._show(package)))
        try:
            return Listed(package, shown["Version"], int(shown["Size"]))
        except (KeyError, ValueError):
            raise errors.NotFoundError(f"the archive's index has no whole entry for {package!r}") from None

    def download(self, package: str) -> Package:
        """Fetches a package file; apt refuses it unless the signed index names its hash."""
        listed = self.listed(package)
        downloads = self._directory / "downloads"
        self._apt("apt-get", "download", "-qq", package, deadline_s=_DOWNLOAD_DEADLINE_S, cwd=downloads)
        found = sorted(downloads.glob(f"{package}_*.deb"))
        if not found:
            raise errors.OperationFailedError(f"apt left no file of package {package!r}")
        return Package(package, listed.version, found[-1])

    def _show(self, package: str) -> str:
        result = self._apt("apt-cache", "show", "--no-all-versions", package, deadline_s=_QUERY_DEADLINE_S)
        return result.text

    def _apt(self, program: str, *arguments: str, deadline_s: float, cwd: Path | None = None) -> run.Result:
        return run.run(
            [program, *self._options, *arguments],
            deadline_s=deadline_s,
            env=run.environment(*APT_ENVIRONMENT, TMPDIR=str(self._directory)),
            cwd=cwd,
        )


def _unreached(error: errors.OperationFailedError) -> errors.UnavailableError | None:
    """By the line of apt's that names the server and why; its last only says that some files failed.

    None for what a server said or gave, such as an index that nobody signed.
    """
    line = _UNREACHED.search(error.fields.get("stderr", ""))
    if line is None:
        return None
    return errors.UnavailableError(
        f"the archive's index was not fetched: {' '.join(line[1].split())}",
        hint="check the network, and whether bangerd needs a proxy, as docs/images.md says",
        **error.fields,
    )
