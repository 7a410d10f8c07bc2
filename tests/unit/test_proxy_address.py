# SPDX-License-Identifier: MIT
"""A proxy is named where something goes through it, and its password never."""

from __future__ import annotations

import pytest

from banger import pinned, proxy_address


@pytest.mark.parametrize(
    ("proxy", "shown"),
    [
        ("http://proxy.example:3128", "http://proxy.example:3128"),
        ("http://proxy.example:3128/", "http://proxy.example:3128"),
        ("http://[::1]:3128", "http://[::1]:3128"),
        ("proxy.example:3128", "proxy.example:3128"),
        ("http://me:hush@proxy.example:3128", "http://proxy.example:3128"),
        ("me:hush@proxy.example:3128", "proxy.example:3128"),
        ("http://me:hu/sh@proxy.example", "http://proxy.example"),
        ("http://me:hu@sh@proxy.example", "http://proxy.example"),
        ("me:hush://hush@proxy.example", "proxy.example"),
        ("http://me:hush@proxy.example:port", "http://proxy.example:port"),
    ],
)
def test_the_address_of_a_proxy_is_shown_without_its_password(proxy: str, shown: str) -> None:
    assert proxy_address.shown(proxy) == shown


def test_a_download_that_fails_names_the_proxy_as_all_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://me:hush@[::1]:1")
    monkeypatch.delenv("no_proxy", raising=False)
    assert pinned._way("https://far.invalid/x") == " through the proxy http://[::1]:1"
