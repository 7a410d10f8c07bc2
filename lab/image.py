# SPDX-License-Identifier: MIT
"""Builds the host image: Debian 12 with systemd, as a qcow2 disk with the kernel and initrd that start it.

Banger's virtual environment without banger is in it, out of the way: a lab only moves it into its place. The
same commands take two minutes in a lab.

The packages come from the distribution's signed archive, through the sources this machine's apt is set up
with. Used by session and cli; needs root, as the tree holds other users' files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab import cache, command, errors, initrd, wheels

log = logging.getLogger("lab")

HERE = Path(__file__).parent
RECIPE = HERE / "host"
SUITE = "bookworm"
SUITES = (SUITE, f"{SUITE}-updates", f"{SUITE}-security")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DISK_BYTES = 16 << 30
DEV_UID = 1000
KEPT_IMAGES = 2
ENVIRONMENT = "/var/lib/lab/banger"


@dataclass(frozen=True, slots=True)
class Image:
    """A host image in the cache; close it when the lab that runs from it has ended."""

    key: str
    entry: cache.Entry

    @property
    def disk(self) -> Path:
        return self.entry.path / "disk.qcow2"

    @property
    def kernel(self) -> Path:
        return self.entry.path / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.entry.path / "initrd"

    @property
    def private_key(self) -> Path:
        return self.entry.path / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        return self.entry.path / "known_hosts"


def ensure(root: Path) -> Image:
    """Open the image of this recipe, building it when it is not in the cache."""
    key = recipe_key()
    store = cache.Cache(root, "image", KEPT_IMAGES)

    def build(stage: Path) -> None:
        with contextlib.closing(wheels.pinned(root)) as pinned:
            _build(stage, pinned.path)

    return Image(key, store.ensure(key, build))


def recipe_key() -> str:
    """Hash all that decides what is in the image."""
    files = sorted(path for path in RECIPE.rglob("*") if path.is_file())
    sources = [HERE / "image.py", HERE / "initrd.py", HERE / "wheels.py", wheels.REQUIREMENTS]
    return cache.key_of(part for path in [*files, *sources] for part in (path.name, path.read_bytes()))


def _build(stage: Path, pinned: Path) -> None:
    if os.geteuid() != 0:
        raise errors.ImageBuildError(
            "building the host image needs root", hint="run: sudo python -m lab build"
        )
    started = time.monotonic()
    root = stage / "root"
    log.info("building the host image (about a minute, once)")
    _unpack(root)
    log.info("packages unpacked after %.0f s", time.monotonic() - started)
    _configure(root, stage)
    _make_environment(root, pinned)
    _extract_boot_files(root, stage)
    _make_disk(root, stage)
    shutil.rmtree(root)
    log.info("host image built in %.0f s", time.monotonic() - started)


def _unpack(root: Path) -> None:
    argv = [
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        "--format=directory",
        f"--include={','.join(_listed(RECIPE / 'packages.txt'))}",
        f"--keyring={KEYRING}",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        '--aptopt=Apt::Install-Recommends "false"',
        *_apt_options(),
        SUITE,
        str(root),
        *_sources(),
    ]
    # The distribution's own initrd is not used: its hooks honour INITRD=No and save half a minute.
    command.run(argv, timeout_s=900, env={"INITRD": "No"})


def _listed(path: Path) -> list[str]:
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _sources() -> list[str]:
    """Give this machine's own sources of the suite; none of them means the distribution's default."""
    form = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    listed = command.run(["apt-get", "indextargets", "--format", form, "Created-By: Packages"], timeout_s=60)
    known = dict.fromkeys(tuple(line.split()) for line in listed.text.splitlines())
    return [f"deb {uri} {suite} main" for uri, suite, part in known if suite in SUITES and part == "main"]


def _apt_options() -> Iterator[str]:
    """Pass on how this machine's apt reaches its sources: proxies, certificates, limits."""
    shown = command.run(["apt-config", "dump", "Acquire"], timeout_s=60).text.splitlines()
    for line in shown:
        if line.startswith(("Acquire::http", "Acquire::https", "Acquire::Check-", "Acquire::Retries")):
            yield f"--aptopt={line.removesuffix(';')}"


def _configure(root: Path, stage: Path) -> None:
    shutil.copytree(RECIPE / "tree", root, symlinks=True, dirs_exist_ok=True)
    for unit in _listed(RECIPE / "masked-units.txt"):
        mask = root / "etc/systemd/system" / unit
        mask.unlink(missing_ok=True)
        mask.symlink_to("/dev/null")
    (root / "etc/sudoers.d/lab").chmod(0o440)
    (root / "etc/machine-id").write_text("ba96e5000000000000000000000000aa\n")
    (root / "var/log/journal").mkdir(exist_ok=True)
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    (root / "etc/resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    _chroot(root, "useradd", "--create-home", "--shell=/bin/bash", f"--uid={DEV_UID}", "--password=*", "dev")
    _chroot(root, "usermod", "--password=*", "--shell=/bin/sh", "root")
    _make_keys(root, stage)


def _make_environment(root: Path, pinned: Path) -> None:
    """Where it belongs, for its programs say where they are; then it is put aside."""
    handed = root / "root/handed"
    shutil.copytree(pinned, handed / "wheels")
    shutil.copy(wheels.REQUIREMENTS, handed / "requirements.txt")
    for _, argv in wheels.installing("/root/handed"):
        _chroot(root, *argv, timeout_s=300)
    shutil.rmtree(handed)
    aside = root / ENVIRONMENT[1:]
    aside.parent.mkdir()
    (root / wheels.VENV[1:]).rename(aside)


def _make_keys(root: Path, stage: Path) -> None:
    """Make the key the lab is entered with, and know the host by its own key from the first contact on."""
    private = stage / "id_ed25519"
    command.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", private], timeout_s=30)
    public = private.with_suffix(".pub").read_text()
    for home, owner in ((root / "root", 0), (root / "home/dev", DEV_UID)):
        authorized = home / ".ssh/authorized_keys"
        authorized.parent.mkdir(mode=0o700, exist_ok=True)
        authorized.write_text(public)
        os.chown(authorized.parent, owner, owner)
        os.chown(authorized, owner, owner)
    for old in (root / "etc/ssh").glob("ssh_host_*"):
        old.unlink()
    host_key = root / "etc/ssh/ssh_host_ed25519_key"
    command.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", host_key], timeout_s=30)
    (stage / "known_hosts").write_text(f"lab {host_key.with_suffix('.pub').read_text()}")


def _chroot(root: Path, *argv: str, timeout_s: float = 60) -> None:
    """With nothing of this machine's environment, which may have places of its own Python."""
    clean = ("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
    command.run(["chroot", root, *clean, *argv], timeout_s=timeout_s)


def _extract_boot_files(root: Path, stage: Path) -> None:
    (kernel,) = (root / "boot").glob("vmlinuz-*")
    shutil.copyfile(kernel, stage / "vmlinuz")
    (stage / "initrd").write_bytes(initrd.build(root, (RECIPE / "init").read_bytes()))


def _make_disk(root: Path, stage: Path) -> None:
    raw = stage / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(DISK_BYTES)
    options = "lazy_itable_init=1,lazy_journal_init=1,nodiscard"
    command.run(["mkfs.ext4", "-q", "-E", options, "-L", "lab", "-d", root, raw], timeout_s=300)
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(stage / "disk.qcow2")]
    command.run(convert, timeout_s=300)
    raw.unlink()
