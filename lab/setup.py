# SPDX-License-Identifier: MIT
"""Installs the Debian packages that the lab needs on this machine. Used by cli and make."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from lab import command, errors

log = logging.getLogger("lab")

PACKAGES = Path(__file__).with_name("packages.txt")
INSTALL_LIMIT_S = 900
# Debian starts a firewall that is installed; the tests run this one in networks of their own.
UNWANTED_SERVICE = ("firewalld", Path("/etc/systemd/system/firewalld.service"))


def missing() -> list[str]:
    """List the packages that are not installed."""
    return [name for name in _wanted() if not _is_installed(name)]


def install() -> None:
    """Install what is missing; as root only, and only from the sources apt is set up with."""
    names = missing()
    if not names:
        log.info("all packages that the lab needs are installed")
        return
    if os.geteuid() != 0:
        raise errors.LabError(
            f"missing packages: {' '.join(names)}", hint=f"run: sudo apt-get install {' '.join(names)}"
        )
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    log.info("reading the package lists")
    command.run(["apt-get", "-q", "update"], timeout_s=INSTALL_LIMIT_S, env=quiet)
    package, unit = UNWANTED_SERVICE
    if package in names and not unit.is_symlink():
        unit.parent.mkdir(parents=True, exist_ok=True)
        unit.symlink_to("/dev/null")  # masked
    log.info("installing %s", " ".join(names))
    argv = ["apt-get", "-q", "-y", "--no-install-recommends", "install", *names]
    command.run(argv, timeout_s=INSTALL_LIMIT_S, env=quiet)


def _wanted() -> list[str]:
    lines = (line.strip() for line in PACKAGES.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _is_installed(name: str) -> bool:
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status}", name]
    return command.run(query, timeout_s=30, check=False).text == "installed"
