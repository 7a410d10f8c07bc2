# SPDX-License-Identifier: MIT
"""HTTP to registries: proxies, certificates, limits and redirects, each of them explicit.

Nothing is read from the environment behind our back: a proxy is chosen here, for each host, and named in
every error. A secret in a header never follows a redirect to another place. Used by `registry` alone.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import ipaddress
import re
import ssl
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import httpx

import banger
from banger import proxy_address
from banger.contract import errors
from banger.images import reference

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS: Final = 5
_NAME_HINT: Final = "check the name of the registry"
_KIND_HINT: Final = (
    "set HTTPS_PROXY and HTTP_PROXY to one, which come before ALL_PROXY; "
    "to a SOCKS proxy leads one such as privoxy on this host"
)
_PROXY_HINT: Final = "the proxy is bangerd's environment's: see `systemctl show bangerd -p Environment`"
_DIRECT_HINT: Final = (
    "check the name and the network; bangerd asks it without a proxy, whatever your shell has: "
    "`systemctl edit bangerd` gives it one, as docs/images.md says"
)


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to wait, and how often to try."""

    connect_s: float = 10.0
    silence_s: float = 30.0
    """Without a byte; a slow transfer may take as long as it takes."""
    attempts: int = 5
    """Without getting any further; each byte more begins a new count."""
    first_wait_s: float = 0.5
    longest_wait_s: float = 60.0


class Connections:
    """Pooled connections for one pull. `insecure` are the hosts that configuration allows without TLS."""

    def __init__(
        self,
        *,
        insecure: Collection[str] = (),
        limits: Limits | None = None,
        proxies: Mapping[str, str] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self._insecure = frozenset(insecure)
        self._proxies = dict(urllib.request.getproxies_environment() if proxies is None else proxies)
        self._say = say or _silent
        self._clients: dict[tuple[str | None, _Tls], httpx.AsyncClient] = {}

    async def __aenter__(self) -> Connections:
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients.values():
            await client.aclose()

    def may_be_plain(self, host: str) -> bool:
        """Whether `host[:port]` may be spoken to without TLS."""
        return reference.is_loopback(host) or host in self._insecure

    @contextlib.asynccontextmanager
    async def request(
        self, method: str, url: str, headers: Mapping[str, str], *, form: Mapping[str, str] | None = None
    ) -> AsyncIterator[httpx.Response]:
        """The answer's head; its body is read inside. Raises UnavailableError or DeadlineError.

        A body's failures while it is read come through here too.
        """
        try:
            where = address(url)
        except ValueError as error:
            raise errors.BadRequestError(f"{url} is no address: {error}", hint=_NAME_HINT) from None
        kept = {"User-Agent": f"banger/{banger.__version__}", "Accept-Encoding": "identity", **headers}
        with _explained(where.host, self._proxy(where)):
            response = await self._send(method, where, kept, form)
        began_local = reference.is_loopback(host_of(where))
        for _ in range(_MOST_REDIRECTS):
            if response.status_code not in _REDIRECTS:
                break
            await response.aclose()
            target = self._redirected(where, response, local=began_local)
            if origin(target) != origin(where):
                kept.pop("Authorization", None)
            where = target
            with _explained(where.host, self._proxy(where)):
                response = await self._send("HEAD" if method == "HEAD" else "GET", where, kept, None)
        try:
            if response.status_code in _REDIRECTS:
                raise errors.ProtocolError(f"{where.host} redirects more than {_MOST_REDIRECTS} times")
            with _explained(where.host, self._proxy(where)):
                yield response
        finally:
            await response.aclose()

    async def _send(
        self, method: str, url: httpx.URL, headers: Mapping[str, str], form: Mapping[str, str] | None
    ) -> httpx.Response:
        proxy = self._proxy(url)
        client = self._client(proxy, self._tls(url, proxy))
        request = client.build_request(method, url, headers=dict(headers), data=form)
        try:
            return await client.send(request, stream=True)
        except UnicodeError:  # httpx looks at where an answer leads, also when it is not to go there
            raise errors.ProtocolError(f"{url.host} redirects to nowhere") from None

    def _redirected(self, where: httpx.URL, response: httpx.Response, *, local: bool) -> httpx.URL:
        """Where it leads. A public registry gets us neither to plain http nor to services of this host."""
        try:
            target = address(response.headers["location"], where).copy_with(userinfo=b"")
        except (KeyError, ValueError):
            raise errors.ProtocolError(f"{where.host} redirects to nowhere") from None
        host = host_of(target)
        plain_is_fine = self.may_be_plain(host) and (local or host in self._insecure)
        if target.scheme != "https" and not (target.scheme == "http" and plain_is_fine):
            raise errors.ProtocolError(f"{where.host} redirects to {target.scheme}://{host}, without TLS")
        if reference.is_loopback(host) and not local:
            raise errors.ProtocolError(f"{where.host} redirects to this host's own {host}")
        return target

    def _tls(self, url: httpx.URL, proxy: str | None) -> _Tls:
        if url.scheme == "http" and not (proxy or "").startswith("https:"):
            return _Tls.NONE
        return _Tls.UNVERIFIED if host_of(url) in self._insecure else _Tls.VERIFIED

    def _client(self, proxy: str | None, tls: _Tls) -> httpx.AsyncClient:
        key = (proxy, tls)
        if key not in self._clients:
            if proxy is not None:
                self._say(f"through the proxy {proxy_address.shown(proxy)}")
            self._clients[key] = httpx.AsyncClient(
                trust_env=False,
                proxy=proxy,
                verify=_context(tls),
                follow_redirects=False,
                timeout=httpx.Timeout(self.limits.silence_s, connect=self.limits.connect_s, pool=None),
            )
        return self._clients[key]

    def _proxy(self, url: httpx.URL) -> str | None:
        return proxy_for(url.scheme, url.host, url.port, self._proxies)


def proxy_for(scheme: str, host: str, port: int | None, proxies: Mapping[str, str]) -> str | None:
    """By the usual variables; a loopback address never goes through one. It may hold a password.

    Raises BadRequestError for one that is no address, or not an HTTP proxy. SOCKS would take a client of
    our own here and for builds: the library that httpx has it from has had no release since 2020.
    """
    if reference.is_loopback(f"[{host}]" if ":" in host else host):
        return None
    name = f"{host}:{port}" if port else host
    if urllib.request.proxy_bypass_environment(name, proxies):  # type: ignore[attr-defined]
        return None
    if _is_in_networks(host, proxies.get("no", "")):
        return None
    variable = scheme if proxies.get(scheme) else "all"
    proxy = proxies.get(variable)
    if not proxy:
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if not _is_address(proxy):  # not shown: what is wrong may be in the password
        raise errors.BadRequestError(
            f"the proxy for {scheme} is no address",
            hint=f"in a password write / as %2F, # as %23 and @ as %40; {_PROXY_HINT}",
        )
    if urllib.parse.urlsplit(proxy).scheme not in ("http", "https"):
        raise errors.BadRequestError(
            f"{variable.upper()}_PROXY is {proxy_address.shown(proxy)}, which is no HTTP proxy",
            hint=f"{_KIND_HINT}; {_PROXY_HINT}",
        )
    return proxy


def address(text: str, base: httpx.URL | None = None) -> httpx.URL:
    """Raises ValueError for what is none."""
    try:
        found = httpx.URL(text) if base is None else base.join(text)
        host_of(found)  # httpx sees only then whether such a host can be
    except httpx.InvalidURL as error:
        raise ValueError(str(error)) from None
    return found


def host_of(url: httpx.URL) -> str:
    """`host[:port]` as a reference writes it."""
    host = f"[{url.host}]" if ":" in url.host else url.host
    return f"{host}:{url.port}" if url.port else host


def origin(url: httpx.URL) -> tuple[str, str, int]:
    """Who answers there: what is a secret of one origin is not told to another."""
    return url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80)


class _Tls(enum.Enum):
    NONE = enum.auto()
    UNVERIFIED = enum.auto()
    VERIFIED = enum.auto()


@functools.cache
def _context(tls: _Tls) -> ssl.SSLContext:
    """The host's own certificate store: a company's root certificate is there and nowhere else.

    Reading it takes longer than asking a registry, so that is done once, and not for plain http.
    """
    if tls is _Tls.VERIFIED:
        return ssl.create_default_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def verified() -> ssl.SSLContext:
    """What believes whom this host believes."""
    return _context(_Tls.VERIFIED)


def _is_in_networks(host: str, direct: str) -> bool:
    """As docker and podman read NO_PROXY, and the standard library does not: `10.0.0.0/8`."""
    for word in direct.split(","):
        with contextlib.suppress(ValueError):
            if "/" in word and ipaddress.ip_address(host) in ipaddress.ip_network(
                word.strip(), strict=False
            ):
                return True
    return False


@contextlib.contextmanager
def _explained(host: str, proxy: str | None) -> Iterator[None]:
    """A transport's failure, as an error that says where and what may be wrong."""
    via = f" through the proxy {proxy_address.shown(proxy)}" if proxy else ""
    hint = _PROXY_HINT if proxy else _DIRECT_HINT
    try:
        yield
    except httpx.ConnectTimeout as error:
        raise errors.DeadlineError(f"{host} cannot be reached{via}: no connection", hint=hint) from error
    except httpx.TimeoutException as error:
        raise errors.DeadlineError(f"{host} went silent{via}", hint=hint) from error
    except httpx.ProxyError as error:
        raise errors.UnavailableError(f"{host} cannot be reached{via}: {error}", hint=hint) from error
    except httpx.TransportError as error:
        why = str(error) or type(error).__name__
        if "CERTIFICATE_VERIFY_FAILED" in why:
            hint = "add its certificate to this host's store, or the host to insecure_registries"
            raise errors.UnauthorizedError(f"the certificate of {host} is not trusted", hint=hint) from error
        why = re.sub(r"^\[Errno -?[0-9]+\] ", "", why)
        raise errors.UnavailableError(f"{host} cannot be reached{via}: {why}", hint=hint) from error


def _is_address(proxy: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(proxy)
        return parts.port != 0 and bool(parts.hostname) and bool(address(proxy).host)
    except ValueError:
        return False


def _silent(line: str) -> None:
    del line
