# SPDX-License-Identifier: MIT
"""The network between real guests and a real host: closed by default, opened and closed while they run."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from lab.session import Lab
from tests.lab import user

pytestmark = pytest.mark.timeout(900)

# The lab has no internet: a namespace behind a veth plays it, with a web server.
_INTERNET = """
set -e
ip netns add internet
ip link add uplink9 type veth peer name inet9 netns internet
ip addr add 198.51.100.2/24 dev uplink9
ip link set uplink9 up
ip -n internet addr add 198.51.100.1/24 dev inet9
ip -n internet addr add 203.0.113.10/32 dev lo
ip -n internet link set lo up
ip -n internet link set inet9 up
ip route add 203.0.113.0/24 via 198.51.100.1
echo internet > /run/index.html
cd /run && ip netns exec internet setsid python3 -m http.server 80 >/dev/null 2>&1 &
"""
_NO_INTERNET = "ip netns pids internet | xargs -r kill; ip link del uplink9; ip netns del internet"
_GET = "exec 3<>/dev/tcp/{address}/{port} && printf 'GET /index.html HTTP/1.0\\r\\n\\r\\n' >&3 && cat <&3"
# The agent answers before the image's init can be spoken to.
_UNTIL_SSH = "until systemctl start ssh; do sleep 0.5; done"
_BANNER = "import socket; print(socket.create_connection(({address!r}, {port}), timeout=20).recv(99))"


@pytest.fixture(scope="module")
def two(installed_host: Lab) -> Iterator[Lab]:
    """Two guests, each a stranger to the other, with an ssh server each."""
    installed_host.run(["sh", "-c", _INTERNET])
    for name in ("one", "two"):
        user.banger(installed_host, "vm", "create", name, "--ipv6", *user.SMALL)
        user.banger(installed_host, "vm", "exec", name, "--", "timeout", "120", "bash", "-c", _UNTIL_SSH)
    yield installed_host
    user.banger(installed_host, "vm", "delete", "one", "two", check=False)
    installed_host.run(["sh", "-c", _NO_INTERNET], check=False)


def get(host: Lab, name: str, address: str, port: int = 80) -> str:
    """What a guest is served there; nothing when it does not come through."""
    script = _GET.format(address=address, port=port)
    words = ("vm", "exec", name, "--", "timeout", "5", "bash", "-c", script)
    return user.banger(host, *words, check=False).text


def banner(host: Lab, address: str, port: int, *, check: bool = True) -> str:
    """What a server says first to the host."""
    return host.run(["python3", "-c", _BANNER.format(address=address, port=port)], check=check).text


def test_the_host_reaches_guests_and_guests_not_each_other(two: Lab) -> None:
    """By IPv6 too, whose address the host finds in the DNS."""
    shown = user.shown(two, "two")
    for address in (shown["address"], shown["address6"]):
        assert "SSH-2.0" in banner(two, address, 22)
        assert get(two, "one", address, 22) == ""
    found = two.run(["getent", "ahostsv6", "two.vm"]).text
    assert shown["address6"] in found


def test_nat_on_off_and_on_with_both_services_killed_in_between(two: Lab) -> None:
    assert get(two, "one", "203.0.113.10") == ""
    before = two.run(["sh", "-c", "nft -s list ruleset | grep -c 'tap-'"]).text
    for on in (True, False, True):
        user.banger(two, "vm", "set", "one", "--nat", "on" if on else "off")
        two.run(["systemctl", "kill", "-s", "KILL", "bangerd", "bangerd-root"], check=False)
        two.run(["systemctl", "reset-failed"], check=False)
        two.run(["systemctl", "start", "bangerd-root.socket", "bangerd"])
        user.banger(two, "vm", "list")
        assert ("internet" in get(two, "one", "203.0.113.10")) is on
        assert two.run(["sh", "-c", "nft -s list ruleset | grep -c 'tap-'"]).text == before
    user.banger(two, "vm", "set", "one", "--nat", "off")
    assert two.run(["cat", "/proc/sys/net/ipv4/conf/uplink9/forwarding"]).text == "0\n"


def test_a_published_port_is_served_on_loopback(two: Lab) -> None:
    user.banger(two, "vm", "publish", "two", "18022:22")
    assert "SSH-2.0" in banner(two, "127.0.0.1", 18022)
    listed = json.loads(user.banger(two, "vm", "ports", "two", "--json").text)
    found = next(each for each in listed if each["port"] == 22)
    assert (found["published"], found["target"]) == (["127.0.0.1:18022"], "two.vm:22")
    assert found["process"] in ("sshd", "systemd"), "until the first login the socket's unit listens"
    user.banger(two, "vm", "unpublish", "two", "18022:22")
    assert banner(two, "127.0.0.1", 18022, check=False) == ""
