# SPDX-License-Identifier: MIT
"""doctor and installation read the kernel's own routes, where one leads into the VMs' network."""

from __future__ import annotations

import subprocess
import sys

import pytest

_ASK = """
import msgspec
from banger.system import settings
from banger.system.doctor import network, scene
host = scene.Scene()
host.settings = lambda: settings.Settings(
    owner_uid=0, owner_gid=0, owner_name="root", firecracker_sha256="", jailer_sha256=""
)
found = network.PROBE(host)
print(f"{found.status} {found.detail}; {found.remedy}")
"""
_INSTALL = """
import asyncio
from banger.contract import errors
from banger.system import choices, host, install
host.check = lambda owner: None
first = install.Install(choices.Choices(owner="dev", network6="fd77:1:2:3::/64"), print).plan()[0]
try:
    asyncio.run(first.run())
    print("it goes on")
except errors.ConflictError as error:
    print(error.message, error.hint, sep="; ")
"""


@pytest.mark.parametrize(
    ("link", "address", "said"),
    [
        (
            "other",
            "10.213.241.1/24",
            "fail network 10.213.240.0/20 overlaps 10.213.241.0/24, which this host reaches by other",
        ),
        (
            "other",
            "10.213.0.1/16",
            "fail network 10.213.240.0/20 overlaps 10.213.0.0/16, which this host reaches by other",
        ),
        (
            "other",
            "10.99.0.1/24",
            "fail network 10.213.240.0/20 overlaps 10.213.0.0/16, which this host reaches by table 52",
        ),
        ("other", "10.214.0.1/24", "pass 10.213.240.0/20 is the VMs' alone"),
        ("br-fc", "10.213.240.1/20", "pass 10.213.240.0/20 is the VMs' alone"),
    ],
)
def test_a_route_into_the_vms_network(link: str, address: str, said: str) -> None:
    assert _where(link, address, _ASK.replace("PROBE", "prefix")).startswith(f"{said};")


@pytest.mark.parametrize(
    ("link", "address", "said"),
    [
        ("other", "fd62:616e:6765::1/48", "overlaps fd62:616e:6765::/48, which this host reaches by other;"),
        ("other", "fd63::1/48", "pass "),
        ("br-fc", "fd62:616e:6765:7200::1/64", "pass "),
    ],
)
def test_a_route_into_the_vms_ipv6_network(link: str, address: str, said: str) -> None:
    found = _where(link, address, _ASK.replace("PROBE", "ipv6"))
    assert said in found
    assert ("another one: `--network6 fd" in found) is ("overlaps" in said)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (
            "10.213.241.1/24",
            "network 10.213.240.0/20 overlaps 10.213.241.0/24, which this host reaches by other; "
            "install with another one: `--network 10.255.240.0/20`",
        ),
        (
            "fd77:1:2:3::1/64",
            "network fd77:1:2:3::/64 overlaps fd77:1:2:3::/64, which this host reaches by other; "
            "install with another one: `--network6 fdb6:9113:17a6::/64`",
        ),
        ("10.214.0.1/24", "it goes on"),
    ],
)
def test_an_installation_is_refused_before_anything_is_made(address: str, said: str) -> None:
    assert _where("other", address, _INSTALL) == said


def _where(link: str, address: str, program: str) -> str:
    """What it prints on a host with this address; that of a VPN has a table of its own besides."""
    script = (
        'ip link add "$1" type bridge && ip addr add "$2" dev "$1" && ip link set "$1" up '
        '&& ip route add default dev "$1" && ip route add unreachable 10.0.0.0/8 table 52 '
        '&& if [ "$2" = 10.99.0.1/24 ]; then ip route add 10.213.0.0/16 dev "$1" table 52; fi '
        '&& exec "$3" -c "$4"'
    )
    argv = ["unshare", "--net", "sh", "-ec", script, "sh", link, address, sys.executable, program]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
