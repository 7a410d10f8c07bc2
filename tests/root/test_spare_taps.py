# SPDX-License-Identifier: MIT
"""Taps made ahead, on the real kernel: each becomes what would have been made, and is nobody's before."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from banger.contract import errors, names, privileged
from banger.helper import network, operations, server, spares
from banger.helper.linux import libc, netlink
from tests.root.helper_world import OTHER_VM, STRANGER, VM, HelperWorld, network_namespace
from tests.root.test_helper_network import add_foreign, ask, ip, link_names

TAP = names.tap_name(names.VmId(VM))
CREATE = privileged.CreateTap(vm_id=VM, slot=5)
# As a VMM attaches to its tap. A jail has a node of its own; here it is passed on.
ATTACH = """
import fcntl, struct, sys
fcntl.ioctl(0, 0x400454CA, struct.pack("16sH22x", sys.argv[1].encode(), 0x5002))
"""


@pytest.fixture
def world(helper_world_here: HelperWorld) -> Iterator[HelperWorld]:
    """A host with its bridge and no spare."""
    with network_namespace():
        ask(helper_world_here, privileged.EnsureBridge())
        yield helper_world_here
        spares.drain()


def ready() -> list[netlink.Link]:
    return [link for link in netlink.links() if link.name.startswith(spares.PREFIX)]


def shown(name: str) -> dict[str, Any]:
    """All that the kernel says of the link, but for what differs with each."""
    done = subprocess.run(
        ["ip", "-d", "-j", "link", "show", name], check=True, capture_output=True, timeout=10
    )
    (link,) = json.loads(done.stdout)
    numbers = ("ifindex", "address", "port_id", "port_no", "designated_port")
    link["linkinfo"]["info_slave_data"] = {
        key: value for key, value in link["linkinfo"]["info_slave_data"].items() if key not in {"id", "no"}
    }
    return {key: value for key, value in link.items() if key not in numbers}


def taken_from_the_pool(world: HelperWorld) -> bool:
    """Whether the VM's tap is one of those that were ready before."""
    before = {link.number for link in ready()}
    ask(world, CREATE)
    tap = netlink.find(TAP)
    assert tap is not None
    assert network.is_tap_of(world.policy, tap, names.VmId(VM))
    return tap.number in before


@pytest.mark.parametrize("peers", [False, True])
def test_a_spare_becomes_what_would_have_been_made(world: HelperWorld, peers: bool) -> None:
    request = msgspec.structs.replace(CREATE, peers=peers)
    ask(world, request)
    cold = shown(TAP)
    ask(world, privileged.DeleteTap(vm_id=VM))
    network.refill(world.policy)
    before = {link.number for link in ready()}
    ask(world, request)
    tap = netlink.find(TAP)
    assert tap is not None
    assert tap.number in before
    assert shown(TAP) == cold
    assert cold["linkinfo"]["info_slave_data"]["isolated"] is not peers
    assert len(ready()) == spares.LIMIT - 1


def test_there_are_never_more_than_the_limit_however_many_refill(world: HelperWorld) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(network.refill, world.policy) for _ in range(24)]:
            done.result()
    assert len(ready()) == spares.LIMIT
    assert all(spares.is_spare(link) and not link.is_up for link in ready())


def test_nobody_can_attach_to_a_spare(world: HelperWorld) -> None:
    """It is root's, and the helper has it open."""
    network.refill(world.policy)
    for who in (0, STRANGER, world.policy.uid(5)):
        with open("/dev/net/tun", "r+b", buffering=0) as tun:
            tried = subprocess.run(
                ["/usr/bin/python3", "-c", ATTACH, ready()[0].name],
                stdin=tun,
                user=who,
                group=who,
                extra_groups=[],
                capture_output=True,
                text=True,
                timeout=30,
            )
        assert ("Device or resource busy" if who == 0 else "Operation not permitted") in tried.stderr


@pytest.mark.parametrize(
    "change",
    [
        ("link", "del", "{}"),
        ("link", "set", "{}", "nomaster"),
        ("link", "set", "{}", "alias", "mine"),
        ("link", "set", "{}", "up"),
        ("link", "set", "{}", "name", "mine{}"),
    ],
    ids=lambda change: " ".join(change),
)
def test_a_spare_that_somebody_changed_is_not_used(world: HelperWorld, change: tuple[str, ...]) -> None:
    network.refill(world.policy)
    for number, link in enumerate(ready()):
        ip(*(word.format(link.name if word == "{}" else number) for word in change))
    changed = {link.number for link in netlink.links()}
    ask(world, CREATE)
    tap = netlink.find(TAP)
    assert tap is not None
    assert tap.number not in changed
    assert link_names() == {"lo", "br-fc", TAP}
    network.refill(world.policy)
    assert len(ready()) == spares.LIMIT


def test_foreign_links_with_a_spares_name_or_label_are_left_alone(world: HelperWorld) -> None:
    """The kernel counts past names that are taken; a spare is known by the helper's descriptor of it."""
    add_foreign(f"{spares.PREFIX}0")
    ip("tuntap", "add", f"{spares.PREFIX}1", "mode", "tap", "user", "0")
    ip("link", "set", f"{spares.PREFIX}1", "alias", spares.ALIAS)
    ip("link", "set", "other", "alias", spares.ALIAS)
    foreign = {link for link in netlink.links() if link.name != "br-fc"}
    network.refill(world.policy)
    assert [link.name for link in ready()] == [f"{spares.PREFIX}{number}" for number in range(6)]
    for slot in range(1, 9):
        ask(world, privileged.CreateTap(vm_id=f"{slot:012x}"[::-1], slot=slot))
    ask(world, privileged.TearDown(vm_id=VM))
    spares.drain()
    assert foreign <= set(netlink.links())


def test_a_foreign_link_with_the_vms_name_costs_a_refusal_and_no_spare(world: HelperWorld) -> None:
    add_foreign(TAP)
    network.refill(world.policy)
    with pytest.raises(errors.ConflictError, match=TAP):
        ask(world, CREATE)
    assert len(ready()) == spares.LIMIT


def test_spares_are_listed_and_go_with_the_bridge(world: HelperWorld) -> None:
    network.refill(world.policy)
    found = operations.execute(world.policy, privileged.ListWorld())
    assert not found.vms
    listed = [other.name for other in found.others if other.kind == "tap"]
    assert sorted(listed) == [f"{spares.PREFIX}{number}" for number in range(spares.LIMIT)]
    ask(world, privileged.DeleteBridge())
    assert link_names() == {"lo"}
    network.refill(world.policy)
    assert link_names() == {"lo"}


class _Calls:
    """Every system call on links, counted; `act` comes in place of the one with that number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
        self.left = number
        self._act = act
        for module, name in ((netlink, "_request"), (libc, "ioctl")):
            monkeypatch.setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, work: Callable[..., object]) -> Callable[..., object]:
        def called(*arguments: object) -> object:
            self.left -= 1
            if self.left == 0:
                self._act()
            return work(*arguments)

        return called


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fail() -> None:
    raise OSError(errno.ENOBUFS, "no buffer space", "a link")


@pytest.mark.parametrize("warm", [True, False])
def test_a_helper_killed_between_any_two_steps_leaves_the_vms_tap_or_nothing(
    world: HelperWorld, monkeypatch: pytest.MonkeyPatch, warm: bool
) -> None:
    outcomes = []
    for number in range(1, 40):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                if warm:
                    network.refill(world.policy)
                calls = _Calls(monkeypatch, number, _die)
                ask(world, CREATE)
                os._exit(7 if calls.left > 0 else 8)
            os._exit(9)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        left = link_names() - {"lo", "br-fc"}
        tap = netlink.find(TAP)
        if tap is not None:
            assert network.is_tap_of(world.policy, tap, names.VmId(VM))
            assert tap.is_up
            ask(world, privileged.DeleteTap(vm_id=VM))
        assert left in ({TAP}, set[str]())
        outcomes.append((ended, bool(left)))
        if ended != -signal.SIGKILL:
            break
    assert outcomes[-1] == (7, True)
    assert (-signal.SIGKILL, False) in outcomes
    assert len(outcomes) > 6


def test_a_step_that_fails_leaves_nothing_and_the_next_tap_is_made(
    world: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 40):
        with contextlib.suppress(errors.BangerError, OSError), monkeypatch.context() as patched:
            calls = _Calls(patched, number, _fail)
            network.refill(world.policy)
            ask(world, CREATE)
        assert len(ready()) <= spares.LIMIT
        if calls.left <= 0:
            assert netlink.find(TAP) is None
        ask(world, CREATE)
        ask(world, privileged.DeleteTap(vm_id=VM))
        spares.drain()
        assert link_names() == {"lo", "br-fc"}
        if calls.left > 0:
            return
    pytest.fail("more calls than there should be")


def answer(world: HelperWorld, request: privileged.AnyRequest) -> privileged.Reply:
    """As a peer gets it, when the helper has done all it does in that thread."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        data = msgspec.json.encode(privileged.Envelope(request=request, op_id="op-1"))
        ours.sendall(len(data).to_bytes(4, "big") + data)
        ours.shutdown(socket.SHUT_WR)
        server.exchange(world.policy, theirs)
        return msgspec.json.decode(ours.recv(65536)[4:], type=privileged.Reply)


def test_the_helper_makes_spares_once_it_has_answered(
    world: HelperWorld, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert answer(world, privileged.EnsureBridge()).error is None
    assert len(ready()) == spares.LIMIT
    assert answer(world, CREATE).error is None
    assert len(ready()) == spares.LIMIT
    spares.drain()
    with monkeypatch.context() as patched:
        patched.setattr(netlink, "open_tap", lambda *_, **__: _fail())
        assert answer(world, privileged.EnsureBridge()).error is None
    assert "no tap could be made ahead" in capfd.readouterr().err
    assert answer(world, privileged.DeleteTap(vm_id=OTHER_VM)).error is None
    assert not ready()
