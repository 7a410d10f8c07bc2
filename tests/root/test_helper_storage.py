# SPDX-License-Identifier: MIT
"""Loop devices and ext4 edits on the real kernel and e2fsprogs. Device-mapper is tested in the lab."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.contract import errors, names, privileged
from banger.helper import ext4, filesystem, operations, program, storage
from banger.helper.linux import loop
from banger.storage import grow, workdisk
from tests.root import helper_world
from tests.root.helper_world import VM, HelperWorld

WORK = f"vms/{VM}/work.ext4"
LABEL = names.loop_label(names.VmId(VM), "work")


@pytest.fixture(autouse=True)
def no_loop_left() -> Iterator[None]:
    yield
    left = helper_world.loops_left()
    for each in left:
        loop.detach(each.label, deadline=time.monotonic() + 1)
    assert not left


def attach(world: HelperWorld, path: str, role: str = "work") -> int:
    with storage._attached(world.policy, path, names.VmId(VM), role) as device:
        return os.dup(device)


@pytest.fixture
def root_disk(helper_world_here: HelperWorld, tmp_path: Path) -> Iterator[int]:
    """A descriptor of a loop device over an ext4 that has a hostname and the usual directories."""
    content = tmp_path / "content"
    for directory in ("etc", "bin", "proc"):
        (content / directory).mkdir(parents=True)
    (content / "etc" / "hostname").write_text("image\n")
    (content / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    image = helper_world_here.owned(WORK)
    helper_world.make_ext4(image, content=content)
    fd = attach(helper_world_here, WORK)
    yield fd
    os.close(fd)
    loop.detach(LABEL, deadline=time.monotonic() + 5)


def patch(world: HelperWorld, disk: int) -> None:
    request = privileged.PatchRoot(vm_id=VM, slot=1)
    ext4.patch(world.policy, request, os.fstat(disk).st_rdev, world.policy.uid(1))


def read(world: HelperWorld, command: str) -> str:
    return helper_world.read_ext4(world.state / WORK, command)


def test_loop_is_found_by_its_label_and_freed(helper_world_here: HelperWorld) -> None:
    helper_world_here.owned(WORK, b"x" * 8192)
    fd = attach(helper_world_here, WORK)
    found = loop.scan(f"banger/{VM}/")
    assert [each.label for each in found] == [LABEL]
    assert not loop.detach(LABEL, deadline=time.monotonic() + 0.05), "it is in use"
    os.close(fd)
    assert loop.detach(LABEL, deadline=time.monotonic() + 5)
    assert loop.detach(LABEL, deadline=time.monotonic() + 5), "gone is gone"


def test_a_loop_that_is_somebody_else_s_by_now_is_left_alone(helper_world_here: HelperWorld) -> None:
    """Between looking for ours and freeing it, its number may have become another's."""
    helper_world_here.owned(WORK, b"x" * 8192)
    os.close(attach(helper_world_here, WORK))
    (there,) = loop.scan(LABEL)
    loop._clear(there._replace(label=LABEL.replace(VM, "f" * 12)))
    assert loop.scan(LABEL) == [there]
    assert loop.detach(LABEL, deadline=time.monotonic() + 5)


def test_base_and_overlay_live_as_long_as_they_are_open(helper_world_here: HelperWorld) -> None:
    helper_world_here.owned(WORK, b"x" * 8192)
    fd = attach(helper_world_here, WORK, "base")
    with pytest.raises(OSError, match=r"Operation not permitted|Read-only|Bad file"):
        os.pwrite(fd, b"y" * 512, 0)
    os.close(fd)
    assert helper_world.loops_left() == []


def test_patch_writes_the_guest_binary(helper_world_here: HelperWorld, root_disk: int) -> None:
    world = helper_world_here
    patch(world, root_disk)
    os.fsync(root_disk)
    guest = Path(world.policy.guest).read_bytes()
    status = read(world, "stat /.banger/guest")
    assert "Mode:  0755" in status
    assert "Type: regular" in status
    assert f"Size: {len(guest)}" in status
    assert "User:     0" in status
    assert read(world, "cat /etc/passwd").startswith("root:")
    assert read(world, "cat /etc/hostname") == "image\n"


def test_patch_again_replaces_and_leaves_a_sound_file_system(
    helper_world_here: HelperWorld, root_disk: int
) -> None:
    patch(helper_world_here, root_disk)
    Path(helper_world_here.policy.guest).write_bytes(b"another")
    patch(helper_world_here, root_disk)
    assert read(helper_world_here, "cat /.banger/guest") == "another"
    checked = subprocess.run(
        ["e2fsck", "-f", "-n", helper_world_here.state / WORK], capture_output=True, text=True, timeout=30
    )
    assert checked.returncode == 0, checked.stdout


def test_a_link_in_the_image_is_replaced_not_followed(
    helper_world_here: HelperWorld, root_disk: int, tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_text("mkdir /.banger\nsymlink /.banger/guest /etc/passwd\n")
    device = f"/proc/self/fd/{root_disk}"
    subprocess.run(
        ["debugfs", "-w", "-f", script, device],
        check=True,
        pass_fds=[root_disk],
        capture_output=True,
        timeout=30,
    )
    patch(helper_world_here, root_disk)
    assert read(helper_world_here, "cat /etc/passwd").startswith("root:")
    assert "Type: regular" in read(helper_world_here, "stat /.banger/guest")


def test_what_could_not_be_written_is_an_error(helper_world_here: HelperWorld) -> None:
    """debugfs exits 0 all the same."""
    image = helper_world_here.owned("other", b"no file system" * 400)
    fd = attach(helper_world_here, str(image.relative_to(helper_world_here.state)), "base")
    try:
        with pytest.raises(errors.OperationFailedError, match="could not write"):
            patch(helper_world_here, fd)
    finally:
        os.close(fd)


def test_full_file_system_is_an_error(helper_world_here: HelperWorld, root_disk: int) -> None:
    big = Path(helper_world_here.policy.guest)
    big.write_bytes(os.urandom(20 << 20))
    with pytest.raises(errors.OperationFailedError, match=r"could not write /\.banger/guest"):
        patch(helper_world_here, root_disk)


def test_work_disk_is_checked_before_it_is_attached(helper_world_here: HelperWorld) -> None:
    world = helper_world_here
    image = world.owned(WORK)
    helper_world.make_ext4(image)
    # Not unmounted cleanly, and a free block count that is wrong: e2fsck has something to do.
    subprocess.run(
        ["debugfs", "-w", "-R", "set_super_value state 0", image],
        check=True,
        capture_output=True,
        timeout=30,
    )
    subprocess.run(
        ["debugfs", "-w", "-R", "set_super_value free_blocks_count 1", image],
        check=True,
        capture_output=True,
        timeout=30,
    )
    operations.execute(world.policy, privileged.AttachWorkDisk(vm_id=VM, slot=1))
    assert len(loop.scan(LABEL)) == 1
    with pytest.raises(errors.ConflictError):
        operations.execute(world.policy, privileged.AttachWorkDisk(vm_id=VM, slot=1))
    assert storage.work_device(names.VmId(VM)) == os.stat(loop.scan(LABEL)[0].path).st_rdev
    operations.execute(world.policy, privileged.DetachWorkDisk(vm_id=VM))
    assert subprocess.run(["e2fsck", "-n", image], capture_output=True, timeout=30).returncode == 0


def test_work_disk_that_cannot_be_repaired_leaves_no_loop(helper_world_here: HelperWorld) -> None:
    helper_world_here.owned(WORK, b"\0" * (1 << 20))
    with pytest.raises(errors.OperationFailedError, match="e2fsck"):
        operations.execute(helper_world_here.policy, privileged.AttachWorkDisk(vm_id=VM, slot=1))
    assert helper_world.loops_left() == []


def test_programs_run_without_privilege(helper_world_here: HelperWorld, tmp_path: Path) -> None:
    script = tmp_path / "show"
    script.write_text(
        "#!/bin/sh\nid -u; id -g; id -G; grep -E 'CapEff' /proc/self/status; ls /proc/self/fd; env\n"
    )
    script.chmod(0o755)
    tmp_path.chmod(0o755)
    uid = helper_world_here.policy.uid(3)
    (name, where) = ("show", str(tmp_path))
    path = program.ENVIRONMENT["PATH"]
    program.ENVIRONMENT["PATH"] = where + ":" + path
    try:
        for parent in tmp_path.parents:
            if parent != Path("/") and not os.stat(parent).st_mode & 0o001:
                parent.chmod(0o755)
        ended = program.run(name, [], uid=uid, fds=[], deadline_s=10)
    finally:
        program.ENVIRONMENT["PATH"] = path
    lines = ended.output.decode().split()
    assert lines[:3] == [str(uid)] * 3
    assert lines[4] == "0000000000000000"


def test_program_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with pytest.raises(errors.DeadlineError):
        program.run("sleep", ["60"], uid=65534, fds=[], deadline_s=0.2)
    assert time.monotonic() - began < 5


def test_output_of_a_program_is_bounded() -> None:
    ended = program.run("head", ["-c", "5000000", "/dev/zero"], uid=65534, fds=[], deadline_s=10)
    assert len(ended.output) <= program.MAX_OUTPUT_BYTES


def test_a_program_has_limits_and_the_kernel_ends_it_before_us() -> None:
    looked_at = ["-h", "", "/proc/self/oom_score_adj", "/proc/self/limits"]
    ended = program.run("grep", looked_at, uid=65534, fds=[], deadline_s=9.5)
    score, *limits = ended.output.decode().splitlines()
    assert score == "1000"
    assert [line.split()[3:5] for line in limits if line.startswith("Max data")] == [["402653184"] * 2]
    assert [line.split()[3:5] for line in limits if line.startswith("Max cpu")] == [["10"] * 2]


def test_a_program_that_wants_all_memory_is_refused_it() -> None:
    ended = program.run("tail", ["/dev/zero"], uid=65534, fds=[], deadline_s=30)
    assert ended.status == 1
    assert ended.output.endswith(b"tail: memory exhausted\n")


_FORKS = "my $n = 0; while (defined(my $pid = fork)) { $pid or sleep 60, exit; $n++ } print $n"


def test_a_program_that_forks_without_end_is_held_and_ends_whole(helper_world_here: HelperWorld) -> None:
    """By its uid, which is its VM's alone. e2fsck works with that limit, as the other tests here say."""
    uid = helper_world_here.policy.uid(3)
    ended = program.run("perl", ["-e", _FORKS], uid=uid, fds=[], deadline_s=20)
    assert int(ended.output) == program.max_tasks() - 1
    deadline = time.monotonic() + 10
    while _runs(uid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_program_that_cannot_be_watched_is_ended(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", fail)
    uid = helper_world_here.policy.uid(4)
    with pytest.raises(OSError, match="Too many open files"):
        program.run("sleep", ["60"], uid=uid, fds=[], deadline_s=20)
    assert not _runs(uid)


def test_a_file_system_that_claims_too_much_is_refused(helper_world_here: HelperWorld) -> None:
    """52 million directories, by its group descriptors: e2fsck took 850 MiB before it believed none."""
    image = helper_world_here.owned(WORK)
    os.truncate(image, 200 << 30)
    options = ["-O", "^metadata_csum,^uninit_bg,^has_journal,64bit", "-E", "lazy_itable_init=1"]
    inodes = ["-b", "4096", "-N", str(1600 * 32768)]
    subprocess.run(["mkfs.ext4", "-q", *options, *inodes, image], check=True, timeout=30)
    with image.open("r+b") as file:
        file.seek(1024 + 0x3A)
        file.write(bytes(2))  # not unmounted cleanly
        for group in range(1600):
            file.seek(4096 + group * 64 + 0x10)
            file.write(struct.pack("<H", 32768))
    with pytest.raises(errors.OperationFailedError, match=r"e2fsck .* Memory allocation failed"):
        operations.execute(helper_world_here.policy, privileged.AttachWorkDisk(vm_id=VM, slot=1))


def test_missing_image_and_kernel_are_not_found(helper_world_here: HelperWorld) -> None:
    request = privileged.CreateSnapshot(vm_id=VM, slot=1, image_id=helper_world.IMAGE)
    with pytest.raises(errors.NotFoundError):
        operations.execute(helper_world_here.policy, request)


def _runs(uid: int) -> bool:
    """Any process of that uid; those of others may end meanwhile."""
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError):
            if each.stat().st_uid == uid:
                return True
    return False


def test_node_is_opened_by_the_vms_uid_alone(helper_world_here: HelperWorld, root_disk: int) -> None:
    uid = helper_world_here.policy.uid(1)
    with filesystem.node(helper_world_here.policy, os.fstat(root_disk).st_rdev, uid) as node:
        for who, status in ((uid, 0), (uid + 1, 1)):
            path = f"/proc/self/fd/{node}"
            ended = program.run("head", ["-c", "1", path], uid=who, fds=[node], deadline_s=10)
            assert ended.status == status


def _attach_work(world: HelperWorld) -> None:
    storage.attach_work_disk(world.policy, privileged.AttachWorkDisk(vm_id=VM, slot=1))


def _detach_work(world: HelperWorld) -> None:
    storage.detach_work_disk(world.policy, privileged.DetachWorkDisk(vm_id=VM))


def _dumped(path: Path) -> dict[str, str]:
    done = subprocess.run(["dumpe2fs", "-h", path], check=True, capture_output=True, text=True, timeout=30)
    lines = (line.partition(":") for line in done.stdout.splitlines())
    return {name: value.strip() for name, _, value in lines}


def _made_work_disk(world: HelperWorld, tmp_path: Path, *, size_mib: int) -> tuple[Path, bytes]:
    """A work disk as a first start makes it, from a seed with a file in it."""
    content = os.urandom(3 << 20)
    (tmp_path / "kept").write_bytes(content)
    subprocess.run(["tar", "-C", tmp_path, "-cf", tmp_path / "seed.tar", "kept"], check=True, timeout=30)
    path = world.owned(WORK)
    path.unlink()
    workdisk.create(path, size_mib=size_mib, seed=tmp_path / "seed.tar")
    os.chown(path, world.policy.owner_uid, world.policy.owner_uid)
    return path, content


@pytest.mark.parametrize("grown_mib", [17, 200, 20_000])
def test_a_work_disk_grows_with_what_is_on_it(
    helper_world_here: HelperWorld, tmp_path: Path, grown_mib: int
) -> None:
    path, content = _made_work_disk(helper_world_here, tmp_path, size_mib=16)
    before = _dumped(path)
    grow.grow(path, size_mib=grown_mib)
    for _ in range(2):  # the second finds nothing to do
        _attach_work(helper_world_here)
        _detach_work(helper_world_here)
        after = _dumped(path)
        blocks, size = int(after["Block count"]), int(after["Block size"])
        assert (grown_mib << 20) - blocks * size < 4 << 20, "all of it but a group too small to be one"
        assert after["Filesystem UUID"] == before["Filesystem UUID"]
        checked = subprocess.run(
            ["e2fsck", "-f", "-n", path], capture_output=True, text=True, timeout=60, check=False
        )
        assert checked.returncode == 0, checked.stdout
        dumped = tmp_path / "dumped"
        subprocess.run(["debugfs", "-R", f"dump /kept {dumped}", path], check=True, timeout=30)
        assert dumped.read_bytes() == content
    assert path.stat().st_blocks * 512 < 64 << 20, "it is still sparse"


def test_a_work_disk_whose_growth_was_cut_short_is_grown_by_the_next(
    helper_world_here: HelperWorld, tmp_path: Path
) -> None:
    """The file is larger already, as after a crash between the two."""
    path, _ = _made_work_disk(helper_world_here, tmp_path, size_mib=16)
    os.truncate(path, 64 << 20)
    _attach_work(helper_world_here)
    _detach_work(helper_world_here)
    assert int(_dumped(path)["Block count"]) * int(_dumped(path)["Block size"]) == 64 << 20


def test_a_work_disk_is_never_made_smaller(helper_world_here: HelperWorld, tmp_path: Path) -> None:
    path, _ = _made_work_disk(helper_world_here, tmp_path, size_mib=64)
    grow.grow(path, size_mib=16)
    assert path.stat().st_size == 64 << 20


def test_what_is_no_file_system_is_not_grown(helper_world_here: HelperWorld) -> None:
    helper_world_here.owned(WORK, b"x" * (8 << 20))
    with pytest.raises(errors.OperationFailedError, match="e2fsck"):
        _attach_work(helper_world_here)
