# SPDX-License-Identifier: MIT
"""What every helper must do, as data: the fake, the real one natively, and it in the lab play the same.

A case is a list of requests with how each must end. Every case begins with nothing of its VMs on the host
but their disks, and ends with a tear-down, after which nothing may be left.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from banger.contract import egress, names, privileged
from banger.contract.privileged import (
    AllowAddresses,
    AttachWorkDisk,
    CheckSnapshot,
    CreateSnapshot,
    CreateTap,
    DeleteBridge,
    DeleteGuestRules,
    DeleteJail,
    DeleteSnapshot,
    DeleteTap,
    DetachWorkDisk,
    EnsureBridge,
    FindVmm,
    GetHost,
    GrantApiSocket,
    GrantVsock,
    KillVmm,
    LaunchVmm,
    ListWorld,
    PatchRoot,
    PrepareJail,
    PurgeLogs,
    RouteResolver,
    SetGuestRules,
    TearDown,
    UnrouteResolver,
)

VM, OTHER = "c0ffee000001", "c0ffee000002"
SLOT, OTHER_SLOT = 3901, 3902
ABSENT = "dead00000000"
BOOT_ARGS = "console=ttyS0 quiet reboot=k panic=1 pci=off root=/dev/vda rw init=/.banger/guest"

Request = privileged.Request[Any]
Batch = Callable[[Sequence[Request]], list[privileged.Reply]]


class Sources(Protocol):
    """What stands on the host under test."""

    @property
    def image(self) -> str: ...

    @property
    def kernel(self) -> str: ...

    @property
    def initrd(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request; `refused` is the code it must fail with, else `gives` are fields of its result.

    For ListWorld, `gives` are fields of what is seen of VM.
    """

    request: Request
    refused: str = ""
    gives: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """`needs_machine`: device-mapper, or a VMM, which not every machine has."""

    name: str
    exchanges: tuple[Exchange, ...]
    needs_machine: bool = False

    def __str__(self) -> str:
        return self.name


def done(request: Request, **gives: object) -> Exchange:
    return Exchange(request, gives=gives)


def refused(code: str, request: Request) -> Exchange:
    return Exchange(request, refused=code)


def sees(**fields: object) -> Exchange:
    return Exchange(ListWorld(), gives=fields)


def start(sources: Sources) -> list[Request]:
    """What a start asks, in its order."""
    return [
        EnsureBridge(),
        CreateSnapshot(vm_id=VM, slot=SLOT, image_id=sources.image),
        CheckSnapshot(vm_id=VM, slot=SLOT),
        PatchRoot(vm_id=VM, slot=SLOT),
        AttachWorkDisk(vm_id=VM, slot=SLOT),
        SetGuestRules(vm_id=VM, slot=SLOT, nat=True),
        CreateTap(vm_id=VM, slot=SLOT),
        PrepareJail(vm_id=VM, slot=SLOT),
        launch(sources),
        GrantApiSocket(vm_id=VM, slot=SLOT),
        GrantVsock(vm_id=VM, slot=SLOT),
    ]


def launch(sources: Sources, *, kernel: str = "", work_disk: bool = True, tap: bool = True) -> LaunchVmm:
    return LaunchVmm(
        vm_id=VM,
        slot=SLOT,
        kernel_id=kernel or sources.kernel,
        initrd=sources.initrd,
        vcpus=1,
        memory_mib=128,
        boot_args=BOOT_ARGS,
        work_disk=work_disk,
        tap=tap,
    )


_NOTHING = {
    "snapshot": False, "loops": 0, "tap": False, "rules": False, "jail": False, "cgroup": False,
    "vmm_pid": 0,
}  # fmt: skip


def _links(sources: Sources) -> Iterator[Case]:
    tap = CreateTap(vm_id=VM, slot=SLOT)
    yield Case("the bridge is ensured twice", (done(EnsureBridge()), done(EnsureBridge())))
    yield Case("a tap needs its bridge", (done(DeleteBridge()), refused("not_found", tap), sees(tap=False)))
    yield Case(
        "a tap is made anew where it exists",
        (done(EnsureBridge()), done(tap), sees(tap=True), done(tap), sees(tap=True)),
    )
    yield Case(
        "a bridge with a tap is kept",
        (done(EnsureBridge()), done(tap), refused("conflict", DeleteBridge()), sees(tap=True)),
    )
    yield Case(
        "a tap is deleted twice",
        (done(EnsureBridge()), done(tap), *[done(DeleteTap(vm_id=VM))] * 2, sees(tap=False)),
    )


def _rules(sources: Sources) -> Iterator[Case]:
    closed, natted = SetGuestRules(vm_id=VM, slot=SLOT), SetGuestRules(vm_id=VM, slot=SLOT, nat=True)
    everything = SetGuestRules(
        vm_id=VM,
        slot=SLOT,
        nat=True,
        egress=egress.Egress.NONE,
        allow=(egress.Destination("192.0.2.0/24"), egress.Destination("192.0.2.7/32", 443)),
        peers="shop",
    )
    delete = DeleteGuestRules(vm_id=VM)
    yield Case(
        "rules need their tables", (done(DeleteBridge()), refused("not_found", closed), sees(rules=False))
    )
    yield Case(
        "rules are set again and again and deleted twice",
        (
            done(EnsureBridge()),
            *map(done, (closed, natted, everything, everything, closed)),
            sees(rules=True),
            *map(done, (delete, delete)),
            sees(**_NOTHING),
        ),
    )
    yield Case(
        "the tables are made once, and whoever has rules is told each time",
        (
            done(DeleteBridge()),
            done(EnsureBridge(), rebuilt=True, with_rules=()),
            done(natted),
            done(EnsureBridge(), rebuilt=False, with_rules=(VM,)),
            done(EnsureBridge(), rebuilt=False, with_rules=(VM,)),
            done(delete),
            done(EnsureBridge(), rebuilt=False, with_rules=()),
        ),
    )
    yield Case(
        "an address that another has now takes its old rules along",
        (
            done(EnsureBridge()),
            done(everything),
            done(SetGuestRules(vm_id=OTHER, slot=SLOT)),
            sees(rules=False),
            done(DeleteGuestRules(vm_id=OTHER)),
        ),
    )
    odd = SetGuestRules(vm_id=VM, slot=SLOT, nat=True, allow=(egress.Destination("192.0.2.1/24"),))
    yield Case(
        "a network that is none", (done(EnsureBridge()), refused("bad_request", odd), sees(rules=False))
    )
    named = AllowAddresses(vm_id=VM, slot=SLOT, addresses=("192.0.2.7",), ttl_s=60)
    yield Case(
        "a name needs NAT",
        (
            done(EnsureBridge()),
            done(closed),
            refused("conflict", named),
            done(natted),
            done(named),
            done(named),
        ),
    )
    six = SetGuestRules(vm_id=VM, slot=SLOT, nat=True, ipv6=True)
    named6 = AllowAddresses(vm_id=VM, slot=SLOT, addresses=("2001:db8::7", "192.0.2.7"), ttl_s=60)
    yield Case(
        "a name's IPv6 address needs a guest with IPv6",
        (
            done(EnsureBridge()),
            done(natted),
            refused("conflict", named6),
            done(six),
            done(named6),
            done(DeleteGuestRules(vm_id=VM)),
        ),
    )
    for address in ("127.0.0.1", "169.254.169.254", "100.100.100.200", "::1", "fe80::1", "fd00:ec2::254"):
        inside = AllowAddresses(vm_id=VM, slot=SLOT, addresses=(address,), ttl_s=60)
        yield Case(
            f"a name that stands for {address}",
            (done(EnsureBridge()), done(natted), refused("bad_request", inside)),
        )


def _disks(sources: Sources) -> Iterator[Case]:
    attach, detach = AttachWorkDisk(vm_id=VM, slot=SLOT), DetachWorkDisk(vm_id=VM)
    yield Case(
        "a work disk is attached once",
        (done(attach), sees(loops=1), refused("conflict", attach), sees(loops=1)),
    )
    yield Case("a work disk is detached twice", (done(attach), done(detach), done(detach), sees(loops=0)))
    yield Case(
        "a work disk that is not there",
        (refused("not_found", AttachWorkDisk(vm_id=ABSENT, slot=SLOT)), sees(**_NOTHING)),
    )
    snapshot = CreateSnapshot(vm_id=VM, slot=SLOT, image_id=sources.image)
    yield Case(
        "a snapshot of an image that is not there",
        (refused("not_found", CreateSnapshot(vm_id=VM, slot=SLOT, image_id=ABSENT)), sees(**_NOTHING)),
    )
    yield Case(
        "a snapshot of an overlay that is not there leaves no half",
        (
            refused("not_found", CreateSnapshot(vm_id=ABSENT, slot=SLOT, image_id=sources.image)),
            sees(**_NOTHING),
        ),
    )
    yield Case(
        "no snapshot to check or to patch",
        (
            refused("not_found", CheckSnapshot(vm_id=VM, slot=SLOT)),
            refused("not_found", PatchRoot(vm_id=VM, slot=SLOT)),
            sees(**_NOTHING),
        ),
    )
    yield Case(
        "a snapshot is made once and deleted twice",
        (
            done(snapshot),
            sees(snapshot=True, loops=2),
            refused("conflict", snapshot),
            *[done(DeleteSnapshot(vm_id=VM))] * 2,
            sees(**_NOTHING),
        ),
        needs_machine=True,
    )


def _jails(sources: Sources) -> Iterator[Case]:
    prepare = PrepareJail(vm_id=VM, slot=SLOT)
    yield Case(
        "a jail is made anew where it exists", (done(prepare), done(prepare), sees(jail=True, logs=True))
    )
    yield Case(
        "deleting a jail keeps the logs, purging takes them",
        (
            done(prepare),
            *[done(DeleteJail(vm_id=VM))] * 2,
            sees(jail=False, logs=True),
            *[done(PurgeLogs(vm_id=VM))] * 2,
            sees(logs=False),
        ),
    )
    yield Case(
        "a slot belongs to one VM",
        (
            done(prepare),
            refused("conflict", PrepareJail(vm_id=OTHER, slot=SLOT)),
            refused("conflict", PrepareJail(vm_id=VM, slot=OTHER_SLOT)),
            refused("conflict", AttachWorkDisk(vm_id=OTHER, slot=SLOT)),
            done(PrepareJail(vm_id=OTHER, slot=OTHER_SLOT)),
        ),
    )


def _machines(sources: Sources) -> Iterator[Case]:
    none = {"pid": 0}
    kill = KillVmm(vm_id=VM)
    yield Case("no VMM is found or killed", (done(FindVmm(vm_id=VM), **none), *[done(kill)] * 2))
    yield Case("a launch needs a jail", (refused("not_found", launch(sources)), sees(**_NOTHING)))
    yield Case(
        "no socket is granted without a VMM",
        (
            refused("not_running", GrantApiSocket(vm_id=VM, slot=SLOT)),
            done(PrepareJail(vm_id=VM, slot=SLOT)),
            refused("not_running", GrantVsock(vm_id=VM, slot=SLOT)),
        ),
    )
    yield from _launches(sources)
    yield Case(
        "a VMM is killed",
        (
            *map(done, start(sources)),
            done(kill),
            done(FindVmm(vm_id=VM), **none),
            done(kill),
            done(DeleteJail(vm_id=VM)),
            done(DeleteSnapshot(vm_id=VM)),
            done(DetachWorkDisk(vm_id=VM)),
            done(DeleteTap(vm_id=VM)),
            done(DeleteGuestRules(vm_id=VM)),
            sees(**_NOTHING),
        ),
        needs_machine=True,
    )
    for count, request in enumerate(start(sources), start=1):
        yield Case(
            f"a tear-down after {type(request).__name__}",
            (
                *map(done, start(sources)[:count]),
                *[done(TearDown(vm_id=VM))] * 2,
                sees(**_NOTHING),
            ),
            needs_machine=count > 1,
        )


def _launches(sources: Sources) -> Iterator[Case]:
    whole = start(sources)
    for missing in (CreateSnapshot, AttachWorkDisk, CreateTap):
        before = [
            request for request in whole[:8]
            if not isinstance(request, missing)
            and not (missing is CreateSnapshot and isinstance(request, CheckSnapshot | PatchRoot))
        ]  # fmt: skip
        yield Case(
            f"a launch needs what {missing.__name__} makes",
            (*map(done, before), refused("not_found", launch(sources)), sees(cgroup=False, vmm_pid=0)),
            needs_machine=True,
        )
    yield Case(
        "a launch needs a kernel",
        (
            *map(done, whole[:7]),
            refused("not_found", launch(sources, kernel=ABSENT)),
            sees(cgroup=False, vmm_pid=0),
        ),
        needs_machine=True,
    )
    yield Case(
        "what a VMM holds is kept from it by nobody",
        (
            *map(done, whole),
            refused("conflict", launch(sources)),
            refused("conflict", PrepareJail(vm_id=VM, slot=SLOT)),
            refused("conflict", DeleteJail(vm_id=VM)),
            refused("conflict", DeleteSnapshot(vm_id=VM)),
            refused("conflict", DetachWorkDisk(vm_id=VM)),
            sees(snapshot=True, loops=3, tap=True, jail=True, cgroup=True),
        ),
        needs_machine=True,
    )


def _hosts(sources: Sources) -> Iterator[Case]:
    yield Case("the helper says what it speaks", (done(GetHost(), protocol=privileged.PROTOCOL_VERSION),))
    deletes: list[Request] = [
        DeleteTap(vm_id=VM),
        DeleteGuestRules(vm_id=VM),
        DeleteSnapshot(vm_id=VM),
        DetachWorkDisk(vm_id=VM),
        DeleteJail(vm_id=VM),
        PurgeLogs(vm_id=VM),
        TearDown(vm_id=VM),
    ]
    yield Case("what is already gone is deleted", (*map(done, deletes), sees(**_NOTHING, logs=False)))


def _resolvers(_: Sources) -> Iterator[Case]:
    """In the lab alone: from a namespace of its own the real one would reach this machine's resolver."""
    route, unroute = RouteResolver(), UnrouteResolver()
    yield Case(
        "names are routed on the bridge, again, and taken back",
        (
            done(EnsureBridge()),
            *[done(route, problem="")] * 2,
            *map(done, (unroute, unroute, DeleteBridge(), unroute)),
            refused("not_found", route),
            done(EnsureBridge()),
        ),
        needs_machine=True,
    )


def cases(sources: Sources) -> list[Case]:
    parts = (_hosts, _resolvers, _links, _rules, _disks, _jails, _machines)
    return list(itertools.chain.from_iterable(part(sources) for part in parts))


def judge(case: Case, ask: Batch) -> None:
    """Plays a case, takes everything down, and finds nothing left."""
    tear_down = [TearDown(vm_id=vm_id) for vm_id in (VM, OTHER, ABSENT)]
    purge = [PurgeLogs(vm_id=vm_id) for vm_id in (VM, OTHER, ABSENT)]
    try:
        for exchange, reply in _played(case.exchanges, ask):
            _compare(exchange, reply)
    finally:
        replies = ask([*tear_down, *purge, ListWorld()])
    assert [reply.error for reply in replies if reply.error] == []
    left = _world(replies[-1])
    assert [vm for vm in left.vms if vm.vm_id in (VM, OTHER, ABSENT)] == []


def _played(exchanges: Sequence[Exchange], ask: Batch) -> Iterator[tuple[Exchange, privileged.Reply]]:
    """`ask` takes several requests and ends at the first error: so one batch for each refusal."""
    waiting = list(exchanges)
    while waiting:
        replies = ask([exchange.request for exchange in waiting])
        assert replies
        yield from zip(waiting, replies, strict=False)
        del waiting[: len(replies)]


def _compare(exchange: Exchange, reply: privileged.Reply) -> None:
    code = reply.error.code if reply.error else ""
    assert code == exchange.refused, (exchange.request, reply.error)
    if not exchange.gives:
        return
    result: Any = reply.result
    if isinstance(result, privileged.World):
        empty = privileged.VmWorld(vm_id=VM)
        result = next((vm for vm in result.vms if vm.vm_id == VM), empty)
    got = {name: getattr(result, name) for name in exchange.gives}
    assert got == exchange.gives, exchange.request


def _world(reply: privileged.Reply) -> privileged.World:
    assert isinstance(reply.result, privileged.World)
    return reply.result


_HOST = b'{"request":{"op":"get_host"%s}%s}'
_RULES = b'{"request":{"op":"set_guest_rules","vm_id":"c0ffee000001","slot":1,%s}}'
MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"\x00\x01",
    "another method": b'{"request":{"op":"run_shell"}}',
    "no method": b'{"request":{}}',
    "a list": b"[]",
    "a field too many in the request": _HOST % (b',"path":"/etc/shadow"', b""),
    "a field too many around it": _HOST % (b"", b',"uid":0'),
    "an op id that is none": _HOST % (b"", b',"op_id":"a b\\n"'),
    "an id that is a path": b'{"request":{"op":"tear_down","vm_id":"../../../etc"}}',
    "an id with a line feed": b'{"request":{"op":"tear_down","vm_id":"c0ffee000001\\n"}}',
    "an id that is a number": b'{"request":{"op":"tear_down","vm_id":1}}',
    "a slot of no VM": b'{"request":{"op":"create_tap","vm_id":"c0ffee000001","slot":0}}',
    "a slot too high": b'{"request":{"op":"create_tap","vm_id":"c0ffee000001","slot":%d}}'
    % (names.MAX_SLOTS + 1),
    "a slot that is text": b'{"request":{"op":"create_tap","vm_id":"c0ffee000001","slot":"1"}}',
    "a peer network that is a path": _RULES % b'"peers":"../x"',
    "a destination that is a command": _RULES % b'"allow":[{"cidr":"1.2.3.4/8; flush ruleset"}]',
    "an egress that is none of the three": _RULES % b'"egress":"most"',
    "an address for ever": b'{"request":{"op":"allow_addresses","vm_id":"c0ffee000001","slot":1,'
    b'"addresses":["1.2.3.4"],"ttl_s":0}}',
    "a resolver of one's own": b'{"request":{"op":"route_resolver","server":"192.0.2.1"}}',
    "a link of one's own": b'{"request":{"op":"route_resolver","link":"eth0"}}',
    "a link of one's own to be reverted": b'{"request":{"op":"unroute_resolver","link":"eth0"}}',
    "nesting without end": b"[" * 60000,
}
"""Payloads that must be refused as `bad_request` before anything is done."""
