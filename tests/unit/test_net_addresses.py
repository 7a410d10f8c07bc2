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
*\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0
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


TABLE6 = f"""\
fd630000000000000000000000000000 40 {"0" * 32} 00 {"0" * 32} 00000100 00000001 00000000 00000001        o
fd640000000000000000000000000001 80 {"0" * 32} 00 {"0" * 32} 00000000 00000002 00000000 80200001       lo
fd650000000000000000000000000000 30 {"0" * 32} 00 {"0" * 32} 00000400 00000001 00000000 00200200       lo
fc000000000000000000000000000000 07 {"0" * 32} 00 {"0" * 32} 00000400 00000001 00000000 00000003       o
{"0" * 32} 00 {"0" * 32} 00 {"0" * 32} ffffffff 00000001 00000000 00200200       lo
"""


def test_the_kernels_tables_of_ipv6_are_read_without_what_leads_nowhere_or_everywhere(
    tmp_path: Path,
) -> None:
    (tmp_path / "route").write_text(TABLE6)
    found = [(each.link, str(each.network)) for each in addresses.routes6(tmp_path / "route")]
    assert found == [("o", "fd63::/64"), ("lo", "fd64::1/128")]
    assert addresses.routes6(tmp_path / "none") == []


@pytest.mark.parametrize("taken", [names.NETWORK6, "fd62:616e:6765::/48", "fd62:616e:6765:7200::5/128"])
def test_a_collision_in_ipv6_is_refused_with_a_prefix_that_is_free(taken: str) -> None:
    found = [addresses.Route("vpn0", ipaddress.IPv6Network(taken))]
    with pytest.raises(errors.ConflictError, match="by vpn0") as caught:
        addresses.check6(names.DEFAULT_NETWORK6, found)
    proposed = names.parse_network6(caught.value.hint.rpartition(" ")[2].strip("`"))
    addresses.check6(proposed, found)
    addresses.check6(names.DEFAULT_NETWORK6, [found[0]._replace(link="br-fc")])


def test_our_own_bridge_is_no_collision() -> None:
    addresses.check(NETWORK, [route("br-fc", names.NETWORK), route("eth0", "192.168.2.0/24")])
    assert addresses.free([]) == NETWORK


def test_a_host_that_routes_everything_is_told_so() -> None:
    with pytest.raises(errors.ConflictError, match="every private network"):
        addresses.free([route("tun0", each) for each in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")])


def test_the_ipv6_prefix_of_a_host_is_local_and_always_the_same() -> None:
    one, other = addresses.derived_network6("one"), addresses.derived_network6("other")
    assert one == addresses.derived_network6("one") != other
    assert names.parse_network6(str(one)) == one
    assert one.network_address.packed[0] == 0xFD
    assert names.parse_network6(names.NETWORK6) == names.DEFAULT_NETWORK6


def test_a_guests_own_address_on_the_link_is_what_its_kernel_makes() -> None:
    assert str(names.link_local(names.VmId("0123456789ab"))) == "fe80::401:23ff:fe45:6789"
