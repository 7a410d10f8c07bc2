# SPDX-License-Identifier: MIT
"""What the helper finds of banger's on a host, and what it sweeps when it starts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from banger.contract import names, privileged
from banger.helper import filesystem, operations
from banger.helper.linux import loop
from tests.root import device_mapper
from tests.root.helper_world import VM, HelperWorld

SLOT = 3900


def seen(world: HelperWorld) -> privileged.World:
    return operations.execute(world.policy, privileged.ListWorld())


def named(found: privileged.World, kind: str) -> list[str]:
    return [other.name for other in found.others if other.kind == kind]


def test_the_kernel_is_scanned(helper_world_here: HelperWorld, own_network: None) -> None:
    world = helper_world_here
    backing = os.open(world.owned("vms/disk"), os.O_RDWR)
    device = loop.attach(backing, names.loop_label(names.VmId(VM), "work"), flags=loop.LO_FLAGS_AUTOCLEAR)
    try:
        (mine,) = [vm for vm in seen(world).vms if vm.vm_id == VM]
        assert mine == privileged.VmWorld(vm_id=VM, loops=1)
    finally:
        os.close(device)
        os.close(backing)
    assert VM not in {vm.vm_id for vm in seen(world).vms}


def test_what_the_network_has_of_a_vm_is_seen(helper_world_here: HelperWorld, own_network: None) -> None:
    world = helper_world_here
    nothing = seen(world)
    assert (nothing.bridge, named(nothing, "rules")) == (False, [])
    operations.execute(world.policy, privileged.EnsureBridge())
    for request, mine in (
        (privileged.SetGuestRules(vm_id=VM, slot=7), privileged.VmWorld(vm_id=VM, rules=True)),
        (privileged.CreateTap(vm_id=VM, slot=7), privileged.VmWorld(vm_id=VM, rules=True, tap=True)),
        (privileged.DeleteGuestRules(vm_id=VM), privileged.VmWorld(vm_id=VM, tap=True)),
    ):
        operations.execute(world.policy, request)
        assert mine in seen(world).vms
    assert seen(world).bridge
    operations.execute(world.policy, privileged.DeleteTap(vm_id=VM))
    assert VM not in {vm.vm_id for vm in seen(world).vms}
    subprocess.run(["nft", "add element inet banger nat { 192.0.2.1 }"], check=True)
    assert named(seen(world), "rules") == ['inet nat "192.0.2.1"']
    operations.execute(world.policy, privileged.DeleteBridge())
    assert not seen(world).bridge
    tables = subprocess.run(["nft", "list", "tables"], check=True, capture_output=True, text=True).stdout
    assert "banger" not in tables


def test_what_device_mapper_has_of_a_vm_is_seen(
    helper_world_here: HelperWorld, own_network: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mapper = device_mapper.install(monkeypatch, tmp_path)
    mapper.devices[names.dm_name(names.VmId(VM))] = device_mapper.Device(f"BANGER-{VM}")
    mapper.devices[f"{names.DM_PREFIX}somebody-s"] = device_mapper.Device("")
    found = seen(helper_world_here)
    assert privileged.VmWorld(vm_id=VM, snapshot=True) in found.vms
    assert named(found, "snapshot") == [f"{names.DM_PREFIX}somebody-s"]


def test_names_like_ours_are_listed_apart(helper_world_here: HelperWorld, own_network: None) -> None:
    world = helper_world_here
    for path in ("jails/firecracker/not-an-id", "logs/neither", f"logs/{VM}"):
        (world.root / path).mkdir(parents=True)
    found = seen(world)
    assert named(found, "jail") == ["not-an-id"]
    assert named(found, "logs") == ["neither"]
    assert privileged.VmWorld(vm_id=VM, logs=True) in found.vms


def test_an_answer_has_an_end(
    helper_world_here: HelperWorld, own_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much somebody has named like ours."""
    monkeypatch.setattr(privileged, "MAX_OTHERS", 3)
    for number in range(5):
        (helper_world_here.root / "logs" / f"neither-{number}").mkdir(parents=True)
    assert len(seen(helper_world_here).others) == 3


def test_a_process_is_known_by_its_uid(helper_world_here: HelperWorld, own_network: None) -> None:
    world = helper_world_here
    uid = world.policy.uid(SLOT)
    with subprocess.Popen(["sleep", "30"], user=uid, group=uid, extra_groups=[]) as process:
        try:
            mine = [other for other in seen(world).others if other.slot == SLOT]
            assert mine == [privileged.Other("process", f"{process.pid} sleep", slot=SLOT)]
        finally:
            process.kill()
    assert SLOT not in {other.slot for other in seen(world).others}


def test_a_mount_in_a_jail_is_seen(helper_world_here: HelperWorld, own_network: None) -> None:
    world = helper_world_here
    place = Path(world.policy.jails) / "firecracker" / VM / "root"
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], check=True)
    try:
        assert privileged.Other("mount", str(place), vm_id=VM) in seen(world).others
    finally:
        subprocess.run(["umount", str(place)], check=True)
    assert named(seen(world), "mount") == []


def test_names_of_others_that_are_no_text_are_no_matter(
    helper_world_here: HelperWorld, own_network: None, tmp_path: Path
) -> None:
    """Any user may have a file system mounted at such a place, by FUSE, and a program call itself so."""
    place, world = os.path.join(os.fsencode(tmp_path), b"caf\xe9\r\xe2\x80\xa8"), helper_world_here
    os.mkdir(place)
    uid = world.policy.uid(SLOT)
    subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    try:
        with subprocess.Popen(
            ["sh", "-c", "printf 'caf\\351' >/proc/$$/comm; echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            user=uid,
            group=uid,
            extra_groups=[],
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert SLOT in {other.slot for other in seen(world).others}
            process.kill()
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_helper_that_starts_sweeps_what_was_half_made(
    helper_world_here: HelperWorld, own_network: None
) -> None:
    """Killed between making a node and unlinking it, or in the middle of copying a kernel."""
    world = helper_world_here
    kept = world.root / "kernels" / "a-b-c"
    kept.parent.mkdir()
    kept.write_bytes(b"a kernel")
    half = [world.root / "node-0123456789abcdef", kept.with_name("a-b-d.01234567")]
    os.mknod(half[0], 0o600 | 0o060000, os.makedev(7, 0))
    half[1].write_bytes(b"half")
    assert named(seen(world), "staged") == [str(path) for path in half]
    filesystem.sweep(world.policy)
    assert not any(path.exists() for path in half)
    assert kept.exists()
    assert named(seen(world), "staged") == []
