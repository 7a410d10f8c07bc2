# SPDX-License-Identifier: MIT
"""A network that the host routes already is found, and another one proposed."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from banger.contract import errors, names
from banger.net import addresses

NETWORK = ipaddress.IPv4Network(names.NETWORK)
TABLE = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0102A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t0002A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
tun0\t0000D50A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
"""


def route(link: str, network: str) -> addresses.Route:
    return addresses.Route(link, ipaddress.IPv4Network(network))


def test_the_kernels_table_is_read_without_default_routes(tmp_path: Path) -> None:
    (tmp_path / "route").write_text(TABLE)
    found = addresses.routes(tmp_path / "route")
    assert found == [route("eth0", "192.168.2.0/24"), route("tun0", "10.213.0.0/16")]


def test_this_machines_own_table_is_read() -> None:
    assert isinstance(addresses.routes(), list)


@pytest.mark.parametrize("taken", ["10.213.240.0/20", "10.213.0.0/16", "10.213.255.8/29", "10.0.0.0/8"])
def test_a_collision_is_refused_with_a_network_that_is_free(taken: str) -> None:
    found = [route("tun0", taken), route("br-fc", names.NETWORK)]
    with pytest.raises(errors.ConflictError, match="by tun0") as caught:
        addresses.check(NETWORK, found)
    proposed = ipaddress.IPv4Network(caught.value.hint.rpartition(" ")[2].strip("`"))
    assert not proposed.overlaps(ipaddress.IPv4Network(taken))
    addresses.check(proposed, found)


def test_our_own_bridge_is_no_collision() -> None:
    addresses.check(NETWORK, [route("br-fc", names.NETWORK), route("eth0", "192.168.2.0/24")])
    assert addresses.free([]) == NETWORK


def test_a_host_that_routes_everything_is_told_so() -> None:
    with pytest.raises(errors.ConflictError, match="every private network"):
        addresses.free([route("tun0", each) for each in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")])


def test_the_ipv6_prefix_of_a_host_is_local_and_always_the_same() -> None:
    one, other = names.derived_network6("one"), names.derived_network6("other")
    assert one == names.derived_network6("one") != other
    assert names.parse_network6(str(one)) == one
    assert one.network_address.packed[0] == 0xFD
    assert names.parse_network6(names.NETWORK6) == names.DEFAULT_NETWORK6


def test_a_guests_own_address_on_the_link_is_what_its_kernel_makes() -> None:
    assert str(names.link_local(names.VmId("0123456789ab"))) == "fe80::401:23ff:fe45:6789"
