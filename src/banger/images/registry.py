# SPDX-License-Identifier: MIT
"""One repository of a registry, by the distribution protocol: documents and blobs, asked for until answered.

What may pass by itself (a broken line, 429, 5xx) is tried again after a wait that grows, or that the
registry names; whatever else it answers becomes an error that says what to do. Used by `pull`.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import email.utils
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Final

import httpx
import msgspec

from banger.contract import decoding, errors
from banger.images import authorization, connections, credentials, manifest, reference

_PASSING: Final = frozenset({408, 429, 500, 502, 503, 504})
_RANGE: Final = re.compile(r"bytes (\d{1,20})-\d+/(?:\d+|\*)")
_MAX_ERROR_BYTES: Final = 64 << 10
_MAX_SAID: Final = 200


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or index as it came, already checked against its digest when that was asked for."""

    data: bytes
    media_type: str
    digest: reference.Digest


@dataclass(frozen=True, slots=True)
class Body:
    """A blob from `offset` on: 0 when the registry does not know ranges."""

    offset: int
    chunks: AsyncIterator[bytes]


class _Said(msgspec.Struct, frozen=True):
    code: str = ""
    message: str = ""


class _Errors(msgspec.Struct, frozen=True):
    errors: tuple[_Said, ...] = ()


class _NoSuchRangeError(errors.ProtocolError):
    """Mostly of a proxy that knows no ranges."""


class Registry:
    """Reads the repository of one reference."""

    def __init__(
        self,
        wanted: reference.Reference,
        wire: connections.Connections,
        logins: credentials.Store,
        *,
        say: Callable[[str], None],
    ) -> None:
        self._wanted = wanted
        self._wire = wire
        self._logins = logins
        self._say = say
        self._authorization: credentials.Secret | None = None
        self._login: authorization.LookedUp = None
        self._authorizing = asyncio.Lock()
        self._base = ""

    async def digest(self) -> reference.Digest:
        """Of what the reference means now, asking for nothing but that where the registry can say it."""
        if self._wanted.digest:
            return self._wanted.digest
        path = f"manifests/{self._wanted.wanted}"
        async with self._asked("HEAD", path, {"Accept": manifest.ACCEPT}) as response:
            said = response.headers.get("docker-content-digest", "")
        with contextlib.suppress(errors.BadRequestError):
            return reference.parse_digest(said)
        return (await self.document(self._wanted.wanted)).digest

    async def document(self, wanted: str) -> Document:
        """A manifest or index by tag or digest. Raises ProtocolError when it is not what the digest says."""
        accept = {"Accept": manifest.ACCEPT}
        data, media_type = await self._whole(
            f"manifests/{wanted}", accept, manifest.MAX_DOCUMENT_BYTES, "the manifest"
        )
        pinned = reference.parse_digest(wanted) if ":" in wanted else None
        found = reference.digest_of(data, pinned)
        if pinned is not None and found != pinned:
            raise errors.ProtocolError(
                f"{self._wanted.host} gave another manifest than the one with digest {pinned}"
            )
        return Document(data, media_type, found)

    async def small_blob(self, wanted: manifest.Descriptor) -> bytes:
        """A configuration, verified."""
        if wanted.size > manifest.MAX_DOCUMENT_BYTES:
            raise errors.BadRequestError("the image's configuration is larger than 4 MiB")
        data, _ = await self._whole(f"blobs/{wanted.id}", {}, wanted.size, "the configuration")
        if reference.digest_of(data, wanted.id) != wanted.id:
            raise errors.ProtocolError(
                f"{self._wanted.host} gave another configuration than the manifest names"
            )
        return data

    @contextlib.asynccontextmanager
    async def blob(self, digest: reference.Digest, offset: int) -> AsyncIterator[Body]:
        """The blob's bytes as they come, from an offset on where the registry can do that."""
        path, ranged = f"blobs/{digest}", {"Range": f"bytes={offset}-"} if offset else {}
        async with contextlib.AsyncExitStack() as stack:
            try:
                response = await stack.enter_async_context(self._asked("GET", path, ranged))
            except _NoSuchRangeError:
                if not offset:
                    raise
                response = await stack.enter_async_context(self._asked("GET", path, {}))
            begins = 0
            if response.status_code == 206:
                found = _RANGE.fullmatch(response.headers.get("content-range", ""))
                if found is None or int(found[1]) != offset:
                    raise errors.ProtocolError(f"{self._wanted.host} gave another range than was asked for")
                begins = offset
            yield Body(begins, response.aiter_raw())

    async def _whole(
        self, path: str, headers: Mapping[str, str], limit: int, what: str
    ) -> tuple[bytes, str]:
        """Something small and its media type. What breaks off is asked for again."""
        attempt = 0
        while True:
            answered = False
            try:
                async with self._asked("GET", path, headers) as response:
                    answered = True
                    data = await authorization.read(response, limit, what)
                    return data, response.headers.get("content-type", "")
            except (errors.UnavailableError, errors.DeadlineError) as error:
                if not answered:  # that has been tried often enough
                    raise
                attempt += 1
                await self._wait(attempt, error, None)

    @contextlib.asynccontextmanager
    async def _asked(
        self, method: str, path: str, headers: Mapping[str, str]
    ) -> AsyncIterator[httpx.Response]:
        """An answer that says yes. Only the asking is repeated, not what is done with the answer."""
        async with contextlib.AsyncExitStack() as stack:
            attempt, authorized = 0, False
            while True:
                try:
                    response = await self._open(stack, method, path, headers)
                    if response.status_code == 401:
                        await self._require_own(response)
                    if response.status_code == 401 and not authorized:
                        await self._authorize(response)
                        authorized = True
                        await stack.aclose()
                        continue
                    if response.status_code not in _PASSING:
                        break
                    failure = await self._failure(response)
                    wait_s = _retry_after(response)
                except (errors.UnavailableError, errors.DeadlineError) as error:
                    failure, wait_s = error, None
                await stack.aclose()
                attempt += 1
                await self._wait(attempt, failure, wait_s)
            if response.status_code >= 400:
                raise await self._failure(response)
            if response.status_code not in (200, 206):
                raise errors.ProtocolError(f"{self._wanted.host} answered {response.status_code}")
            yield response

    async def _open(
        self, stack: contextlib.AsyncExitStack, method: str, path: str, headers: Mapping[str, str]
    ) -> httpx.Response:
        base = await self._address()
        sent = dict(headers)
        if self._authorization is not None:
            sent["Authorization"] = self._authorization.reveal()
        url = f"{base}/v2/{self._wanted.path}/{path}"
        return await stack.enter_async_context(self._wire.request(method, url, sent))

    async def _address(self) -> str:
        """TLS, but where plain http is allowed that is looked for first."""
        host = self._wanted.api_host
        if not self._base:
            plain = self._wire.may_be_plain(host) and await self._speaks_plain(host)
            self._base = f"http://{host}" if plain else f"https://{host}"
        return self._base

    async def _speaks_plain(self, host: str) -> bool:
        tls = httpx.URL(f"https://{host}")
        try:
            async with self._wire.request("GET", f"http://{host}/v2/", {}) as response:
                if connections.origin(response.request.url) == connections.origin(tls):
                    return False  # a web server leads there, and no login would come along
                return response.status_code != 400  # what a TLS port says to plain http
        except (errors.UnavailableError, errors.DeadlineError) as error:
            has_other_port = tls.port is None
            if has_other_port or isinstance(error.__cause__, httpx.RemoteProtocolError | httpx.ReadError):
                return False
            raise

    async def _require_own(self, response: httpx.Response) -> None:
        """Where a registry redirects to may ask for a login too. It is the registry's, and stays there."""
        asking = response.request.url
        if connections.origin(asking) != connections.origin(httpx.URL(await self._address())):
            raise errors.ProtocolError(
                f"{self._wanted.host} redirects to {connections.host_of(asking)}, which asks for a login"
            )

    async def _authorize(self, response: httpx.Response) -> None:
        """Once for all requests that are refused together. Raises UnauthorizedError when there is no way."""
        used = response.request.headers.get("authorization", "")
        async with self._authorizing:
            if self._authorization is not None and self._authorization.reveal() != used:
                return  # another request got it meanwhile
            header = ", ".join(response.headers.get_list("www-authenticate"))
            asked = authorization.challenges(header)
            self._authorization, self._login = await authorization.satisfy(
                self._wanted, asked, self._wire, self._logins
            )
            if self._authorization is None or self._authorization.reveal() == used:
                raise authorization.refused(self._wanted, self._login)
            if isinstance(self._login, errors.BangerError):
                self._say(f"{self._login.message}; asking without a login")

    async def _wait(self, attempt: int, failure: errors.BangerError, wait_s: float | None) -> None:
        limits = self._wire.limits
        if attempt >= limits.attempts:
            raise failure
        if wait_s is None:
            wait_s = min(limits.first_wait_s * 2 ** (attempt - 1), limits.longest_wait_s)
        elif wait_s > limits.longest_wait_s:
            failure.hint = f"it asks to come back in {wait_s:.0f} s"
            raise failure
        self._say(f"{failure.message}; trying again in {wait_s:.1f} s")
        await asyncio.sleep(wait_s)

    async def _failure(self, response: httpx.Response) -> errors.BangerError:
        wanted, status = self._wanted, response.status_code
        said = await _said(response)
        if status == 401:
            return authorization.refused(wanted, self._login)
        if status == 403:
            return errors.UnauthorizedError(
                f"{wanted.host} forbids reading {wanted.path}{said}",
                hint=f"log in as somebody who may: `podman login {wanted.host}` as the owner of bangerd",
            )
        if status == 404:
            hint = "check the spelling; a registry may also hide what needs a login like this"
            return errors.NotFoundError(f"{wanted.host} has no {wanted.familiar}{said}", hint=hint)
        if status == 429:
            hint = "wait, or log in: registries let known users pull more"
            return errors.UnavailableError(
                f"{wanted.host} says we pull too often{said}", hint=hint, status=str(status)
            )
        if status == 416:
            return _NoSuchRangeError(f"{wanted.host} does not have that many bytes of a blob")
        if status >= 500 or status == 408:
            hint = "it is the registry's own trouble; try again later"
            return errors.UnavailableError(
                f"{wanted.host} answered {status}{said}", hint=hint, status=str(status)
            )
        return errors.ProtocolError(f"{wanted.host} answered {status}{said}")


async def _said(response: httpx.Response) -> str:
    """The registry's own words, if it has any."""
    with contextlib.suppress(errors.BangerError, msgspec.DecodeError, UnicodeDecodeError, httpx.HTTPError):
        data = await authorization.read(response, _MAX_ERROR_BYTES, "the error")
        found = decoding.json(data, _Errors).errors
        if found and (text := found[0].message or found[0].code):
            printable = "".join(each if each.isprintable() else "?" for each in text[:_MAX_SAID])
            return f": {printable}"
    return ""


def _retry_after(response: httpx.Response) -> float | None:
    text = response.headers.get("retry-after", "")
    if text.isascii() and text.isdigit():
        return float(text)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        moment = email.utils.parsedate_to_datetime(text)
        return max(0.0, (moment - datetime.datetime.now(datetime.UTC)).total_seconds())
    return None
