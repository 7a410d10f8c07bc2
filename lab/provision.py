# SPDX-License-Identifier: MIT
"""Installs banger in a lab the way a user does: a root-owned venv from hashed wheels, then `system install`.

The environment without banger is part of the host's image; the rest is kept as a layer, keyed by everything
that went into it.
"""

from __future__ import annotations

import logging
import os
import pwd
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lab import artefacts, cache, command, image, layer, qemu, session, wheels

log = logging.getLogger("lab")

VENV = wheels.VENV
OWNER = "dev"
INSTALL_LIMIT_S = 600


def bundle(root: Path) -> cache.Entry:
    """Open the directory that is handed to the lab: wheels, runtime files, kernels and images."""
    fetched, made, files = wheels.pinned(root), wheels.own(root), artefacts.ensure(root)
    key = cache.key_of(
        [fetched.path.name, made.path.name, files.path.name, wheels.REQUIREMENTS.read_bytes()]
    )

    def build(stage: Path) -> None:
        stage.chmod(0o755)
        shutil.copytree(fetched.path, stage / "wheels")
        shutil.copytree(made.path, stage / "dist")
        shutil.copy(wheels.REQUIREMENTS, stage / "requirements.txt")
        for part in files.path.iterdir():
            _link_tree(part, stage / part.name)

    try:
        return cache.Cache(root, "bundle", 3).ensure(key, build)
    finally:
        for entry in (fetched, made, files):
            entry.close()


def _link_tree(source: Path, target: Path) -> None:
    """Hard links where the cache allows it: the image alone is hundreds of megabytes."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_or_copy, symlinks=True)
    else:
        _link_or_copy(str(source), str(target))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def installed(
    name: str, *, detached: bool = False, artefacts: Path | None = None, root: Path | None = None
) -> session.Lab:
    """Bring up a lab with banger installed, its kernels imported and its images registered.

    Installs on the first call for this content, and starts from the kept layer after that. What it was
    installed from lies at /artefacts, unless it is handed something else.
    """
    root = root or cache.default_root()
    parcel = bundle(root)
    try:
        key = _installed_layer(root, parcel.path)
        handed = artefacts or parcel.path
        return session.Lab.up(name, layer_key=key, artefacts=handed, detached=detached, root=root)
    finally:
        parcel.close()


def build(root: Path | None = None) -> None:
    """Make all that `installed` starts from, unless the cache has it."""
    root = root or cache.default_root()
    parcel = bundle(root)
    try:
        _installed_layer(root, parcel.path)
    finally:
        parcel.close()


def prepared(name: str, *, root: Path | None = None) -> session.Lab:
    """Bring up a lab that has banger's virtual environment, with all that banger needs, but not banger."""
    root = root or cache.default_root()
    parcel = bundle(root)
    try:
        lab = session.Lab.up(name, artefacts=parcel.path, root=root)
    finally:
        parcel.close()
    try:
        _put_environment(lab)
    except BaseException:
        lab.down()
        raise
    return lab


def _installed_layer(root: Path, parcel: Path) -> str:
    key = cache.key_of(["installed", parcel.name, image.recipe_key(), layer.signature(qemu.Hardware())])
    with layer.making(root, key):
        found = layer.find(root, key)
        if found is not None:
            found.close()
            return key
        with session.Lab.up(f"installing-{os.getpid()}", artefacts=parcel, root=root) as lab:
            _put_environment(lab)
            install_banger(lab, Path("/artefacts"))
            lab.commit(key)
    return key


def _put_environment(lab: session.Lab) -> None:
    lab.run(["mv", "-T", image.ENVIRONMENT, VENV])


class Machine(Protocol):
    """Where banger is installed: a lab, or this machine."""

    @property
    def name(self) -> str: ...

    def run(self, argv: Sequence[str], *, user: str = "root", timeout_s: float = 60) -> object: ...


class ThisMachine:
    """The machine that `make run HOST=local` was asked to use."""

    name = "local"

    def run(self, argv: Sequence[str], *, user: str = "root", timeout_s: float = 60) -> object:
        """Runs it to its end as this user; raises CommandError when it fails."""
        return command.run(as_user(argv, user), timeout_s=timeout_s)


def as_user(argv: Sequence[str], user: str) -> list[str]:
    """The command, run by root on this machine as that user with its groups; KeyError when there is none."""
    known = pwd.getpwnam(user)
    return ["setpriv", f"--reuid={user}", f"--regid={known.pw_gid}", "--init-groups", *argv]


def install(machine: Machine, parcel: Path, owner: str = OWNER) -> None:
    """The commands of README.md's installation, with the parcel's files instead of a registry's."""
    for title, argv in wheels.installing(str(parcel)):
        _step(machine, title, argv)
    install_banger(machine, parcel, owner)


def install_banger(machine: Machine, parcel: Path, owner: str = OWNER) -> None:
    """Into a virtual environment that has the pinned wheels."""
    runtime = [f"--{tool}={parcel}/runtime/{tool}" for tool in ("firecracker", "jailer")]
    _step(
        machine, "installing banger", [*wheels.PIP, "--no-deps", "--find-links", f"{parcel}/dist", "banger"]
    )
    _step(
        machine,
        "banger system install",
        [f"{VENV}/bin/banger", "system", "install", "--owner", owner, *runtime],
    )
    for kernel in artefacts.KERNELS:
        import_kernel = ["banger", "kernel", "import", f"{parcel}/kernels/{kernel}", "--name", kernel]
        _step(machine, f"importing kernel {kernel}", import_kernel, user=owner)
    for image_name in artefacts.IMAGES:
        register = ["banger", "image", "register", f"{parcel}/images/{image_name}", "--name", image_name]
        _step(machine, f"registering image {image_name}", register, user=owner)


def _step(machine: Machine, title: str, argv: Sequence[str], *, user: str = "root") -> None:
    began = time.monotonic()
    log.info("%s: %s …", machine.name, title)
    machine.run(argv, user=user, timeout_s=INSTALL_LIMIT_S)
    log.info("%s: %s: %.1f s", machine.name, title, time.monotonic() - began)
