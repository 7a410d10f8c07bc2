# SPDX-License-Identifier: MIT
"""The network between real guests and a real host: closed by default, opened and closed while they run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.session import Lab
from tests.lab import user

pytestmark = pytest.mark.timeout(900)

# The lab has no internet: a namespace behind a veth plays it, with a web server, past another firewall.
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
nft add table ip other
nft add chain ip other forward '{ type filter hook forward priority filter; policy drop; }'
echo internet > /run/index.html
cd /run && ip netns exec internet setsid python3 -m http.server 80 >/dev/null 2>&1 &
"""
_NO_INTERNET = """
ip netns pids internet | xargs -r kill
ip link del uplink9
ip netns del internet
nft delete table ip other
"""
# Of the same release as the lab's host. It has none of its own: all its rules are of the new interface.
_LEGACY_PACKAGES = ("iptables", "libxtables12", "libip4tc2", "libip6tc2")
_SERVE = "mkdir /www && hostname > /www/index.html && exec /bin/httpd -h /www"
_GET = "exec 3<>/dev/tcp/{address}/{port} && printf 'GET /index.html HTTP/1.0\\r\\n\\r\\n' >&3 && cat <&3"


@pytest.fixture(scope="module")
def two(installed_host: Lab) -> Iterator[Lab]:
    """Two guests, each a stranger to the other, with a web server each that tells its name."""
    installed_host.run(["sh", "-c", _INTERNET])
    for name in ("one", "two"):
        user.banger(installed_host, "vm", "create", name, "--ipv6", *user.TINY)
        user.banger(installed_host, "vm", "exec", name, "--", "sh", "-c", _SERVE)
    yield installed_host
    user.banger(installed_host, "vm", "delete", "one", "two", check=False)
    installed_host.run(["sh", "-c", _NO_INTERNET], check=False)


def get(host: Lab, name: str, address: str) -> str:
    """What a guest is served there; nothing when it does not come through."""
    place = f"[{address}]" if ":" in address else address
    words = ("vm", "exec", name, "--", "timeout", "5", "wget", "-q", "-O", "-", f"http://{place}/index.html")
    return user.banger(host, *words, check=False).text


def served(host: Lab, address: str, port: int = 80) -> str:
    """What the host is served there; nothing when nobody listens."""
    script = _GET.format(address=address, port=port)
    return host.run(["timeout", "20", "bash", "-c", script], check=False).text


def test_the_host_reaches_guests_and_guests_not_each_other(two: Lab) -> None:
    """By IPv6 too, whose address the host finds in the DNS."""
    shown = user.shown(two, "two")
    for address in (shown["address"], shown["address6"]):
        assert served(two, address).endswith("\r\n\r\ntwo\n")
        assert get(two, "one", address) == ""
    assert get(two, "two", "127.0.0.1") == "two\n"
    found = two.run(["getent", "ahostsv6", "two.vm"]).text
    assert shown["address6"] in found
    stats = json.loads(user.banger(two, "vm", "stats", "two", "--json").text)
    counts = {count: stats[count] for count in ("cpu_usec", "read_bytes", "rx_bytes", "tx_bytes")}
    assert all(counts.values()), counts
    assert stats["memory_peak_bytes"] >= stats["memory_bytes"] > 1 << 20


_SERVICES = ("bangerd", "bangerd-root")


def _pids(host: Lab) -> list[int]:
    return [
        int(each)
        for each in host.run(["systemctl", "show", "--value", "-p", "MainPID", *_SERVICES]).text.split()
    ]


def _killed_and_started(host: Lab) -> None:
    before = _pids(host)
    assert all(before)
    host.run(["systemctl", "kill", "-s", "KILL", *_SERVICES])
    host.run(["systemctl", "start", "bangerd-root.socket", "bangerd"])
    user.banger(host, "vm", "list")
    after = _pids(host)
    assert all(after)
    assert set(before).isdisjoint(after)


def _elements(host: Lab) -> set[tuple[str, str, str]]:
    """Whose, in which set, and what: all that VMs own of banger's tables."""
    found = set()
    for entry in json.loads(host.run(["nft", "-j", "list", "ruleset"]).text)["nftables"]:
        for kind, content in entry.items():
            if kind in ("set", "map") and content["table"] == "banger":
                for each in content.get("elem", ()):
                    element = each[0] if kind == "map" else each
                    if isinstance(element, dict) and "elem" in element:
                        one = element["elem"]
                        found.add((one["comment"], content["name"], json.dumps(one["val"])))
    return found


def _other_firewall(host: Lab) -> str:
    return host.run(["nft", "-s", "list", "table", "ip", "other"]).text


def _forwards(host: Lab) -> list[str]:
    links = ("uplink9", "br-fc")
    return host.run(["cat", *(f"/proc/sys/net/ipv4/conf/{link}/forwarding" for link in links)]).text.split()


def test_nat_on_off_and_on_with_both_services_killed_in_between(two: Lab) -> None:
    """What holds is what the row says, to the element, past another firewall, and nothing after the stop."""
    one = user.shown(two, "one")
    opened = {
        (one["id"], f"{name}{family}", json.dumps(one[f"address{family}"]))
        for name in ("nat", "internet")
        for family in ("", "6")
    }
    closed, firewall = _elements(two), _other_firewall(two)
    assert get(two, "one", "203.0.113.10") == ""
    for on in (True, False, True):
        user.banger(two, "vm", "set", "one", "--nat", "on" if on else "off")
        _killed_and_started(two)
        assert ("internet" in get(two, "one", "203.0.113.10")) is on
        assert _elements(two) == (closed | opened if on else closed)
        assert _other_firewall(two).count('comment "banger"') == (2 if on else 0)
        assert _forwards(two) == (["1", "1"] if on else ["0", "0"])
    user.banger(two, "vm", "stop", "one")
    assert {owner for owner, _, _ in closed} - {owner for owner, _, _ in _elements(two)} == {one["id"]}
    assert one["id"] not in two.run(["nft", "list", "ruleset"]).text
    assert _other_firewall(two) == firewall
    assert _forwards(two) == ["0", "0"]


def test_a_published_port_is_served_on_loopback(two: Lab) -> None:
    user.banger(two, "vm", "publish", "two", "18080:80")
    assert served(two, "127.0.0.1", 18080).endswith("\r\n\r\ntwo\n")
    listed = json.loads(user.banger(two, "vm", "ports", "two", "--json").text)
    found = next(each for each in listed if each["port"] == 80)
    assert (found["published"], found["target"]) == (["127.0.0.1:18080"], "two.vm:80")
    assert found["process"] == "httpd"
    user.banger(two, "vm", "unpublish", "two", "18080:80")
    assert served(two, "127.0.0.1", 18080) == ""


@pytest.mark.long
def test_nat_past_rules_of_the_old_interface(two: Lab, tmp_path: Path) -> None:
    """By iptables-legacy, which the helper runs with all that its unit leaves it."""
    listed = subprocess.run(["dpkg", "-L", *_LEGACY_PACKAGES], capture_output=True, text=True, check=True)
    files = [path for path in listed.stdout.splitlines() if Path(path).is_file() or Path(path).is_symlink()]
    packed = tmp_path / "iptables.tar"
    subprocess.run(["tar", "-C", "/", "-c", "-f", packed, *(path[1:] for path in files)], check=True)
    two.put(packed, "/root/iptables.tar")
    two.run(["tar", "--keep-directory-symlink", "-C", "/", "-x", "-f", "/root/iptables.tar"])
    two.run(["ldconfig"])
    for tool in ("iptables-legacy", "ip6tables-legacy"):
        two.run([tool, "-P", "FORWARD", "DROP"])
    try:
        assert get(two, "two", "203.0.113.10") == ""
        for on in (True, False):
            user.banger(two, "vm", "set", "two", "--nat", "on" if on else "off")
            assert ("internet" in get(two, "two", "203.0.113.10")) is on
            for tool in ("iptables-legacy", "ip6tables-legacy"):
                rules = two.run([tool, "-S", "FORWARD"]).text
                assert rules.count("--comment banger") == (2 if on else 0), rules
    finally:
        for tool in ("iptables-legacy", "ip6tables-legacy"):
            two.run([tool, "-P", "FORWARD", "ACCEPT"])
        two.run(["modprobe", "-r", "iptable_filter", "ip6table_filter"], check=False)
