# SPDX-License-Identifier: MIT
"""Taking banger off a host: with --purge the host is as before, without it nothing of value is lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lab import provision
from lab.session import Lab
from tests.lab import user

pytestmark = pytest.mark.timeout(600)
BANGER = f"{provision.VENV}/bin/banger"

LOOKS = {
    "files": "find / -xdev \\( -path /tmp -o -path /var/tmp -o -path /var/log \\) -prune -o"
    " \\( -type d -printf '%p %y %m %U:%G\\n' \\) -o -printf '%p %y %m %U:%G %s %l\\n'",
    # That the place of banger's own programs is gone, "files" says; to read all of them takes half a minute.
    "contents": "find /etc /usr/local -xdev"
    f" -path {provision.VENV} -prune -o -type f -exec sha256sum {{}} +",
    # Sessions come and go there by themselves; only what has our name is ours.
    "runtime files": "find /run -name '*banger*'",
    "unit files": "systemctl list-unit-files --no-legend --no-pager",
    "units": "systemctl list-units --all --plain --no-legend --no-pager '*banger*'",
    "failed units": "systemctl list-units --failed --plain --no-legend --no-pager",
    "users": "getent passwd; getent group",
    "rules": "nft -j list ruleset",
    "devices": "dmsetup table; losetup -l -n",
    "links": "ip -o link | sed 's/^[0-9]*: //'; ip -o -4 addr | sed 's/^[0-9]*: //'; ip route",
    "forwarding": "sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding",
    "cgroups": "find /sys/fs/cgroup -type d -not -path '*/user.slice/*' -not -path '*/system.slice/*'",
    "processes": "ps -eo user=,args= | grep -E 'banger|firecracker|jailer' | grep -v grep; true",
    "modules": "cut -d' ' -f1 /proc/modules",
}

SEEN = {
    "files",
    "contents",
    "runtime files",
    "unit files",
    "units",
    "devices",
    "links",
    "cgroups",
    "processes",
}
"""Where a VM that runs must show, or the looks see nothing."""
STAYS = {
    "modules": {
        r"(loop|dm_mod|dm_bufio|dm_snapshot|tun|bridge|stp|llc|kvm\w*)": "others may use them by now",
        r"(nf_tables|nfnetlink|nft_(chain_nat|ct|masq|meta_bridge|objref|redir))": "our packet rules",
        r"(nf_conntrack|nf_nat|nf_defrag_ipv[46]|libcrc32c|crc32c_\w+)": "what these need in turn",
    },
}
"""What is different afterwards, and why."""


def test_purge_leaves_the_host_as_it_was(prepared_host: Lab) -> None:
    host = prepared_host
    host.run(["systemd-run", "-q", "--wait", "--unit", "foreign", "false"], check=False)
    # The wheels are in the place that is banger's alone, and must go with it.
    before = {
        look: {line for line in lines if provision.VENV not in line}
        for look, lines in _inventory(host).items()
    }
    assert len(before["failed units"]) == 1
    provision.install_banger(host, Path("/artefacts"))
    user.banger(host, "vm", "create", "web", *user.TINY)
    assert user.banger(host, "vm", "exec", "web", "--", "echo", "alive").text == "alive\n"
    assert _differences(before, _inventory(host)).keys() >= SEEN

    refused = host.run(["banger", "system", "uninstall", "--purge"], check=False)
    assert refused.status != 0
    assert "--force" in refused.error_text
    assert user.shown(host, "web")["state"] == "running"
    host.run(["banger", "system", "uninstall", "--purge", "--force"], timeout_s=120)

    assert user.leftovers(host) == ""
    assert _differences(before, _inventory(host)) == {}


def test_without_purge_everything_is_found_again(fresh_installed_host: Lab) -> None:
    host = fresh_installed_host
    user.banger(host, "vm", "create", "web", *user.TINY)
    user.banger(host, "vm", "exec", "web", "--", "sh", "-c", "echo mine > /root/kept; echo mine > /kept")
    user.banger(host, "vm", "stop", "web")
    disks = "cd /var/lib/banger && find images kernels vms -type f -printf '%p %s %T@\\n' | sort"
    before = host.run(["sh", "-c", disks]).text
    assert "work.ext4" in before
    assert user.banger(host, "system", "uninstall", check=False).status != 0  # not root

    said = host.run(["banger", "system", "uninstall"], timeout_s=120).error_text
    assert "VMs, images and kernels in /var/lib/banger," in said
    assert f"{BANGER} system install" in said
    assert user.leftovers(host) == ""
    assert host.run(["sh", "-c", disks]).text == before
    assert host.run(["sh", "-c", "systemctl list-unit-files --no-legend '*banger*'"], check=False).text == ""

    host.run(["sh", "-c", f"SUDO_USER={user.NAME} {BANGER} system install"], timeout_s=120)
    assert user.shown(host, "web")["state"] == "stopped"
    user.banger(host, "vm", "start", "web")
    kept = user.banger(host, "vm", "exec", "web", "--", "cat", "/root/kept", "/kept").text
    assert kept == "mine\nmine\n"
    user.banger(host, "vm", "stop", "web")

    # An uninstallation that was cut off after the helper's socket had gone is done again.
    host.run(["systemctl", "disable", "--now", "bangerd.service", "bangerd-root.socket"])
    host.run(["banger", "system", "uninstall", "--purge"], timeout_s=120)
    assert host.run(["sh", "-c", "ls -d /var/lib/banger* /etc/banger* 2>/dev/null"], check=False).text == ""


def _inventory(host: Lab) -> dict[str, set[str]]:
    return {
        look: set(host.run(["sh", "-c", script], timeout_s=120, check=False).text.splitlines())
        for look, script in LOOKS.items()
    }


def _differences(before: dict[str, set[str]], after: dict[str, set[str]]) -> dict[str, list[str]]:
    """By look, the lines that came or went; without those that are known to stay."""
    found = {}
    for look in LOOKS:
        known = "|".join(STAYS.get(look, ()))
        came, went = after[look] - before[look], before[look] - after[look]
        changed = [f"+ {line}" for line in came if not re.fullmatch(known, line)]
        changed += [f"- {line}" for line in went if not re.fullmatch(known, line)]
        if changed:
            found[look] = sorted(changed)
    return found
