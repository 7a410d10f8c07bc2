# SPDX-License-Identifier: MIT
"""The owner's own logins to registries: docker's and podman's files, and credential helpers.

The daemon reads them itself, when a registry asks for a login, and only the one login it needs: so no secret
crosses the API. A secret lives in a `Secret`, which does not show itself, and goes into a request header.
"""

from __future__ import annotations

import base64
import binascii
import os
import pwd
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from banger import run
from banger.contract import decoding, errors
from banger.images import reference

_HUB_KEY: Final = "https://index.docker.io/v1/"
_HELPER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HELPER_S: Final = 30.0
_HELPER_ENVIRONMENT: Final = ("HOME", "XDG_*", "DBUS_SESSION_BUS_ADDRESS", "GNUPGHOME", "PASSWORD_STORE_*")
_MAX_FILE_BYTES: Final = 1 << 20
_NOTHING: Final = ("credentials not found", "no credentials")


class Secret:
    """A text that is not shown: not by repr, str, format, pickle or an error."""

    __slots__ = ("__text",)

    def __init__(self, text: str) -> None:
        self.__text = text

    def reveal(self) -> str:
        """For the one header that carries it."""
        return self.__text

    def __repr__(self) -> str:
        return "Secret(…)"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __reduce__(self) -> str:
        raise TypeError("a secret is not to be written anywhere")

    def __bool__(self) -> bool:
        return bool(self.__text)


@dataclass(frozen=True, slots=True)
class Login:
    """`is_token`: the secret is an identity token, not a password. `origin` says where it came from."""

    user: str
    secret: Secret
    origin: str
    is_token: bool = False

    def basic(self) -> str:
        pair = f"{self.user}:{self.secret.reveal()}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"


class _Auth(msgspec.Struct, frozen=True):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""

    def __repr__(self) -> str:
        return "_Auth(…)"


class _File(
    msgspec.Struct, frozen=True, rename={"creds_store": "credsStore", "cred_helpers": "credHelpers"}
):
    auths: dict[str, _Auth] = {}
    creds_store: str = ""
    cred_helpers: dict[str, str] = {}


class _Answer(msgspec.Struct, frozen=True, rename={"user": "Username", "secret": "Secret"}):
    user: str = ""
    secret: str = ""

    def __repr__(self) -> str:
        return "_Answer(…)"


class Store:
    """Looks a login up in the files where docker and podman keep theirs, the more particular key first."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = tuple(files)

    def find(self, wanted: reference.Reference) -> Login | None:
        """Blocking: reads files, may run a credential helper. None when there is no login."""
        for path in self._files:
            known = _read(path)
            if known is None:
                continue
            found = _in_file(known, wanted, path)
            if found is not None:
                return found
        return None


def default_files(environment: Mapping[str, str], home: Path, uid: int) -> tuple[Path, ...]:
    """In the order of podman and docker: an explicit file, the session's, the user's, docker's."""
    session = Path(environment.get("XDG_RUNTIME_DIR") or f"/run/user/{uid}")
    config = Path(environment.get("XDG_CONFIG_HOME") or home / ".config")
    docker = Path(environment.get("DOCKER_CONFIG") or home / ".docker")
    explicit = environment.get("REGISTRY_AUTH_FILE")
    return (
        *((Path(explicit),) if explicit else ()),
        session / "containers/auth.json",
        config / "containers/auth.json",
        docker / "config.json",
    )


def own_files() -> tuple[Path, ...]:
    """Those of whoever runs this process."""
    home = Path(os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir)
    return default_files(os.environ, home, os.getuid())


def _read(path: Path) -> _File | None:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        hint = "registry logins are read from there as the daemon's owner"
        raise errors.UnauthorizedError(f"cannot read {path}: {error.strerror}", hint=hint) from error
    if len(data) > _MAX_FILE_BYTES:
        raise errors.BadRequestError(f"{path} is larger than 1 MiB")
    try:
        return decoding.json(data, _File)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # The decoder's own words may quote what is in the file.
        hint = "log in again with docker or podman, or repair the file"
        raise errors.BadRequestError(f"{path} is not a file of registry logins", hint=hint) from None


def _in_file(known: _File, wanted: reference.Reference, path: Path) -> Login | None:
    keys = _keys(wanted)
    for key in keys:
        helper = known.cred_helpers.get(key)
        if helper:
            return _ask(helper, key)
    if known.creds_store:
        found = _ask(known.creds_store, keys[-1])
        if found is not None:
            return found
    normal = {_normal(key): auth for key, auth in known.auths.items()}
    for key in keys:
        auth = known.auths.get(key) or normal.get(_normal(key))
        if auth is not None and (login := _login(auth, path)) is not None:
            return login
    return None


def _keys(wanted: reference.Reference) -> list[str]:
    """podman's keys may name a repository or a part of its path; docker's only the host, and for the Hub
    an address of old.
    """
    parts = wanted.path.split("/")
    keys = ["/".join((wanted.host, *parts[:count])) for count in range(len(parts), 0, -1)]
    return [*keys, wanted.host, *((_HUB_KEY,) if wanted.host == reference.DEFAULT_HOST else ())]


def _normal(key: str) -> str:
    """Docker's older keys are addresses."""
    return (
        key.removeprefix("https://")
        .removeprefix("http://")
        .removesuffix("/v1/")
        .removesuffix("/v2/")
        .rstrip("/")
    )


def _login(auth: _Auth, path: Path) -> Login | None:
    user, secret = auth.username, auth.password
    if auth.auth:
        try:
            user, _, secret = base64.b64decode(auth.auth, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            raise errors.BadRequestError(
                f"a login in {path} cannot be read", hint="log in again with docker or podman"
            ) from None
    if auth.identitytoken:
        return Login(user, Secret(auth.identitytoken), str(path), is_token=True)
    return Login(user, Secret(secret.strip("\0")), str(path)) if user or secret else None


def _ask(helper: str, key: str) -> Login | None:
    """`docker-credential-<helper> get`, the registry on its stdin, the login as JSON on its stdout."""
    if not _HELPER.fullmatch(helper):
        raise errors.BadRequestError(f"{helper!r} is not the name of a credential helper")
    program = f"docker-credential-{helper}"
    run.require(program, f"that has {program}, as the registry logins name it")
    result = run.run(
        [program, "get"],
        deadline_s=_HELPER_S,
        stdin=key.encode(),
        ok=range(256),
        env=run.environment(*_HELPER_ENVIRONMENT),
    )
    if result.status != 0:
        said = (result.stdout + result.stderr).decode(errors="replace").lower()
        if any(text in said for text in _NOTHING):
            return None
        raise errors.UnauthorizedError(
            f"{program} gave no login for {key}: it exited {result.status}",
            hint="it may need your session, which the daemon is not part of; a plain login of podman works",
        )
    try:
        found = decoding.json(result.stdout, _Answer)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise errors.UnauthorizedError(f"{program} gave an answer that is no login") from None
    if not found.secret:
        return None
    token = found.user == "<token>"
    return Login("" if token else found.user, Secret(found.secret), program, is_token=token)
