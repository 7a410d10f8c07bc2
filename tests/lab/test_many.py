# SPDX-License-Identifier: MIT
"""Much at once: VMs created side by side, commands side by side in one, a lot of data through it.

How many is what two emulated processors bear; tests/contract has ten, and a hundred, natively.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from lab.session import Lab
from tests.lab import user

pytestmark = pytest.mark.timeout(600)
VMS = 5
COMMANDS = 8
WHO = "hostname; ip -4 -o address show dev eth0 | awk '{print $4}' | cut -d/ -f1"
BLOB = "/home/dev/blob"
MANY_S = 400.0


@pytest.fixture(scope="module")
def web(installed_host: Lab) -> Iterator[Lab]:
    """The installed host with a VM named web running, which has room for the data."""
    user.banger(
        installed_host, "vm", "create", "web", *user.ONE_CPU, "--memory", "256M", "--disk-size", "512M"
    )
    yield installed_host
    user.banger(installed_host, "vm", "delete", "web")


def test_creates_at_once(installed_host: Lab) -> None:
    names = [f"many-{number}" for number in range(VMS)]
    # The guests share two emulated processors here: their agents answer late, and together.
    with user.configured(installed_host, f"agent_deadline_s = {MANY_S:g}"):
        creates = [("vm", "create", name, *user.TINY) for name in names]
        made = user.at_once(installed_host, creates, timeout_s=MANY_S)
        try:
            assert [(each.status, each.text) for each in made] == [(0, f"{name}\n") for name in names], made
            rows = json.loads(user.banger(installed_host, "vm", "list", "--json").text)
            assert {row["name"]: row["state"] for row in rows} == dict.fromkeys(names, "running")
            addresses = {row["name"]: row["address"] for row in rows}
            assert len(set(addresses.values())) == VMS
            assert len({row["image_id"] for row in rows}) == 1
            ask = [("vm", "exec", name, "--", "sh", "-c", WHO) for name in names]
            told = user.at_once(installed_host, ask, timeout_s=MANY_S)
            assert [each.text.split() for each in told] == [[name, addresses[name]] for name in names], told
        finally:
            user.banger(installed_host, "vm", "delete", *names, check=False, timeout_s=MANY_S)
    assert json.loads(user.banger(installed_host, "vm", "list", "--json").text) == []
    assert user.leftovers(installed_host) == ""


def test_commands_at_once_keep_their_outputs_and_statuses_apart(web: Lab) -> None:
    script = "printf '%0200000d\\n' $0; echo err $0 >&2; exit $0"
    commands = [("vm", "exec", "web", "--", "sh", "-c", script, str(number)) for number in range(COMMANDS)]
    for number, ended in enumerate(user.at_once(web, commands, timeout_s=MANY_S)):
        assert ended.status == number, ended.error_text
        assert ended.text == f"{number:0200000d}\n"
        assert ended.error_text == f"err {number}\n"


@pytest.mark.long
def test_a_lot_goes_in_and_comes_out_unchanged(web: Lab) -> None:
    """256 MiB take minutes here; tests/contract has them natively, through the same agent."""
    _shell(web, f"head -c 32M /dev/urandom > {BLOB}")
    wanted = _shell(web, f"sha256sum < {BLOB}")
    guest = "'tee /root/blob | sha256sum'"
    assert _shell(web, f"banger vm exec web -- sh -c {guest} < {BLOB}") == wanted
    assert _shell(web, "banger vm exec web -- cat /root/blob | sha256sum") == wanted
    _shell(web, f"rm {BLOB}")


def _shell(host: Lab, script: str) -> str:
    return host.run(["sh", "-c", script], user=user.NAME, timeout_s=MANY_S).text
