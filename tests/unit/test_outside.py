# SPDX-License-Identifier: MIT
"""What a build may be connected to: public addresses, and never this host by any of its own."""

from __future__ import annotations

import asyncio
import ipaddress

import pytest

from banger.net import outside

INSIDE = (
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "192.168.1.1"),  # noqa: S104
    *("169.254.169.254", "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "224.0.0.1"),
    *("239.1.2.3", "240.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.2.1", "203.0.113.7"),
    *(
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "::127.0.0.1",
        "fe80::1",
        "fc00::1",
        "fd00:ec2::254",
    ),
    *("ff02::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::1", "2001:0:1::1", "2001:db8::1"),
)
PUBLIC = ("8.8.8.8", "151.101.2.132", "2a04:4e42::644", "2606:4700::1111", "64:ff9b::808:808")


@pytest.mark.parametrize("text", INSIDE)
def test_what_is_not_the_internet_is_not_public(text: str) -> None:
    assert not outside.is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", PUBLIC)
def test_what_is_the_internet_is_public(text: str) -> None:
    assert outside.is_public(ipaddress.ip_address(text))


def test_an_address_of_this_host_s_own_is_seen() -> None:
    assert outside._is_here(ipaddress.ip_address("127.0.0.1"))
    assert not outside._is_here(ipaddress.ip_address("203.0.113.7"))


@pytest.mark.parametrize("text", ["127.1", "0x7f000001", "2130706433", "0177.0.0.1", "localhost"])
def test_an_address_is_judged_however_it_is_written(text: str) -> None:
    found = asyncio.run(outside.resolve(text, 80))
    assert found
    assert not any(map(outside.is_outside, found))


@pytest.mark.parametrize("text", ["", "a" * 300, "a..b", "\udcff"])
def test_what_is_no_name_means_nothing(text: str) -> None:
    with pytest.raises(OSError):  # noqa: PT011 - whatever the resolver says
        asyncio.run(outside.resolve(text, 80))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            "2a04:4e42::1 2a04:4e42::2 151.101.2.132 151.101.66.132",
            "2a04:4e42::1 151.101.2.132 2a04:4e42::2 151.101.66.132",
        ),
        ("8.8.8.8 8.8.4.4 2606:4700::1111", "8.8.8.8 2606:4700::1111 8.8.4.4"),
        ("8.8.8.8", "8.8.8.8"),
        ("", ""),
    ],
)
def test_the_second_address_to_try_is_of_the_other_family(found: str, expected: str) -> None:
    turns = outside.in_turns([ipaddress.ip_address(each) for each in found.split()])
    assert " ".join(map(str, turns)) == expected
