# SPDX-License-Identifier: MIT
"""Names and ssh for real: resolved, OpenSSH, scp, sftp, rsync and git, on an installed host with a guest."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from lab import command
from lab.session import Lab
from tests.lab import user

pytestmark = pytest.mark.timeout(600)

HOME = f"/home/{user.NAME}"
HOST_KEYS = "/var/lib/banger/ssh/hosts"


@pytest.fixture(scope="module")
def web(installed_host: Lab) -> Iterator[Lab]:
    """A VM named web, and ssh-config installed for the owner; both are gone afterwards."""
    user.banger(
        installed_host, "vm", "create", "web", *user.ONE_CPU, "--memory", "256M", "--disk-size", "256M"
    )
    user.banger(installed_host, "ssh-config", "--install")
    yield installed_host
    user.banger(installed_host, "ssh-config", "--uninstall", check=False)
    user.banger(installed_host, "vm", "delete", "web", check=False)


@pytest.fixture(scope="module")
def hidden(installed_host: Lab) -> Iterator[Lab]:
    """A VM without network."""
    words = ("--no-network", *user.ONE_CPU, "--memory", "256M", "--disk-size", "128M")
    user.banger(installed_host, "vm", "create", "hidden", *words)
    yield installed_host
    user.banger(installed_host, "vm", "delete", "hidden", check=False)


def run(host: Lab, *argv: str, check: bool = True) -> command.Result:
    """As the owner, at home."""
    return host.run(["env", "-C", HOME, *argv], user=user.NAME, check=check, timeout_s=120)


def test_the_host_asks_us_for_names_of_vms(web: Lab) -> None:
    status = json.loads(user.banger(web, "system", "status", "--json").text)["dns"]
    assert (status["routed"], status["problem"]) == (True, "")
    address = user.shown(web, "web")["address"]
    assert address in web.run(["resolvectl", "query", "--legend=no", "web.vm"]).text
    assert "web.vm" in web.run(["resolvectl", "query", "--legend=no", address]).text
    assert web.run(["getent", "ahostsv4", "api.web.vm"]).text.startswith(address)
    assert web.run(["getent", "hosts", "nobody.vm"], check=False).status == 2
    link = web.run(["resolvectl", "status", "br-fc"]).text
    assert "127.0.0.1:42069" in link
    assert "-DefaultRoute" in link


def test_names_are_taken_back_and_come_again_with_the_daemon(web: Lab) -> None:
    web.run(["systemctl", "stop", "bangerd"])
    assert "42069" not in web.run(["resolvectl", "status", "br-fc"]).text
    web.run(["systemctl", "start", "bangerd"])
    address = user.shown(web, "web")["address"]
    assert web.run(["getent", "ahostsv4", "web.vm"]).text.startswith(address)


def test_a_guest_asks_us_for_its_own_name(web: Lab) -> None:
    seen = user.banger(web, "vm", "exec", "web", "--", "getent", "ahostsv4", "web.vm").text
    assert user.shown(web, "web")["address"] in seen


def test_vm_ssh_gives_the_command_s_output_and_status(web: Lab) -> None:
    result = user.banger(
        web, "vm", "ssh", "web", "-q", "sh", "-c", "id -u; echo 'a  b'; exit 7", check=False
    )
    assert (result.status, result.text) == (7, "0\na  b\n"), result.error_text


def test_openssh_its_friends_and_git(web: Lab) -> None:
    run(
        web,
        "sh",
        "-c",
        "head -c 3000000 /dev/urandom > big; mkdir -p tree/sub; cp big tree/sub/; ln -sf sub/big tree/l",
    )
    assert run(web, "ssh", "web.vm", "hostname").text == "web\n"
    run(web, "scp", "-q", "big", "web.vm:/root/big")
    run(web, "scp", "-q", "web.vm:/root/big", "back")
    run(web, "cmp", "big", "back")
    run(web, "sh", "-c", "echo 'put big by-sftp' | sftp -q -b - web.vm")
    run(web, "rsync", "-a", "tree/", "web.vm:/root/tree/")
    sums = run(web, "ssh", "web.vm", "sha256sum big by-sftp tree/sub/big tree/l").text.split()[::2]
    assert len(set(sums)) == 1
    make = (
        "git init -q repo && cd repo && git -c user.name=n -c user.email=e commit -q --allow-empty -m first"
    )
    run(web, "ssh", "web.vm", make)
    run(web, "git", "clone", "-q", "ssh://web.vm/root/repo", "cloned")
    assert run(web, "git", "-C", "cloned", "log", "--format=%s").text == "first\n"


def test_a_port_of_the_guest_s_loopback(web: Lab) -> None:
    """As the page about the network has it, of its own ssh server."""
    script = """
    ssh -N -L 18022:127.0.0.1:22 web.vm & through=$!
    until exec 3<>/dev/tcp/127.0.0.1/18022; do kill -0 $through || exit 1; sleep 0.1; done 2>/dev/null
    head -c 8 <&3
    kill $through
    """
    assert run(web, "bash", "-c", script).text == "SSH-2.0-"


def test_passwords_are_refused(web: Lab) -> None:
    words = ("-o", "PubkeyAuthentication=no", "-o", "PreferredAuthentications=password")
    result = run(web, "ssh", "-o", "BatchMode=yes", *words, "web.vm", "true", check=False)
    assert result.status == 255
    assert "Permission denied (publickey)" in result.error_text


def test_a_guest_without_network_is_reached_all_the_same(hidden: Lab) -> None:
    assert user.banger(hidden, "vm", "ssh", "hidden", "--", "hostname").text == "hidden\n"
    assert hidden.run(["getent", "hosts", "hidden.vm"], check=False).status == 2


def test_without_an_ssh_server_the_error_says_what_else_there_is(hidden: Lab) -> None:
    stop = "systemctl stop ssh.socket ssh.service"
    user.banger(hidden, "vm", "exec", "hidden", "--", "sh", "-c", stop)
    result = user.banger(hidden, "vm", "ssh", "hidden", "--", "true", check=False)
    assert result.status == 255
    assert "no ssh server listens in hidden" in result.error_text
    assert "banger vm exec hidden" in result.error_text


def test_a_guest_that_shuts_itself_down_is_stopped(hidden: Lab) -> None:
    """By systemd. The last one of this VM."""
    user.banger(hidden, "vm", "exec", "hidden", "--", "systemctl", "poweroff", check=False)
    row = user.ended(hidden, "hidden")
    assert (row["state"], row["last_error"]) == ("stopped", None)


@pytest.mark.long
def test_a_new_vm_of_an_old_name_is_no_stranger(web: Lab) -> None:
    """The last one: it deletes the VM."""
    run(web, "ssh", "web.vm", "true")
    pinned = web.run(["cat", f"{HOST_KEYS}/web.vm"]).text
    user.banger(web, "vm", "delete", "web")
    assert "web.vm" not in web.run(["ls", HOST_KEYS]).text.split()
    assert web.run(["getent", "hosts", "web.vm"], check=False).status == 2
    user.banger(web, "vm", "create", "web", *user.ONE_CPU, "--memory", "256M", "--disk-size", "64M")
    assert run(web, "ssh", "web.vm", "hostname").text == "web\n"
    assert web.run(["cat", f"{HOST_KEYS}/web.vm"]).text != pinned
