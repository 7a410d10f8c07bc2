# SPDX-License-Identifier: MIT
"""doctor reads the kernel's own routes, in a network namespace where one leads into the VMs' network."""

from __future__ import annotations

import subprocess
import sys

import pytest

_ASK = """
import msgspec
from banger.system.doctor import network, scene
host = scene.Scene()
host.settings = lambda: scene.Settings(
    owner_uid=0, owner_gid=0, owner_name="root", firecracker_sha256="", jailer_sha256=""
)
found = network.prefix(host)
print(found.status, found.detail)
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
        ("other", "10.214.0.1/24", "pass 10.213.240.0/20 is the VMs' alone"),
        ("br-fc", "10.213.240.1/20", "pass 10.213.240.0/20 is the VMs' alone"),
    ],
)
def test_a_route_into_the_vms_network(link: str, address: str, said: str) -> None:
    script = (
        'ip link add "$1" type bridge && ip addr add "$2" dev "$1" && ip link set "$1" up '
        '&& ip route add default dev "$1" && exec "$3" -c "$4"'
    )
    argv = ["unshare", "--net", "sh", "-ec", script, "sh", link, address, sys.executable, _ASK]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.strip() == said, done.stderr
