# SPDX-License-Identifier: MIT
"""The block in ~/.ssh/config: idempotent, exact in its removal, and deaf to everything around it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.cli import ssh_config
from banger.contract import errors, reach

ACCESS = reach.SshAccess(
    identity_file="/var/lib/banger/ssh/id_ed25519",
    host_keys_dir="/var/lib/banger/ssh/hosts",
    public_key="ssh-ed25519 AAAA banger",
)
PROXY = ssh_config.proxy_command(["/usr/local/bin/banger"], "")
TEXT = ssh_config.text(ACCESS, PROXY)


def _state(home: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(home)): (
            path.lstat().st_mode,
            path.read_bytes()
            if path.is_file()
            else os.readlink(path).encode()
            if path.is_symlink()
            else b"",
        )
        for path in sorted(home.rglob("*"))
    }


def _round_trip(home: Path) -> None:
    before = _state(home)
    place = ssh_config.Install(home)
    assert place.install(TEXT)
    once = _state(home)
    assert not place.install(TEXT)
    assert _state(home) == once
    assert once != before
    assert place.uninstall()
    assert _state(home) == before
    assert not place.uninstall()


def test_a_home_without_ssh_is_as_before(tmp_path: Path) -> None:
    _round_trip(tmp_path)


def test_a_home_with_an_empty_ssh_directory_is_as_before(tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir(mode=0o700)
    _round_trip(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"Host a\n  User b", b"\xff\n", b"# >>> mine\n# <<< mine\n", b"Match all\r\n"], ids=repr
)
def test_a_config_is_as_before_to_the_byte_and_the_mode(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".ssh").mkdir()
    config = tmp_path / ".ssh" / "config"
    config.write_bytes(content)
    config.chmod(0o640)
    (tmp_path / ".ssh" / "id_rsa").write_text("the user's own")
    _round_trip(tmp_path)


@given(content=st.binary(max_size=300))
def test_any_config_survives(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    home = tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir()
    (home / ".ssh" / "config").write_bytes(content)
    _round_trip(home)


def test_what_the_user_adds_meanwhile_stays(tmp_path: Path) -> None:
    place = ssh_config.Install(tmp_path)
    place.install(TEXT)
    config = tmp_path / ".ssh" / "config"
    config.write_text("Host top\n" + config.read_text() + "Host bottom\n")
    place.uninstall()
    assert config.read_text() == "Host top\nHost bottom\n"


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / "dotfiles").mkdir()
    (tmp_path / "dotfiles" / "ssh").write_text("Host a\n")
    (tmp_path / ".ssh" / "config").symlink_to("../dotfiles/ssh")
    _round_trip(tmp_path)
    ssh_config.Install(tmp_path).install(TEXT)
    assert (tmp_path / ".ssh" / "config").is_symlink()
    assert (tmp_path / "dotfiles" / "ssh").read_text().endswith("Host a\n")


def test_a_link_to_nothing_a_pipe_and_a_file_of_two_names_are_refused(tmp_path: Path) -> None:
    config = tmp_path / ".ssh" / "config"
    config.parent.mkdir()
    config.symlink_to("nowhere")
    with pytest.raises(errors.ConflictError, match="nothing"):
        ssh_config.Install(tmp_path).install(TEXT)
    config.unlink()
    config.write_text("x")
    os.link(config, tmp_path / "second")
    with pytest.raises(errors.ConflictError, match="several names"):
        ssh_config.Install(tmp_path).install(TEXT)
    assert config.read_text() == "x"


def test_a_newer_version_replaces_our_file_only(tmp_path: Path) -> None:
    place = ssh_config.Install(tmp_path)
    place.install(TEXT)
    config = (tmp_path / ".ssh" / "config").read_bytes()
    assert place.install(TEXT + "# more\n")
    assert (tmp_path / ".ssh" / "config").read_bytes() == config
    assert (tmp_path / ".ssh" / ssh_config.FILE).read_text().endswith("# more\n")


def _asked(config: Path, host: str) -> dict[str, str]:
    done = subprocess.run(
        ["ssh", "-G", "-F", str(config), host], check=True, capture_output=True, text=True, timeout=20
    )
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


def test_openssh_reads_it_as_meant(tmp_path: Path) -> None:
    """The real client, in which a Host block of the user's before ours would swallow the Include."""
    config = tmp_path / "config"
    config.write_text(TEXT)
    asked = _asked(config, "web.vm")
    assert asked["user"] == "root"
    assert asked["identityfile"] == ACCESS.identity_file
    assert asked["userknownhostsfile"].startswith(ACCESS.host_keys_dir)
    assert asked["stricthostkeychecking"] == "accept-new"
    assert asked["proxycommand"].startswith("/usr/local/bin/banger vm proxy")
    assert asked["identitiesonly"] == "yes"
    waits = int(PROXY.partition("--wait ")[2].split()[0])
    assert waits < int(asked["connecttimeout"]) < 3600, "who says why it gives up does so first"
    for other in ("example.org", "sub.web.vm", "vm"):
        assert "proxycommand" not in _asked(config, other)


def test_a_program_in_a_strange_place_is_quoted() -> None:
    assert ssh_config.proxy_command(["/a b/100%/banger"], "/x y") == (
        "'/a b/100%%/banger' --socket '/x y' vm proxy --wait 60 -- %n"
    )
