# SPDX-License-Identifier: MIT
"""What root tells the host's resolver, by a stand-in for resolvectl; the lab asks the real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from banger.contract import errors, privileged
from banger.helper import operations, program, resolver
from tests.root import helper_world

ROUTE, UNROUTE = privileged.RouteResolver(), privileged.UnrouteResolver()


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What resolvectl was told, a call a line. A line in the file `fail` names a call to be refused."""
    log, tool, running = tmp_path / "told", tmp_path / "bin" / "resolvectl", tmp_path / "running"
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\n[ "$1" = "$(cat {tmp_path}/fail 2>/dev/null)" ] || exit 0\n'
        "echo not today >&2; exit 1\n"
    )
    tool.chmod(0o755)
    running.touch()
    monkeypatch.setitem(program.ENVIRONMENT, "PATH", f"{tool.parent}:/usr/bin:/bin")
    monkeypatch.setattr(resolver, "RUNNING", str(running))
    return log


def run(
    world: helper_world.HelperWorld, request: privileged.Request[privileged.ResultT]
) -> privileged.ResultT:
    return operations.execute(world.policy, request)


def test_our_link_our_server_and_our_domains_alone(
    helper_world_here: helper_world.HelperWorld, own_network: None, told: Path
) -> None:
    run(helper_world_here, privileged.EnsureBridge())
    assert run(helper_world_here, ROUTE) == privileged.Routed()
    calls = [line.split() for line in told.read_text().splitlines()]
    assert {call[1] for call in calls} == {helper_world_here.policy.bridge}
    assert calls[0] == ["dns", "br-fc", "127.0.0.1:42069"]
    assert calls[1][:4] == ["domain", "br-fc", "~vm", "~240.213.10.in-addr.arpa"]
    assert len(calls[1]) == 3 + 16 + 1, "the names, sixteen /24 and the IPv6 prefix"
    assert {tuple(call[2:]) for call in calls[2:]} == {("no",)}
    told.unlink()
    run(helper_world_here, UNROUTE)
    assert told.read_text() == "revert br-fc\n"


def test_without_our_bridge_nothing_is_told(
    helper_world_here: helper_world.HelperWorld, own_network: None, told: Path
) -> None:
    with pytest.raises(errors.NotFoundError, match="br-fc"):
        run(helper_world_here, ROUTE)
    run(helper_world_here, UNROUTE)
    assert not told.exists()


def test_a_bridge_of_another_is_left_alone(
    helper_world_here: helper_world.HelperWorld, own_network: None, told: Path
) -> None:
    from banger.helper.linux import netlink

    netlink.add_bridge("br-fc", alias="somebody's", mac=bytes.fromhex("02fc00000009"))
    with pytest.raises(errors.ConflictError, match="not banger's"):
        run(helper_world_here, ROUTE)
    with pytest.raises(errors.ConflictError, match="not banger's"):
        run(helper_world_here, UNROUTE)
    assert not told.exists()


def test_a_half_told_resolver_is_told_nothing(
    helper_world_here: helper_world.HelperWorld, own_network: None, told: Path
) -> None:
    (told.parent / "fail").write_text("dnssec")
    run(helper_world_here, privileged.EnsureBridge())
    with pytest.raises(errors.OperationFailedError, match="dnssec failed: not today"):
        run(helper_world_here, ROUTE)
    assert told.read_text().splitlines()[-1] == "revert br-fc"


def test_a_host_without_resolved_is_said_so(
    helper_world_here: helper_world.HelperWorld,
    own_network: None,
    told: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(resolver, "RUNNING", str(tmp_path / "absent"))
    run(helper_world_here, privileged.EnsureBridge())
    assert "systemd-resolved" in run(helper_world_here, ROUTE).problem
    run(helper_world_here, UNROUTE)
    assert not told.exists()
