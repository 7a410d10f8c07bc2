# SPDX-License-Identifier: MIT
"""The default image and both kernels, really built, by an ordinary user who can gain no privileges.

This is how the daemon builds: in a user namespace of its own (PrivateUsers=), unable to gain privileges
(NoNewPrivileges=). Needs root only to become that user; needs the package archives.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
import stat
import subprocess
import tarfile
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger import run, workers
from banger.contract import names
from banger.images import bundle, flatten, publish, recipe
from banger.images import records as image_records
from banger.images.mkfs import filesystem
from banger.kernels import catalog, elf
from banger.kernels import records as kernel_records
from banger.owner import builder, pulls
from tests import ext4_read
from tests.lab import documents
from tests.root import build_unit, compared

TREE = Path(__file__).parents[2]
NOBODY = 65534
ARCH = platform.machine()
PR_SET_DUMPABLE = 4
PR_SET_NO_NEW_PRIVS = 38
CLONE_NEWUSER = 0x10000000


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A directory of the ordinary user's, with a stand-in for the guest binary."""
    with tempfile.TemporaryDirectory(prefix="banger-build-") as name:
        path = Path(name)
        (path / "guest").write_bytes(b"\x7fELF stand-in")
        os.chown(path, NOBODY, NOBODY)
        path.chmod(0o755)
        yield path


def confine() -> None:
    """A user namespace in which only this user exists, and no way out."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) == 0  # else /proc/self is root's
    assert libc.unshare(CLONE_NEWUSER) == 0, os.strerror(ctypes.get_errno())
    Path("/proc/self/setgroups").write_text("deny")
    for kind in ("uid", "gid"):
        Path(f"/proc/self/{kind}_map").write_text(f"{NOBODY} {NOBODY} 1")


def as_nobody(home: Path, work: Callable[[], object]) -> None:
    """Runs work in a child without privileges and without a way to get any."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir("/")
            os.environ |= {"HOME": str(home), "TMPDIR": str(home)}
            tempfile.tempdir = str(home)
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            confine()
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture(scope="module")
def built(home: Path) -> Path:
    """The directory of the default image."""
    images = image_records.Images(home / "images")
    wanted = recipe.load("debian-bookworm")

    def build() -> None:
        publish.build(
            images, wanted, arch=ARCH, cache_dir=home / "cache", guest_binary=home / "guest", on_line=print
        )

    as_nobody(home, build)
    return images.path(images.find("debian-bookworm").id)


@pytest.mark.timeout(600)
def test_the_default_image_is_whole(built: Path) -> None:
    record = image_records.Images(built.parent).read(built.name)
    rootfs = built / image_records.ROOTFS
    ext4_read.check(rootfs)
    assert (record.has_init, record.size_bytes, record.kernel) == (
        True,
        rootfs.stat().st_size,
        "generic-6.12",
    )
    assert record.stored_bytes < 400 << 20
    assert ext4_read.content(rootfs, names.GUEST_BINARY) == b"\x7fELF stand-in"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("path", "mode", "group"),
    [
        ("/", stat.S_IFDIR | 0o755, "root"),
        ("/tmp", stat.S_IFDIR | 0o1777, "root"),
        ("/root", stat.S_IFDIR | 0o700, "root"),
        ("/usr/bin/sudo", stat.S_IFREG | 0o4755, "root"),
        ("/usr/lib/openssh/ssh-keysign", stat.S_IFREG | 0o4755, "root"),
        ("/usr/bin/chage", stat.S_IFREG | 0o2755, "shadow"),
        ("/etc/shadow", stat.S_IFREG | 0o640, "shadow"),
        ("/var/mail", stat.S_IFDIR | 0o2775, "mail"),
        ("/usr/lib/dbus-1.0/dbus-daemon-launch-helper", stat.S_IFREG | 0o4754, "messagebus"),
    ],
)
def test_owners_and_modes_are_the_distributions(built: Path, path: str, mode: int, group: str) -> None:
    rootfs = built / image_records.ROOTFS
    lines = (line.split(":") for line in ext4_read.content(rootfs, "/etc/group").decode().splitlines())
    groups = {line[0]: int(line[2]) for line in lines}
    found = ext4_read.find(rootfs, path)
    assert found is not None
    assert (found.mode, found.uid, found.gid) == (mode, 0, groups[group])


@pytest.mark.timeout(600)
def test_the_packages_arrive_exactly_as_tar_unpacks_them(built: Path, home: Path, tmp_path: Path) -> None:
    """The archive that the image was built of, without the recipe's own edits."""
    [archive] = (home / "cache/recipes").glob("debian-bookworm-*.tar")
    layer = bundle.Layer(archive, bundle.Compression.NONE, "", archive.stat().st_size)
    with filesystem.Filesystem(tmp_path / "ours.ext4") as fs:
        flatten.flatten(fs, [layer])
        fs.finish(headroom_bytes=1 << 20)
    ext4_read.check(tmp_path / "ours.ext4")
    (tmp_path / "theirs").mkdir()
    unpack: list[str | Path] = ["tar", "-C", tmp_path / "theirs", "-xpf", archive, "--numeric-owner"]
    unpack += ["--xattrs", "--xattrs-include=*"]
    subprocess.run(unpack, check=True, timeout=120)
    with compared.mounted(tmp_path / "ours.ext4", tmp_path / "mounted") as ours:
        assert compared.differences(ours, tmp_path / "theirs") == []


@pytest.mark.timeout(300)
def test_the_smallest_recipe_by_the_builder(home: Path) -> None:
    """The daemon's part here, and the builder's as the uid that it is in its unit, which has no name.

    Its packages come by the way out.
    """
    images = image_records.Images(home / "small")
    with build_unit.serving_one(home, NOBODY) as path:
        publish.build(
            images,
            recipe.load("busybox"),
            arch=ARCH,
            cache_dir=home / "cache",
            guest_binary=home / "guest",
            make=builder.Builder(path),
        )
    assert list((home / "scratch").iterdir()) == []
    made = images.find("busybox")
    rootfs = images.rootfs(made.id)
    ext4_read.check(rootfs)
    assert (made.has_init, made.stored_bytes < 8 << 20) == (False, True)
    found = ext4_read.find(rootfs, "/bin/sh")
    assert found is not None
    assert stat.S_ISLNK(found.mode)


@pytest.mark.timeout(180)
def test_a_build_that_is_cancelled_leaves_nothing(home: Path) -> None:
    """While packages come, while they are unpacked, and while the image is made."""
    images, cache = image_records.Images(home / "none"), home / "cancelled"
    wanted = recipe.load("busybox")

    async def build(word: str) -> None:
        loop, heard = asyncio.get_running_loop(), asyncio.Event()

        def hear(line: str) -> None:
            if word in line:
                loop.call_soon_threadsafe(heard.set)

        work = run.in_thread(
            publish.build,
            images,
            wanted,
            arch=ARCH,
            cache_dir=cache,
            guest_binary=home / "guest",
            on_line=hear,
        )
        task = asyncio.create_task(work)
        await asyncio.wait_for(heard.wait(), 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for word in ("downloading", "extracting", "unpacking layer 1"):
        as_nobody(home, lambda word=word: asyncio.run(build(word)))  # type: ignore[misc]
        assert not [path.name for path in cache.glob("recipes/.*")], word
        assert not workers.at_work(cache), word
        assert not list((home / "none").glob("*")), word


@pytest.mark.timeout(600)
def test_nothing_of_the_build_host_is_inside(built: Path) -> None:
    rootfs = built / image_records.ROOTFS
    for path in (
        "/etc/hostname",
        "/etc/resolv.conf",
        "/etc/ssh/ssh_host_ed25519_key",
        "/var/lib/dbus/machine-id",
    ):
        found = ext4_read.find(rootfs, path)
        assert found is None or stat.S_ISLNK(found.mode), path
    assert ext4_read.content(rootfs, "/etc/machine-id") == b""


@pytest.mark.timeout(600)
def test_the_seed_is_roots_home(built: Path) -> None:
    with tarfile.open(built / image_records.WORK_SEED) as seed:
        found = {member.name: (member.uid, member.gid, member.mode) for member in seed}
    assert found["."] == (0, 0, 0o700)
    assert found[".bashrc"] == (0, 0, 0o644)


@pytest.mark.timeout(600)
def test_a_second_build_takes_the_packages_from_the_cache(built: Path, home: Path) -> None:
    images = image_records.Images(home / "again")
    said: list[str] = []
    publish.build(
        images,
        recipe.load("debian-bookworm"),
        arch=ARCH,
        cache_dir=home / "cache",
        guest_binary=home / "guest",
        on_line=said.append,
    )
    assert [line.partition(" 1 of 1")[0] for line in said] == ["unpacking layer", "making the file system"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "kind"), [("generic-6.12", "direct"), ("debian-6.1", "initrd")])
def test_kernels_of_the_catalog(home: Path, name: str, kind: str) -> None:
    kernels = kernel_records.Kernels(home / f"kernels-{kind}")
    entry = catalog.find(name, "x86_64")

    def pull() -> None:
        catalog.pull(kernels, entry, cache_dir=home / "cache", guest_binary=home / "guest")

    if kind == "direct":
        pull()  # pip is in this environment, which others may not enter
    else:
        as_nobody(home, pull)
    made = kernels.find(name)
    assert made.kind == kind
    assert made.version.startswith(name.partition("-")[2])
    assert elf.parse(kernels.vmlinux(made.id).read_bytes()).machine == "x86_64"
    if name == pulls.DEFAULT_KERNEL:
        [(_, shown)] = documents.console(TREE / "README.md")
        assert shown[0] == made.version
    if kind == "initrd":
        assert {"virtio_mmio", "virtio_blk", "virtio_net", "vmw_vsock_virtio_transport"} <= set(made.modules)
