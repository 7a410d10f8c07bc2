# SPDX-License-Identifier: MIT
"""Debian's own ufw and firewalld in a test's network, each with a copy of its configuration."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from tests.root import firewalls, network_world

_OURS: Final = ("inet banger", "bridge banger")
# In a mount namespace of each command's own: the configuration of the machine stays what it is.
_UFW: Final = """\
mount --bind "$0/ufw" /etc/ufw
mount --bind "$0/default" /etc/default/ufw
[ -z "$LEGACY" ] || mount --bind /usr/sbin/xtables-legacy-multi /usr/sbin/xtables-nft-multi
exec ufw "$@"
"""
_BUS: Final = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_destination="*"/><allow eavesdrop="true"/>
  </policy>
</busconfig>
"""


class Firewall(Protocol):
    """A program that makes this network's rules, and takes them away."""

    def start(self) -> None: ...

    def reload(self) -> None: ...

    def stop(self) -> None: ...


class Ufw:
    """Set up once, switched on and off: as it is on a host."""

    def __init__(self, directory: Path, *, legacy: bool) -> None:
        self._directory = directory
        self._environment = {**os.environ, "LEGACY": "yes" if legacy else ""}
        shutil.copytree("/etc/ufw", directory / "ufw")
        shutil.copy("/etc/default/ufw", directory / "default")
        self._ufw("allow", "22/tcp")

    def start(self) -> None:
        self._ufw("--force", "enable")

    def reload(self) -> None:
        self._ufw("reload")

    def stop(self) -> None:
        self._ufw("disable")

    def _ufw(self, *words: str) -> None:
        argv = ["unshare", "--mount", "sh", "-ec", _UFW, str(self._directory), *words]
        done = subprocess.run(argv, env=self._environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (words, done.stdout, done.stderr)


class Firewalld:
    """With a bus of its own, on which nobody else is."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        socket = directory / "bus"
        (directory / "bus.conf").write_text(_BUS.format(socket=socket))
        shutil.copytree("/etc/firewalld", directory / "firewalld")
        self._environment = {**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={socket}"}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._run(
            "dbus-daemon", "--config-file", str(self._directory / "bus.conf"), "--nofork", "--nopidfile"
        )
        network_world.until((self._directory / "bus").exists, "the bus did not come up")
        settings = str(self._directory / "firewalld")
        self._run("firewalld", "--nofork", "--nopid", "--log-target=console", "--system-config", settings)
        network_world.until(self._is_running, "firewalld did not come up")

    def reload(self) -> None:
        done = self._command("--reload")
        assert done.returncode == 0, done.stderr

    def stop(self) -> None:
        """The firewall first: it says good-bye on the bus."""
        while self._daemons:
            daemon = self._daemons.pop()
            daemon.terminate()
            daemon.wait(timeout=30)

    def _run(self, *argv: str) -> None:
        self._daemons.append(
            subprocess.Popen(
                argv, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )

    def _is_running(self) -> bool:
        return self._command("--state").returncode == 0

    def _command(self, option: str) -> subprocess.CompletedProcess[str]:
        argv = ["firewall-cmd", option]
        return subprocess.run(argv, env=self._environment, capture_output=True, text=True, timeout=60)


@contextlib.contextmanager
def made(name: str, directory: Path) -> Iterator[Firewall]:
    """Not started. Nothing of it runs afterwards."""
    found: Firewall = (
        Firewalld(directory) if name == "firewalld" else Ufw(directory, legacy="legacy" in name)
    )
    try:
        yield found
    finally:
        found.stop()


NAMES: Final = ("ufw", "ufw-legacy", "firewalld")


def shown() -> str:
    """All rules of this network but ours, in every form, without counters."""
    tables = [
        line.removeprefix("table ") for line in network_world.run("nft", "list", "tables").splitlines()
    ]
    listed = [
        network_world.run("nft", "-s", "list", "table", *table.split())
        for table in tables
        if table not in _OURS
    ]
    legacy = [network_world.run(f"{tool}-legacy-save") for tool in ("iptables", "ip6tables")]
    return firewalls.without_counts("".join((*listed, *legacy)))


def without_ours(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if "banger" not in line)
