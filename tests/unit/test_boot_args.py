# SPDX-License-Identifier: MIT
"""The guest kernel's command line."""

from __future__ import annotations

import ipaddress

import pytest

from banger.contract import names
from banger.vm import boot_args

NETWORK = ipaddress.IPv4Network("10.213.240.0/20")
WEB = names.VmName("web")
IP = boot_args.ip_argument(WEB, ipaddress.IPv4Address("10.213.240.2"), NETWORK, ("10.0.0.53",))


def test_the_kernel_s_own_address_argument() -> None:
    assert IP == "10.213.240.2::10.213.240.1:255.255.240.0:web:eth0:off:10.0.0.53"


def test_direct_boot_gets_its_address_from_the_kernel() -> None:
    words = boot_args.compose(has_initrd=False, ip=IP).split()
    assert f"ip={IP}" in words
    assert words[-1] == "init=/.banger/guest"


def test_with_an_initrd_the_kernel_is_given_no_address() -> None:
    words = boot_args.compose(has_initrd=True, ip=IP).split()
    assert not [word for word in words if word.startswith("ip=")]
    assert f"banger.ip={IP}" in words


@pytest.mark.parametrize("has_initrd", [False, True])
def test_without_a_network_there_is_no_address(has_initrd: bool) -> None:
    assert "ip=" not in boot_args.compose(has_initrd=has_initrd, ip="")


def test_what_the_guest_s_init_is_told() -> None:
    words = boot_args.guest_words(WEB, ("10.0.0.53", "10.0.0.54"), work_disk=True)
    assert words == (
        "banger.hostname=web",
        "banger.dns=10.0.0.53",
        "banger.dns=10.0.0.54",
        "banger.mount=/dev/vdb:/root:ext4",
    )
    line = boot_args.compose(has_initrd=False, ip="", guest=words)
    assert line.split()[-5:] == [*words, "init=/.banger/guest"]


def test_an_ipv6_address_is_told_with_who_leads_on() -> None:
    ip6 = boot_args.ip6_argument(1, ipaddress.IPv6Network("fd12:3456:789a::/64"))
    assert boot_args.guest_words(WEB, (), work_disk=False, ip6=ip6) == (
        "banger.hostname=web",
        "banger.ip6=fd12:3456:789a::2/64,fd12:3456:789a::1",
    )


def test_the_longest_line_is_within_what_kernels_take() -> None:
    """COMMAND_LINE_SIZE is 2048 on x86_64 and aarch64, and Firecracker adds words for its devices."""
    name, dns = names.VmName("n" * 63), ("255.255.255.255",) * 3
    ip = boot_args.ip_argument(name, ipaddress.IPv4Address("10.213.255.254"), NETWORK, dns)
    ip6 = boot_args.ip6_argument(4000, ipaddress.IPv6Network("fdff:ffff:ffff:ffff::/64"))
    words = boot_args.guest_words(name, dns, work_disk=True, ip6=ip6)
    line = boot_args.compose(has_initrd=False, ip=ip, guest=words)
    assert len(line) < 800
