# SPDX-License-Identifier: MIT
"""A daemon that was taken over asks the helper whatever it likes: nothing outside banger's own changes.

Every operation, every field, a corpus of hostile values; and thousands of requests that are well formed and
make no sense. A watcher holds what is others' on this host beside what it was before.

`BANGER_ADVERSARY_SEQUENCES` says how many sequences of some dozens of those are played,
`BANGER_ADVERSARY_SEED` repeats them; the seed is printed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import msgspec
import pytest
from hypothesis import strategies as st

from banger.contract import names, privileged
from banger.helper import server
from banger.helper.linux import loop
from tests.root import helper_world
from tests.root.helper_world import HelperWorld

SEQUENCES = int(os.environ.get("BANGER_ADVERSARY_SEQUENCES", "320"))
SEED = int(os.environ.get("BANGER_ADVERSARY_SEED") or random.SystemRandom().randrange(10**6))
OTHERS = f"others-{os.getpid()}"
BYSTANDER = 600_000 + os.getpid() % 100_000
HOSTILE: tuple[Any, ...] = (
    "", "..", ".", "/", "../../../../etc/passwd", "/etc/shadow", "a/b", "/dev/sda1", "/proc/1/root", "lo",
    "eth0", "br0", "docker0", "$(reboot)", "; reboot", "`reboot`", "%n%n", "-rf", "--help", "\n",
    "0123456789ab\n", "\n0123456789ab", "0123456789ab\x00", "0123456789AB",
    "0123456789a", "0123456789abc", " 0123456789ab",
    "\uff10123456789ab", "\u202e0123456789ab", "\U0001f4a5", "x" * 2000, "x" * 60_000, "\x1b[2J",
    True, None, -1, 2**31, 2**63, 2**64, 1.5, 1e308, -0.0, [], {}, [[]], ["lo"], {"op": "tear_down"},
    {"vm_id": "0123456789ab"}, [None], "0", "1", "1e3", "0x1",
)  # fmt: skip
GOOD: dict[str, Any] = {
    "vm_id": helper_world.VM,
    "image_id": helper_world.IMAGE,
    "kernel_id": helper_world.KERNEL,
    "slot": 7,
    "addresses": ["192.0.2.1"],
    "ttl_s": 60,
    "initrd": False,
    "vcpus": 1,
    "memory_mib": 128,
    "boot_args": "quiet",
}
FREE = {"boot_args", "peers"}
"""Fields in which some of these texts are what they say: no path, name or argument of root's."""
SKIPPED = {"route_resolver", "unroute_resolver"}
"""They would reach this machine's own resolver; neither has a field."""


def _operations() -> list[tuple[str, tuple[msgspec.structs.FieldInfo, ...]]]:
    kinds = [each for each in privileged.REQUEST_TYPES if each.__struct_config__.tag not in SKIPPED]
    return [(str(kind.__struct_config__.tag), msgspec.structs.fields(kind)) for kind in kinds]


OPERATIONS = _operations()


def _body(tag: str, fields: tuple[msgspec.structs.FieldInfo, ...]) -> dict[str, Any]:
    return {"op": tag} | {field.name: GOOD[field.name] for field in fields if field.required}


class Peer:
    """Both ends in one thread, so that a request costs a fraction of a millisecond. Nothing is patched."""

    def __init__(self, world: HelperWorld) -> None:
        self.policy = world.policy

    def ask(self, request: object) -> privileged.Reply:
        return self.send(json.dumps({"request": request}).encode("utf-8", "surrogatepass"))

    def send(self, data: bytes) -> privileged.Reply:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(20)
            sender = threading.Thread(target=self._deliver, args=(ours, data))
            sender.start()
            server.exchange(self.policy, theirs)
            sender.join()
            theirs.close()
            answer = b"".join(iter(lambda: ours.recv(65536), b""))
        return msgspec.json.decode(answer[4:], type=privileged.Reply)

    @staticmethod
    def _deliver(ours: socket.socket, data: bytes) -> None:
        """A thread of its own: a socket's buffer may be smaller than what is sent."""
        ours.sendall(struct.pack("!I", len(data)) + data)
        ours.shutdown(socket.SHUT_WR)


@dataclass(frozen=True)
class Watcher:
    """Everything that is others', or root's own: files, device nodes, links, what the kernel is told of
    them, packet rules, a process, a loop device, mounts.
    """

    canary: Path
    kept: tuple[Path, ...]
    """Directories of the helper's own in which it only reads; and cgroups that are not its own."""
    process: subprocess.Popen[bytes]
    device: int

    def look(self) -> dict[str, Any]:
        files = {}
        watched = [path for top in (self.canary, *self.kept) for path in (top, *top.rglob("*"))]
        for path in sorted([*watched, Path("/etc/passwd"), Path("/etc/hosts")]):
            found = path.lstat()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            what = (
                found.st_mode,
                found.st_uid,
                found.st_gid,
                found.st_ino,
                found.st_nlink,
                found.st_ctime_ns,
            )
            files[str(path)] = (*what, content)
        links = json.loads(_said("ip", "-j", "-d", "address"))
        # Ours come and go; counters and what names a bridge's own timers too.
        foreign = [
            {
                key: link.get(key)
                for key in ("ifname", "address", "flags", "mtu", "master", "ifalias", "addr_info")
            }
            for link in links
            if not link.get("ifalias", "").startswith("banger/")
        ]
        return {
            "files": files,
            "links": foreign,
            "rules": _foreign_rules(),
            "settings": _settings(),
            "nodes": _nodes(),
            "process": self.process.poll(),
            "loop": [each for each in loop.scan(OTHERS) if each.label == OTHERS],
            "mounts": _mounts(self.canary),
            "processes": _strangers(),
        }


def _foreign_rules() -> list[str]:
    """Every table but ours, with all that is in it."""
    tables = [line.split()[1:] for line in _said("nft", "list", "tables").splitlines()]
    return [_said("nft", "list", "table", *each) for each in tables if not each[1].startswith("banger")]


def _settings() -> dict[str, str]:
    """What the kernel is told of the network and of links that are not ours."""
    top, found = Path("/proc/sys/net"), {}
    for family in ("ipv4", "ipv6"):
        places = [top / family / "conf" / link for link in ("all", "default", "lo", "br0", "tap-others")]
        paths = [path for place in places for path in place.iterdir()]
        paths += [top / "ipv4/ip_forward", *top.glob("bridge/*"), *top.glob("netfilter/nf_conntrack_max")]
        for path in paths:
            with contextlib.suppress(OSError):  # some are written only
                found[str(path)] = path.read_text()
    return found


def _nodes() -> dict[str, tuple[int, ...]]:
    """Device nodes; who tests at the same time makes and removes loops."""
    found: dict[str, tuple[int, ...]] = {}
    for path in (*Path("/dev").iterdir(), *Path("/dev/mapper").glob("*"), *Path("/sys/block").glob("dm-*")):
        if not path.name.startswith("loop"):
            status = path.lstat()
            found[str(path)] = (status.st_mode, status.st_uid, status.st_gid, status.st_rdev)
    return found


def _strangers() -> set[int]:
    """Processes of a uid that is nobody's but this test's."""
    entries = [entry for entry in os.scandir("/proc") if entry.name.isdecimal()]
    return {int(entry.name) for entry in entries if _uid(entry.path) == BYSTANDER}


def _mounts(canary: Path) -> list[str]:
    """Other tests mount in temporary directories of their own."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    places = [(line, line.split()[1]) for line in lines]
    return [line for line, place in places if not place.startswith("/tmp/") or str(canary) in place]


def _uid(path: str) -> int:
    try:
        return os.stat(path).st_uid
    except FileNotFoundError:
        return -1


def _said(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=20).stdout


@pytest.fixture
def peer(helper_world_here: HelperWorld, own_network: None) -> Peer:
    """The helper of a host with an image, a kernel and disks, in a network of its own."""
    world = helper_world_here
    for path in (
        f"images/{helper_world.IMAGE}/rootfs.ext4",
        f"kernels/{helper_world.KERNEL}/vmlinux",
        f"vms/{GOOD['vm_id']}/overlay.cow",
    ):
        world.owned(path)
    return Peer(world)


@pytest.fixture
def watcher(peer: Peer, tmp_path: Path) -> Iterator[Watcher]:
    canary = tmp_path / "canary"
    (canary / "deep").mkdir(parents=True)
    (canary / "file").write_text("not yours")
    (canary / "deep" / "secret").write_text("nor this")
    (canary / "link").symlink_to("file")
    _said("ip", "link", "add", "br0", "type", "bridge")
    _said("ip", "address", "add", "198.51.100.1/24", "dev", "br0")
    _said("ip", "link", "add", "tap-others", "type", "bridge")
    _said("nft", "add table inet others; add chain inet others c { type filter hook input priority 0; }")
    backing = tmp_path / "disk"
    backing.write_bytes(bytes(1 << 20))
    fd = os.open(backing, os.O_RDWR)
    policy = peer.policy
    cgroup = Path(policy.cgroup_mount, "others.slice", "service")
    cgroup.mkdir(parents=True)
    (cgroup / "cgroup.procs").write_text("1\n")
    kept = (cgroup.parent, Path(policy.guest_dir))
    process = subprocess.Popen(["sleep", "600"], user=BYSTANDER, group=BYSTANDER, extra_groups=[])
    device = loop.attach(fd, OTHERS, flags=loop.LO_FLAGS_AUTOCLEAR)
    try:
        yield Watcher(canary, kept, process, device)
    finally:
        os.close(device)
        os.close(fd)
        process.kill()
        process.wait()


@pytest.mark.parametrize(("tag", "fields"), OPERATIONS, ids=[tag for tag, _ in OPERATIONS])
def test_every_field_of_every_operation_refuses_what_is_hostile(
    peer: Peer, watcher: Watcher, tag: str, fields: tuple[msgspec.structs.FieldInfo, ...]
) -> None:
    before = watcher.look()
    body = _body(tag, fields)
    for field in fields:
        for value in HOSTILE:
            reply = peer.ask(body | {field.name: value})
            if _fits(tag, body | {field.name: value}):
                assert field.name in FREE or type(value) is bool or value == [], (field.name, value)
                continue
            assert reply.error is not None, (field.name, value)
            assert reply.error.code == "bad_request", (field.name, value, reply.error)
    for name in ("path", "argv", "device", "interface", "pid", "__class__", "op_id", "sudo"):
        for value in ("/etc/passwd", 1, ["sh"]):
            reply = peer.ask(body | {name: value})
            assert reply.error is not None, (name, value)
            assert reply.error.code == "bad_request", (name, value)
    assert watcher.look() == before


def _fits(tag: str, body: dict[str, Any]) -> bool:
    """What the types admit is a request like another; the next test is about those."""
    kind = next(each for each in privileged.REQUEST_TYPES if each.__struct_config__.tag == tag)
    try:
        msgspec.convert(body, kind)
    except msgspec.ValidationError:
        return False
    return True


@pytest.mark.parametrize("depth", [100, 5_000])
def test_nothing_nested_is_followed(peer: Peer, watcher: Watcher, depth: int) -> None:
    before = watcher.look()
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        text = f'{{"request": {{"op": "tear_down", "vm_id": {opening * depth}1{closing * depth}}}}}'
        reply = peer.send(text.encode())
        assert reply.error is not None
        assert reply.error.code == "bad_request"
    assert watcher.look() == before


# --- requests that are well formed ---

IDS = st.sampled_from([GOOD["vm_id"], helper_world.OTHER_VM, helper_world.IMAGE, "0" * 12, "f" * 12])
ADDRESSES = st.sampled_from(
    ["192.0.2.1", "127.0.0.1", "169.254.169.254", "0.0.0.0", "255.255.255.255", "999.1.1.1", "224.0.0.1"]  # noqa: S104
)
NETWORKS = st.sampled_from(
    ["10.0.0.0/8", "0.0.0.0/0", "127.0.0.0/8", "10.1.1.1/8", "300.0.0.0/8", "1.2.3.4/99", "192.0.2.0/24"]
)
PORTS = st.sampled_from([0, 1, 53, 65535])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "vm_id": IDS,
    "image_id": IDS,
    "kernel_id": IDS,
    "slot": st.one_of(st.integers(1, names.MAX_SLOTS), st.sampled_from([1, 7, names.MAX_SLOTS])),
    "addresses": st.lists(ADDRESSES, min_size=1, max_size=4),
    "ttl_s": st.sampled_from([1, 60, 86400]),
    "port": PORTS,
    "allow": st.lists(st.fixed_dictionaries({"cidr": NETWORKS, "port": PORTS}), max_size=5),
    "egress": st.sampled_from(["none", "internet", "all"]),
    "peers": st.sampled_from(["", "team", "lo", "br0", "others", "a" * 63]),
    "vcpus": st.sampled_from([1, 32]),
    "memory_mib": st.sampled_from([64, 1024 * 1024]),
    "boot_args": st.sampled_from(
        ["quiet", "init=/bin/sh", "root=/dev/sda1", "../../etc", "$(reboot)", "-c"]
    ),
}


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Any operation with fields that its types admit: what a daemon that was taken over would send."""
    tag, fields = draw(st.sampled_from([each for each in OPERATIONS if each[0] != "list_world"]))
    chosen = [field for field in fields if field.required or draw(st.booleans())]
    return {"op": tag} | {field.name: draw(FIELDS.get(field.name, st.booleans())) for field in chosen}


@pytest.mark.timeout(60 + SEQUENCES)
def test_no_sequence_of_well_formed_requests_reaches_beyond_what_is_banger_s(
    peer: Peer, watcher: Watcher
) -> None:
    before = watcher.look()
    outcomes: dict[str, int] = {}

    print(f"seed {SEED}, {SEQUENCES} sequences")

    @hypothesis.seed(SEED)
    @hypothesis.settings(max_examples=SEQUENCES, database=None)
    @hypothesis.given(st.lists(requests(), min_size=20, max_size=60))
    def play(sequence: list[dict[str, Any]]) -> None:
        for request in sequence:
            reply = peer.ask(request)
            code = reply.error.code if reply.error is not None else "done"
            outcomes[code] = outcomes.get(code, 0) + 1

    play()
    for vm_id in (GOOD["vm_id"], helper_world.OTHER_VM, helper_world.IMAGE, "0" * 12, "f" * 12):
        assert peer.ask({"op": "tear_down", "vm_id": vm_id}).error is None
        assert peer.ask({"op": "purge_logs", "vm_id": vm_id}).error is None
    assert peer.ask({"op": "delete_bridge"}).error is None
    assert watcher.look() == before
    assert sum(outcomes.values()) >= 10_000 * SEQUENCES // 320, outcomes
    assert {"done", "conflict", "not_found", "bad_request"} <= outcomes.keys(), outcomes
    print(outcomes)
