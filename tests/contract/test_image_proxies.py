# SPDX-License-Identifier: MIT
"""The proxies of the environment on the way to a registry: used, named, and never with their password."""

from __future__ import annotations

from pathlib import Path

import pytest

from banger.contract import errors
from banger.images import connections
from tests.contract.image_client import LIMITS
from tests.fakes import registry as registries

PASSWORD = "correct-horse-battery-staple"  # noqa: S105


async def test_a_proxy_is_used_named_and_never_for_loopback(tmp_path: Path) -> None:
    with registries.serving() as proxy:
        notes: list[str] = []
        proxies = {"http": f"http://me:{PASSWORD}@{proxy.host}", "no": "direct.invalid"}
        wire = connections.Connections(
            insecure=("far.invalid", "direct.invalid"), proxies=proxies, say=notes.append, limits=LIMITS
        )
        async with wire:
            async with wire.request("GET", "http://far.invalid/v2/", {}) as response:
                assert response.status_code == 404  # the fake is no proxy, but it was asked
            assert proxy.asked[0].path == "http://far.invalid/v2/"
            assert notes == [f"through the proxy http://{proxy.host}"]
            with pytest.raises(errors.UnavailableError):
                async with wire.request("GET", "http://direct.invalid/v2/", {}):
                    pass
            async with wire.request("GET", f"http://{proxy.host}/v2/", {}) as response:
                assert response.status_code == 200
            assert len(proxy.asked) == 2


@pytest.mark.parametrize(
    ("host", "is_direct"),
    [
        ("10.20.0.1", True),
        ("10.21.0.1", False),
        ("fd00::7", True),
        ("fd01::7", False),
        ("direct.invalid", True),
        ("far.invalid", False),
    ],
)
def test_networks_are_reached_without_the_proxy_as_docker_reads_it(host: str, is_direct: bool) -> None:
    proxies = {"https": "http://proxy.invalid:3128", "no": "direct.invalid, 10.20.3.4/16,x/y,fd00::/16"}
    assert (connections.proxy_for("https", host, 5000, proxies) is None) == is_direct


@pytest.mark.parametrize(
    "proxy",
    [
        *("http://me:hush/hush@far.invalid:3128", "http://me:hush#hush@far.invalid:3128"),
        *(
            "http://me:hush@300.1.1.1:3128",
            "http://me:hush@far.invalid:port",
            "http://me:hush@[::1",
            "http://",
        ),
    ],
)
async def test_a_proxy_that_is_no_address_is_told_without_its_password(proxy: str) -> None:
    notes: list[str] = []
    async with connections.Connections(proxies={"https": proxy}, limits=LIMITS, say=notes.append) as wire:
        with pytest.raises(errors.BadRequestError, match="proxy for https is no address") as caught:
            async with wire.request("GET", "https://registry.invalid/v2/", {}):
                pass
    assert "%2F" in caught.value.hint
    assert "hush" not in repr(errors.to_body(caught.value)) + "".join(notes)


@pytest.mark.parametrize(
    ("proxies", "variable"),
    [
        ({"all": f"socks5h://me:{PASSWORD}@far.invalid:1080"}, "ALL_PROXY"),
        ({"https": f"socks5://me:{PASSWORD}@far.invalid:1080", "all": "http://b.invalid"}, "HTTPS_PROXY"),
    ],
)
async def test_a_socks_proxy_is_refused_by_its_variable(proxies: dict[str, str], variable: str) -> None:
    async with connections.Connections(proxies=proxies, limits=LIMITS) as wire:
        with pytest.raises(
            errors.BadRequestError, match=f"{variable} is socks5h?://far.invalid:1080"
        ) as caught:
            async with wire.request("GET", "https://registry.invalid/v2/", {}):
                pass
    assert "HTTPS_PROXY" in caught.value.hint
    assert PASSWORD not in repr(errors.to_body(caught.value))


async def test_a_proxy_that_is_not_there_is_named_without_its_password(tmp_path: Path) -> None:
    wire = connections.Connections(
        insecure=("far.invalid",), proxies={"http": f"http://me:{PASSWORD}@127.0.0.1:1"}, limits=LIMITS
    )
    async with wire:
        with pytest.raises(
            errors.UnavailableError, match=r"through the proxy http://127\.0\.0\.1:1"
        ) as caught:
            async with wire.request("GET", "http://far.invalid/v2/", {}):
                pass
    assert PASSWORD not in str(caught.value) + caught.value.hint
