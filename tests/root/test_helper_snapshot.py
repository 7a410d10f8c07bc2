# SPDX-License-Identifier: MIT
"""Snapshots from request to request, on real loops and file systems; device-mapper itself is a fake."""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.contract import errors, names, privileged
from banger.helper import operations
from banger.helper.linux import devmapper, loop
from tests.root import device_mapper, helper_world
from tests.root.helper_world import IMAGE, VM, HelperWorld

NAME = names.dm_name(names.VmId(VM))
MAKE = privileged.CreateSnapshot(vm_id=VM, slot=1, image_id=IMAGE)
DROP = privileged.DeleteSnapshot(vm_id=VM)


@pytest.fixture
def mapper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[device_mapper.Kernel]:
    yield device_mapper.install(monkeypatch, tmp_path)
    left = helper_world.loops_left()
    for each in left:
        loop.detach(each.label, deadline=time.monotonic() + 5)
    assert not left


@pytest.fixture
def world(helper_world_here: HelperWorld) -> HelperWorld:
    """The two files of the owner. Both are file systems: what is asked of "the snapshot" finds one."""
    base = helper_world_here.owned(f"images/{IMAGE}/rootfs.ext4")
    helper_world.make_ext4(base)
    helper_world.make_ext4(helper_world_here.owned(f"vms/{VM}/overlay.cow"))
    return helper_world_here


@pytest.fixture
def held(mapper: device_mapper.Kernel) -> Iterator[list[int]]:
    """The loops of a device live by the device; here, by these descriptors."""
    opened: list[int] = []
    yield opened
    for fd in opened:
        os.close(fd)


def make(world: HelperWorld, mapper: device_mapper.Kernel, held: list[int]) -> None:
    mapper.loaded = lambda devices: held.extend(os.open(f"/dev/loop{os.minor(each)}", 0) for each in devices)
    operations.execute(world.policy, MAKE)


def test_from_making_to_deleting(world: HelperWorld, mapper: device_mapper.Kernel, held: list[int]) -> None:
    make(world, mapper, held)
    device = mapper.devices[NAME]
    assert (device.active, device.uuid) == (True, f"BANGER-{VM}")
    assert device.parameters.split()[2:] == ["P", "8"]
    operations.execute(world.policy, privileged.CheckSnapshot(vm_id=VM, slot=1))
    operations.execute(world.policy, privileged.PatchRoot(vm_id=VM, slot=1))
    (tmp,) = [each for each in loop.scan(f"banger/{VM}/") if each.label.endswith("overlay")]
    assert "User:     0" in helper_world.read_ext4(tmp.path, f"stat {names.GUEST_BINARY}")
    for fd in held:
        os.close(fd)
    held.clear()
    operations.execute(world.policy, DROP)
    assert not mapper.devices
    operations.execute(world.policy, DROP)  # gone is gone


def test_a_tear_down_takes_it_away(
    world: HelperWorld, mapper: device_mapper.Kernel, held: list[int], own_network: None
) -> None:
    make(world, mapper, held)
    for fd in held:
        os.close(fd)
    held.clear()
    operations.execute(world.policy, privileged.TearDown(vm_id=VM))
    assert not mapper.devices


def test_one_that_a_patch_made_invalid_is_said(
    world: HelperWorld, mapper: device_mapper.Kernel, held: list[int]
) -> None:
    """The kernel gives up a store that it cannot write to, and what was written seems to be there still."""
    make(world, mapper, held)
    mapper.said = "Invalid"
    with pytest.raises(errors.OperationFailedError, match="unusable: Invalid"):
        operations.execute(world.policy, privileged.PatchRoot(vm_id=VM, slot=1))
    mapper.said = "0/1 0"
    for fd in held:
        os.close(fd)
    held.clear()
    operations.execute(world.policy, DROP)


def test_loops_without_a_device_go_too(world: HelperWorld, mapper: device_mapper.Kernel) -> None:
    for role in ("base", "overlay"):
        with open(world.state / f"vms/{VM}/overlay.cow", "r+b") as backing:
            os.close(loop.attach(backing.fileno(), names.loop_label(names.VmId(VM), role), flags=0))
    assert len(loop.scan(f"banger/{VM}/")) == 2
    operations.execute(world.policy, DROP)
    assert helper_world.loops_left() == []


def test_one_that_is_there_is_a_conflict(world: HelperWorld, mapper: device_mapper.Kernel) -> None:
    mapper.devices[NAME] = device_mapper.Device(f"BANGER-{VM}")
    with pytest.raises(errors.ConflictError, match="exists already"):
        operations.execute(world.policy, MAKE)
    assert list(mapper.devices) == [NAME]


@pytest.mark.parametrize("request_", [DROP, privileged.CheckSnapshot(vm_id=VM, slot=1)])
def test_a_foreign_device_of_the_name_is_left_alone(
    world: HelperWorld, mapper: device_mapper.Kernel, request_: privileged.Request[privileged.Done]
) -> None:
    mapper.devices[NAME] = device_mapper.Device("LVM-somebody")
    with pytest.raises((errors.ConflictError, errors.NotFoundError)):
        operations.execute(world.policy, request_)
    assert list(mapper.devices) == [NAME]


@pytest.mark.parametrize("command", [device_mapper.LOAD, device_mapper.SUSPEND, device_mapper.STATUS])
def test_a_failure_in_the_middle_leaves_no_device(
    world: HelperWorld, mapper: device_mapper.Kernel, command: int
) -> None:
    if command != device_mapper.STATUS:
        mapper.refuse[command] = errno.ENOMEM
        with pytest.raises(errors.BangerError, match="create_snapshot"):
            operations.execute(world.policy, MAKE)
    else:
        mapper.said = "Invalid"
        with pytest.raises(errors.OperationFailedError, match="unusable: Invalid"):
            operations.execute(world.policy, MAKE)
    assert not mapper.devices


def write_header(overlay: Path, sectors: int) -> None:
    """What the kernel finds in an overlay that was in use."""
    with overlay.open("r+b") as file:
        file.write(b"SnAp" + struct.pack("<3I", 1, 1, sectors))


def test_an_overlay_whose_header_names_other_chunks_never_reaches_the_kernel(
    world: HelperWorld, mapper: device_mapper.Kernel
) -> None:
    """It would take three of them as memory of its own, each of up to 2 GiB."""
    mapper.refuse[device_mapper.CREATE] = errno.ENOTRECOVERABLE
    write_header(world.state / f"vms/{VM}/overlay.cow", 1 << 21)
    with pytest.raises(errors.OperationFailedError, match=f"overlay of VM {VM} is damaged"):
        operations.execute(world.policy, MAKE)
    assert helper_world.loops_left() == []


def test_a_header_written_while_it_is_made_leaves_no_device(
    world: HelperWorld, mapper: device_mapper.Kernel
) -> None:
    def overridden(_beneath: list[int]) -> None:
        device = mapper.devices[NAME]
        device.parameters = device.parameters.replace("P 8", "P 2097152")

    mapper.loaded = overridden
    with pytest.raises(errors.OperationFailedError, match=f"overlay of VM {VM} is damaged"):
        operations.execute(world.policy, MAKE)
    assert not mapper.devices
    assert helper_world.loops_left() == []


def test_an_overlay_that_was_in_use_is_taken(
    world: HelperWorld, mapper: device_mapper.Kernel, held: list[int]
) -> None:
    write_header(world.state / f"vms/{VM}/overlay.cow", 8)
    make(world, mapper, held)
    assert mapper.devices[NAME].active


def test_a_missing_overlay_leaves_no_loop(world: HelperWorld, mapper: device_mapper.Kernel) -> None:
    (world.state / f"vms/{VM}/overlay.cow").unlink()
    with pytest.raises(errors.NotFoundError):
        operations.execute(world.policy, MAKE)
    assert not mapper.devices


def test_one_in_use_goes_with_its_last_user(
    world: HelperWorld, mapper: device_mapper.Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from banger.helper import storage

    monkeypatch.setattr(storage, "BUSY_DEADLINE_S", 0.01)
    mapper.devices[NAME] = device_mapper.Device(f"BANGER-{VM}", open_count=1)
    with pytest.raises(errors.ConflictError, match="in use"):
        operations.execute(world.policy, DROP)
    assert mapper.devices[NAME].leaving


def test_one_that_is_busy_for_a_moment_is_waited_for(
    world: HelperWorld, mapper: device_mapper.Kernel
) -> None:
    """As after a kill: the VMM is gone, and the kernel has not let go of its disk yet."""
    mapper.devices[NAME] = device_mapper.Device(f"BANGER-{VM}", open_count=1)
    last_close = threading.Timer(0.05, mapper.devices.clear)
    last_close.start()
    operations.execute(world.policy, DROP)
    assert not mapper.devices
    last_close.join()


def test_devices_are_listed_by_their_prefix(mapper: device_mapper.Kernel) -> None:
    assert devmapper.names(names.DM_PREFIX) == []
    for name in (f"{names.DM_PREFIX}a", "vg-root", f"{names.DM_PREFIX}longer-than-eight"):
        mapper.devices[name] = device_mapper.Device("")
    assert devmapper.names(names.DM_PREFIX) == [f"{names.DM_PREFIX}a", f"{names.DM_PREFIX}longer-than-eight"]
    mapper.devices |= {
        f"{names.DM_PREFIX}{n:012x}": device_mapper.Device("") for n in range(names.MAX_SLOTS)
    }
    assert len(devmapper.names(names.DM_PREFIX)) == names.MAX_SLOTS + 2
    mapper.full = True
    with pytest.raises(OSError, match="too many"):
        devmapper.names(names.DM_PREFIX)


def test_a_node_without_a_driver_is_no_device_mapper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = tmp_path / "control"
    os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(10, 250))  # misc minors of this range nobody registers
    with pytest.raises(OSError, match="No such device"):
        node.open("rb")
    monkeypatch.setattr(devmapper, "_CONTROL", str(node))
    assert devmapper.names(names.DM_PREFIX) == []
    assert devmapper.find(NAME) is None
    with pytest.raises(FileNotFoundError, match=str(node)):
        devmapper.create(NAME, "", sectors=8, target="zero", parameters="")


def test_what_the_kernel_refuses_is_said(world: HelperWorld, mapper: device_mapper.Kernel) -> None:
    mapper.refuse = dict.fromkeys((device_mapper.REMOVE, device_mapper.STATUS), errno.EACCES)
    for ask in (lambda: devmapper.find(NAME), lambda: devmapper.remove(NAME, deadline=0)):
        with pytest.raises(PermissionError):
            ask()
