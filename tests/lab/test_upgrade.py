# SPDX-License-Identifier: MIT
"""An upgrade over a running VM: a broken release is taken back, a good one stays, no guest notices."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

import banger
from banger.system import signed
from lab import cache, command, release, wheels
from lab.session import Lab
from tests import releases
from tests.lab import user

pytestmark = pytest.mark.timeout(1500, func_only=True)
BROKEN, GOOD = "999.0", "999.1"
AT = "/var/tmp/releases"
PAGE = Path(__file__).parents[2] / "docs/upgrade.md"
SOURCE = "/var/tmp/source"
LAST = "json_set(record, '$.host_boot_id', '') WHERE json_valid(record)\","
MORE = f'{LAST}\n    "CREATE TABLE later (id TEXT) STRICT",'
LISTEN = "listener = stack.enter_context(server.listening(paths.socket))"
LATER = "banger-later.service"
MIGRATES = {
    "banger/owner/migrations.py": (LAST, MORE),
    "banger/system/host.py": ("ENABLED: Final = (", f'UNITS += ("{LATER}",)\nENABLED: Final = ("{LATER}", '),
}
ADDS = {
    f"banger/_units/{LATER}": "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n"
    "[Install]\nWantedBy=multi-user.target\n"
}
"""A unit that the version which drives the upgrade does not know."""
WHERE = ("/usr/local/lib/systemd/system", "/etc/systemd/system")
FAILS = {"banger/owner/composition.py": (LISTEN, "raise OSError('no good')")}
"""After the rows were migrated and the VMs adopted: as late as it can be."""


@pytest.mark.long
def test_an_upgrade_over_a_running_vm(fresh_installed_host: Lab, tmp_path: Path) -> None:
    host = fresh_installed_host
    key = releases.key(tmp_path, "maintainer")
    host.write("/etc/banger/release-signers", releases.signer(key).encode())
    _bring(host, tmp_path, BROKEN, MIGRATES | FAILS, key)
    _bring(host, tmp_path, GOOD, MIGRATES, key)
    user.banger(host, "vm", "create", "web", *user.SMALL)
    boot = _boot_id(host)

    _upgrade_from_source(host)
    assert _boot_id(host) == boot

    failed = _upgrade(host, BROKEN)
    assert failed.status != 0
    assert "is installed as before; VMs go on running" in failed.error_text
    assert user.banger(host, "system", "status").text.count(banger.__version__) == 2
    assert host.run(["sh", "-c", "ls /usr/local/lib/banger-releases"]).text.split() == ["current"]
    assert host.run(["find", *WHERE, "-name", LATER]).text == ""
    assert _boot_id(host) == boot

    done = _upgrade(host, GOOD)
    assert done.status == 0, done.error_text
    assert user.banger(host, "system", "status").text.count(GOOD) == 2
    assert _boot_id(host) == boot
    assert user.shown(host, "web")["state"] == "running"
    assert host.run(["systemctl", "is-active", LATER]).text.strip() == "active"
    assert len(host.run(["find", *WHERE, "-name", LATER]).text.split()) == 2
    _is_trusted(host)

    older = _upgrade(host, BROKEN)
    assert older.status != 0
    assert f"banger {GOOD} is installed, and {BROKEN} is older" in older.error_text
    user.banger(host, "vm", "delete", "web")


def _upgrade_from_source(host: Lab) -> None:
    """The page's own lines, but for the one that makes the wheel; pip finds here what it would fetch."""
    block = (
        PAGE.read_text().partition("## Upgrade from source")[2].partition("```sh\n")[2].partition("```")[0]
    )
    made, *lines = block.splitlines()
    assert made == "git pull && rm -rf dist && make wheel"
    assert len(lines) == 4
    host.write("/etc/pip.conf", b"[global]\nno-index = true\nfind-links = /artefacts/wheels\n")
    host.run(["sh", "-c", f"mkdir -p {SOURCE}/requirements && ln -s /artefacts/dist {SOURCE}/dist"])
    host.run(["ln", "-s", "/artefacts/requirements.txt", f"{SOURCE}/requirements/run.txt"])
    host.run(["bash", "-e", "-c", "\n".join((f"cd {SOURCE}", *lines))], timeout_s=600)


def _bring(host: Lab, scratch: Path, version: str, changes: dict[str, tuple[str, str]], key: Path) -> None:
    """A release's directory in the lab; what it needs of others lies there already."""
    here = scratch / version
    here.mkdir()
    host.get("/artefacts/dist", scratch / f"dist-{version}")
    (source,) = (scratch / f"dist-{version}").glob("*.whl")
    own = releases.as_version(source, here, version, changes, ADDS)
    with contextlib.closing(wheels.pinned(cache.default_root())) as others:
        for wheel in others.path.glob("*.whl"):
            (here / wheel.name).symlink_to(wheel)
        release.sign(here, key)
    host.run(["sh", "-c", f"mkdir -p {AT}/{version} && cp /artefacts/wheels/*.whl {AT}/{version}/"])
    for name in (own.name, signed.LIST, signed.SIGNATURE):
        host.put(here / name, f"{AT}/{version}/{name}")


def _upgrade(host: Lab, version: str) -> command.Result:
    return host.run(["banger", "system", "upgrade", f"{AT}/{version}"], check=False, timeout_s=600)


def _boot_id(host: Lab) -> str:
    return user.banger(host, "vm", "exec", "web", "--", "cat", "/proc/sys/kernel/random/boot_id").text


def _is_trusted(host: Lab) -> None:
    """What was unpacked is root's alone and is what the units and commands lead to."""
    said = host.run(["banger", "doctor", "--timeout", "10m", "--json"], check=False, timeout_s=180).text
    rows = {row["check"]: row["status"] for row in json.loads(said)["rows"]}
    roots = ("root's code", "root's interpreter", "root's units")
    assert {rows[name] for name in (*roots, "units as shipped", "commands", "versions")} == {"pass"}
