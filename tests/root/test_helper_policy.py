# SPDX-License-Identifier: MIT
"""install.toml and the runtime are believed only when root alone could have written them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from banger.contract import errors, names
from banger.helper import policy as policies
from tests.root.helper_world import STRANGER, HelperWorld

GOOD = f"""
owner_uid = 1000
owner_gid = 1000
owner_name = "dev"
uid_base = {names.UID_BASE}
uid_count = 4000
bridge = "br-fc"
network = "{names.NETWORK}"
state_dir = "/var/lib/banger"
helper_dir = "/var/lib/banger-root"
firecracker_sha256 = "{"a" * 64}"
jailer_sha256 = "{"b" * 64}"
"""


@pytest.fixture
def file(helper_world_here: HelperWorld) -> Path:
    path = helper_world_here.root / "install.toml"
    path.write_text(GOOD)
    path.chmod(0o644)
    return path


def test_installed_policy_is_read(file: Path) -> None:
    policy = policies.load(file)
    assert policy.uid(1) == names.UID_BASE + 1
    assert policy.is_vm_uid(names.UID_BASE + 4000)
    assert not policy.is_vm_uid(names.UID_BASE)
    assert not policy.is_vm_uid(1000)
    assert policy.firecracker == "/var/lib/banger-root/runtime/firecracker"


@pytest.mark.parametrize(
    "flaw", ["owner", "group-writable", "world-writable", "link", "directory", "open directory", "fifo"]
)
def test_file_that_others_may_have_written_is_refused(file: Path, flaw: str) -> None:
    if flaw == "owner":
        os.chown(file, STRANGER, 0)
    elif flaw == "group-writable":
        file.chmod(0o664)
    elif flaw == "world-writable":
        file.chmod(0o646)
    elif flaw == "directory":
        os.chown(file.parent, STRANGER, 0)
    elif flaw == "open directory":
        file.parent.chmod(0o777)
    else:
        moved = file.with_name("moved")
        file.rename(moved)
        if flaw == "link":
            file.symlink_to(moved)
        else:
            os.mkfifo(file)
    with pytest.raises((errors.UnauthorizedError, OSError)):
        policies.load(file)


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("uid_base = ", "uid_base = 1000"),
        ("uid_count = ", "uid_count = 100000"),
        ("bridge = ", 'bridge = "eth0; rm -rf"'),
        ("network = ", 'network = "10.0.0.0/29"'),
        ("network = ", 'network = "10.0.0.1/20"'),
        ("network = ", 'network = "fd00::/64"'),
        ("state_dir = ", 'state_dir = "relative"'),
        ("jailer_sha256 = ", 'jailer_sha256 = "none"'),
        ("owner_name = ", 'surprise = "x"'),
        ("owner_uid = ", "owner_uid = -1"),
    ],
)
def test_nonsense_is_refused(file: Path, line: str, bad: str) -> None:
    lines = [bad if each.startswith(line) else each for each in GOOD.splitlines()]
    file.write_text("\n".join(lines))
    with pytest.raises(errors.BadRequestError):
        policies.load(file)


def test_pinned_file_must_be_that_very_file(helper_world_here: HelperWorld) -> None:
    program = helper_world_here.root / "program"
    with pytest.raises(errors.MissingToolError):
        policies.require_pinned(str(program), "0" * 64)
    program.write_bytes(b"one")
    program.chmod(0o755)
    sha256 = hashlib.sha256(b"one").hexdigest()
    policies.require_pinned(str(program), sha256)
    policies.require_pinned(str(program), sha256)
    program.write_bytes(b"two")
    with pytest.raises(errors.UnauthorizedError):
        policies.require_pinned(str(program), sha256)
    program.write_bytes(b"one")
    os.chown(program, STRANGER, 0)
    with pytest.raises(errors.UnauthorizedError):
        policies.require_pinned(str(program), sha256)


def test_network_of_the_default_holds_every_slot() -> None:
    import ipaddress

    network = ipaddress.IPv4Network(names.NETWORK)
    assert str(names.guest_address(network, names.MAX_SLOTS)) == "10.213.255.161"
