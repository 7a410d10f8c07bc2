# SPDX-License-Identifier: MIT
"""Image references, by the distribution grammar: `[host[:port]/]path[:tag][@digest]`, and content digests.

A reference is parsed once and written in one canonical form; `familiar` is what people type.
"""

from __future__ import annotations

import dataclasses
import hashlib
import ipaddress
import re
from typing import Final, NewType

from banger.contract import errors

Digest = NewType("Digest", str)
"""`algorithm:hex`, checked."""

DEFAULT_HOST: Final = "docker.io"
DEFAULT_TAG: Final = "latest"
_HUB_ALIASES: Final = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_LIBRARY: Final = "library/"
_MAX_NAME: Final = 255
_MAX_TEXT: Final = _MAX_NAME + 1 + 128 + 1 + 7 + 1 + 128
_ALGORITHMS: Final = {"sha256": 64, "sha512": 128}

_LABEL: Final = r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)"
_HOST: Final = re.compile(
    rf"(?P<name>{_LABEL}(?:\.{_LABEL})*|\[(?P<v6>[0-9a-fA-F:.]+)\])(?::(?P<port>[0-9]{{1,5}}))?"
)
_PATH: Final = re.compile(
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
)
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST: Final = re.compile(r"([a-z0-9]+):([0-9a-f]+)")
_HINT: Final = "such as debian:bookworm, or registry.example.org:5000/team/app:1.0@sha256:…"


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """`host` as people write it: `docker.io`, not the address that serves it. With tag, digest or both."""

    host: str
    path: str
    tag: str = ""
    digest: Digest | None = None

    def __str__(self) -> str:
        return f"{self.host}/{self.path}{self._suffix()}"

    @property
    def familiar(self) -> str:
        """Without what the defaults would add: `debian:bookworm`; the tag is always said."""
        short = self.path.removeprefix(_LIBRARY)
        if "/" in short:
            short = self.path
        if self.host != DEFAULT_HOST or _split(short)[0] != DEFAULT_HOST:
            return str(self)
        return f"{short}{self._suffix()}"

    @property
    def repository(self) -> str:
        return f"{self.host}/{self.path}"

    @property
    def wanted(self) -> str:
        """What to ask the registry for: the digest pins, the tag is then a remark."""
        return self.digest or self.tag

    @property
    def api_host(self) -> str:
        """Where the registry's API answers."""
        return "registry-1.docker.io" if self.host == DEFAULT_HOST else self.host

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)

    def _suffix(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{tag}@{self.digest}" if self.digest else tag


def parse(text: str) -> Reference:
    """Raises BadRequestError that says which part is wrong."""
    if len(text) > _MAX_TEXT or not text.isascii():
        raise _refused(text[:80], "it is too long, or not plain ASCII")
    name, at, digest_text = text.partition("@")
    digest = _digest_of(text, digest_text) if at else None
    head, colon, tail = name.rpartition(":")
    tag = ""
    if colon and "/" not in tail and head:
        name, tag = head, tail
        if not _TAG.fullmatch(tag):
            raise _refused(text, f"{tag!r} is not a tag")
    host, path = _split(name)
    _check_host(text, host)
    if not _PATH.fullmatch(path):
        lower = path.lower()
        why = "a repository's name is in lower case" if lower != path else f"{path!r} is not a name"
        raise _refused(text, why)
    if host in _HUB_ALIASES:
        host = DEFAULT_HOST
        path = path if "/" in path else f"{_LIBRARY}{path}"
    if len(host) + 1 + len(path) > _MAX_NAME:
        raise _refused(text, f"its name is longer than {_MAX_NAME} characters")
    return Reference(host, path, tag or ("" if digest else DEFAULT_TAG), digest)


def is_explicit(text: str) -> bool:
    """Whether it can only mean an image of a registry: a bare word may be anything's name."""
    return any(mark in text for mark in "/:@")


def parse_digest(text: str) -> Digest:
    """Raises BadRequestError unless it is a SHA-256 or SHA-512 in lower-case hex."""
    found = _DIGEST.fullmatch(text)
    if found is None or _ALGORITHMS.get(found[1]) != len(found[2]):
        raise errors.BadRequestError(f"{text[:160]!r} is not a digest", hint="such as sha256: and 64 digits")
    return Digest(text)


def hasher(digest: Digest) -> hashlib._Hash:
    return hashlib.new(digest.partition(":")[0])


def digest_of(data: bytes, like: Digest | None = None) -> Digest:
    """The digest of some bytes, by SHA-256 or as another digest is made."""
    algorithm = like.partition(":")[0] if like else "sha256"
    return Digest(f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}")


def is_loopback(host: str) -> bool:
    """`host` may carry a port."""
    found = _HOST.fullmatch(host)
    if found is None:
        return False
    if found["name"].lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(found["v6"] or found["name"]).is_loopback
    except ValueError:
        return False


def parse_host(text: str) -> str:
    """A registry as configuration names it: `host[:port]`. Raises BadRequestError."""
    _check_host(text, text)
    return text


def _split(name: str) -> tuple[str, str]:
    """The first part is a host when it looks like one; a plain word is a name on the default host."""
    first, slash, rest = name.partition("/")
    looks = "." in first or ":" in first or first == "localhost" or first != first.lower()
    return (first, rest) if slash and looks else (DEFAULT_HOST, name)


def _check_host(text: str, host: str) -> None:
    found = _HOST.fullmatch(host)
    if found is None:
        raise _refused(text, f"{host!r} is not a host")
    if found["port"] is not None and not 0 < int(found["port"]) < 1 << 16:
        raise _refused(text, f"{found['port']} is not a port")
    if found["v6"] is not None:
        try:
            ipaddress.IPv6Address(found["v6"])
        except ValueError:
            raise _refused(text, f"{host!r} is not an IPv6 address in brackets") from None


def _digest_of(text: str, digest: str) -> Digest:
    try:
        return parse_digest(digest)
    except errors.BadRequestError:
        raise _refused(text, f"{digest[:80]!r} is not a digest") from None


def _refused(text: str, why: str) -> errors.BadRequestError:
    return errors.BadRequestError(f"{text!r} is not an image reference: {why}", hint=_HINT)
