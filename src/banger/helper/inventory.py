# SPDX-License-Identifier: MIT
"""Everything of banger's on this host, found by scanning the kernel and root's own directories.

It only looks. Whose a thing is, the daemon says, who has the rows.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Final

from banger.contract import names, privileged
from banger.helper import cgroup, filesystem, guest_rules, network, process, ruleset, spares
from banger.helper import policy as policies
from banger.helper.linux import devmapper, loop, netlink

_MOUNTS: Final = "/proc/thread-self/mountinfo"


def list_world(policy: policies.Policy, _request: privileged.ListWorld) -> privileged.World:
    devices = [name.removeprefix(names.DM_PREFIX) for name in devmapper.names(names.DM_PREFIX)]
    loops = [found.label.split("/")[1] for found in loop.scan("banger/")]
    links = netlink.links()
    taps = set(network.tap_owners(policy, links))
    rules = guest_rules.owners()
    jails = set(filesystem.listed(f"{policy.jails}/firecracker"))
    cgroups = set(cgroup.vm_ids(policy))
    logs = set(filesystem.listed(f"{policy.helper_dir}/logs"))
    found = {*devices, *loops, *taps, *rules, *jails, *cgroups, *logs}
    vms: list[privileged.VmWorld] = []
    for vm_id in sorted(filter(names.is_id, found)):
        vms.append(
            privileged.VmWorld(
                vm_id=vm_id,
                snapshot=vm_id in devices,
                loops=loops.count(vm_id),
                tap=vm_id in taps,
                rules=vm_id in rules,
                jail=vm_id in jails,
                cgroup=vm_id in cgroups,
                logs=vm_id in logs,
                vmm_pid=process.find(policy, vm_id).pid,
            )
        )
    nameless = {
        "snapshot": [names.DM_PREFIX + name for name in devices],
        "loop": [f"banger/{label}" for label in loops],
        "rules": sorted(rules),
        "jail": sorted(jails),
        "cgroup": sorted(cgroups),
        "logs": sorted(logs),
    }
    ahead = (privileged.Other("tap", link.name) for link in links if spares.is_spare(link))
    staged = (privileged.Other("staged", path) for path in filesystem.half_made(policy))
    others = itertools.chain(
        ahead, _misnamed(nameless), _foreign_rules(), _mounts(policy), staged, _processes(policy)
    )
    return privileged.World(
        vms=tuple(vms),
        bridge=any(link.name == policy.bridge and link.alias == network.BRIDGE_ALIAS for link in links),
        others=tuple(itertools.islice(others, privileged.MAX_OTHERS)),
    )


def _misnamed(found: dict[str, list[str]]) -> Iterator[privileged.Other]:
    """A name that begins as ours do and goes on as none of ours does."""
    for kind, those in found.items():
        for name in those:
            if not names.is_id(name.rpartition("/")[2].removeprefix(names.DM_PREFIX)):
                yield privileged.Other(kind, name)


def _foreign_rules() -> Iterator[privileged.Other]:
    """Elements of our sets that no VM owns: we make none, but for the links that we opened."""
    for each in sorted(ruleset.elements()):
        if not each.owner and each.set != ruleset.OPENED:
            yield privileged.Other("rules", f"{each.set.family} {each.set.name} {each.key}")


def _mounts(policy: policies.Policy) -> Iterator[privileged.Other]:
    """Below the jails and the owner's directory nothing is ever mounted by us."""
    jails = f"{policy.jails}/firecracker/"
    with open(_MOUNTS, "rb") as lines:
        for line in lines:
            # Its bytes are whoever's that mounted it, but for the space and the line end.
            place = line.split(b" ")[4].decode(errors="replace")
            if place.startswith((jails, f"{policy.state_dir}/")):
                vm_id = place.removeprefix(jails).partition("/")[0]
                yield privileged.Other("mount", place, vm_id=vm_id if names.is_id(vm_id) else "")


def _processes(policy: policies.Policy) -> Iterator[privileged.Other]:
    """Every process that has a VM's uid: VMMs, their log writers, checks of file systems."""
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                uid = os.stat(entry.path).st_uid
                if policy.is_vm_uid(uid):
                    with open(f"{entry.path}/comm", errors="replace") as comm:
                        name = f"{entry.name} {comm.read().strip()}"
                    yield privileged.Other("process", name, slot=uid - policy.uid_base)
