# SPDX-License-Identifier: MIT
"""What a registry asks for before it answers, and how it is satisfied: anonymous and bearer tokens, Basic.

A login is looked up only when it is asked for, and only handed to the registry that asked, or to the token
service that it names. Used by `registry` alone.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import httpx
import msgspec

from banger import run
from banger.contract import decoding, errors
from banger.images import connections, credentials, reference

_CLIENT_ID: Final = "banger"
_TOKEN: Final = re.compile(r"[!-~]+")
_MAX_TOKEN_BYTES: Final = 1 << 20
_SCHEME: Final = re.compile(
    r"\s*([A-Za-z0-9!#$%&'*+.^_`|~-]+)(?=[\s,]|$)(?:\s+[A-Za-z0-9._~+/-]+=*\s*(?=,|$))?\s*"
)
"""With what some have instead of parameters, such as Negotiate."""
_PARAMETER: Final = re.compile(
    r"\s*([A-Za-z0-9!#$%&'*+.^_`|~-]+)\s*=\s*(?:\"((?:[^\"\\]|\\.)*)\"|([^\s,\"]*))\s*(?:,|$)"
)


LookedUp = credentials.Login | errors.BangerError | None
"""A login, none, or why it could not be known."""


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way in, of a WWW-Authenticate header; names in lower case."""

    scheme: str
    parameters: Mapping[str, str]


class _Token(msgspec.Struct, frozen=True):
    token: str = ""
    access_token: str = ""

    def __repr__(self) -> str:
        return "_Token(…)"


def challenges(header: str) -> list[Challenge]:
    """Every challenge of a header, of which there may be several in one line; nonsense gives none."""
    found: list[Challenge] = []
    position = 0
    while scheme := _SCHEME.match(header, position):
        position = scheme.end()
        parameters: dict[str, str] = {}
        while parameter := _PARAMETER.match(header, position):
            quoted = parameter[2]
            value = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else parameter[3]
            parameters.setdefault(parameter[1].lower(), value)
            position = parameter.end()
        found.append(Challenge(scheme[1].lower(), parameters))
        position += len(header[position:]) - len(header[position:].lstrip(" ,\t"))
    return found


async def satisfy(
    wanted: reference.Reference,
    asked: list[Challenge],
    wire: connections.Connections,
    logins: credentials.Store,
) -> tuple[credentials.Secret | None, LookedUp]:
    """The header that the registry wants, None when we have none; and what came of looking up a login."""
    found = await _look_up(wanted, logins)
    login = found if isinstance(found, credentials.Login) else None
    bearer = next((each for each in asked if each.scheme == "bearer"), None)
    if bearer is not None:
        token = await _token(wanted, bearer.parameters, wire, found)
        return credentials.Secret(f"Bearer {token}"), found
    if any(each.scheme == "basic" for each in asked) and login is not None and not login.is_token:
        return credentials.Secret(login.basic()), found
    return None, found


async def _look_up(wanted: reference.Reference, logins: credentials.Store) -> LookedUp:
    """Why there is none is an error only where it takes one: most images are for everybody."""
    try:
        return await run.in_thread(logins.find, wanted)
    except errors.CancelledError:
        raise
    except errors.BangerError as error:
        return error


async def _token(
    wanted: reference.Reference,
    parameters: Mapping[str, str],
    wire: connections.Connections,
    found: LookedUp,
) -> str:
    login = found if isinstance(found, credentials.Login) else None
    realm = _realm(wanted, parameters.get("realm", ""), wire)
    scope = f"repository:{wanted.path}:pull"
    query = {"service": parameters["service"]} if parameters.get("service") else {}
    if login is not None and login.is_token:
        form = {"grant_type": "refresh_token", "refresh_token": login.secret.reveal(), "scope": scope}
        form |= {**query, "client_id": _CLIENT_ID}
        async with wire.request("POST", realm, {}, form=form) as response:
            return await _token_of(wanted, response, found)
    headers = {"Authorization": login.basic()} if login is not None else {}
    joint = "&" if urllib.parse.urlsplit(realm).query else "?"
    url = f"{realm}{joint}{urllib.parse.urlencode({**query, 'scope': scope})}"
    async with wire.request("GET", url, headers) as response:
        return await _token_of(wanted, response, found)


def _realm(wanted: reference.Reference, text: str, wire: connections.Connections) -> str:
    """A token service sees the login: it is spoken to in the open only where the registry may be."""
    try:
        url = connections.address(text)
    except ValueError:
        url = httpx.URL("")
    host = connections.host_of(url)
    plain = url.scheme == "http" and wire.may_be_plain(host) and wire.may_be_plain(wanted.host)
    hidden = reference.is_loopback(host) and not wanted.is_loopback
    if not url.host or url.userinfo or hidden or not (url.scheme == "https" or plain):
        raise errors.ProtocolError(
            f"{wanted.host} sends us for a token to {url.scheme}://{host}, which is not fit to see a login"
        )
    return text


async def _token_of(wanted: reference.Reference, response: httpx.Response, found: LookedUp) -> str:
    status = response.status_code
    if status in (400, 401, 403):
        raise refused(wanted, found)
    if status == 429 or status >= 500:
        raise errors.UnavailableError(f"the token service of {wanted.host} answered {status}")
    if status != 200:
        raise errors.ProtocolError(f"the token service of {wanted.host} answered {status}")
    data = await read(response, _MAX_TOKEN_BYTES, "the token")
    try:
        said = decoding.json(data, _Token)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise errors.ProtocolError(f"the token service of {wanted.host} gave no token") from None
    token = said.token or said.access_token
    if not _TOKEN.fullmatch(token):  # what is sent in a header as it is, an error would quote
        raise errors.ProtocolError(f"the token service of {wanted.host} gave no token")
    return token


def refused(wanted: reference.Reference, found: LookedUp) -> errors.BangerError:
    """Registries answer the same for what is not there and for what one may not see."""
    if isinstance(found, errors.BangerError):
        return found
    if found is not None:
        return errors.UnauthorizedError(
            f"{wanted.host} does not let this login read {wanted.path}: the one of {found.origin}",
            hint=f"log in again as the owner of bangerd: `podman login {wanted.host}`; or it is not there",
        )
    return errors.UnauthorizedError(
        f"{wanted.host} wants a login for {wanted.path}, or there is no such repository",
        hint=f"check the name; log in as the owner of bangerd: `podman login {wanted.host}`",
    )


async def read(response: httpx.Response, limit: int, what: str) -> bytes:
    """A small body, whole; one that is longer is not read on."""
    data = bytearray()
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) > limit:
            raise errors.ProtocolError(f"{what} from {response.url.host} is larger than {limit} bytes")
    return bytes(data)
