# SPDX-License-Identifier: MIT
"""Installs banger in a lab the way a user does: a root-owned venv from hashed wheels, then `system install`.

The result is kept as two layers, each keyed by everything that went into it: the pinned wheels, which change
seldom and take long, and banger on them.
"""

from __future__ import annotations

import logging
import os
import pwd
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from lab import artefacts, cache, command, image, layer, qemu, session, wheels

log = logging.getLogger("lab")

VENV = "/usr/local/lib/banger"
OWNER = "dev"
PIP = (f"{VENV}/bin/pip", "--disable-pip-version-check", "install", "-q", "--no-index")
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
        key = _wheels_layer(root, parcel.path)
        return session.Lab.up(name, layer_key=key, artefacts=parcel.path, root=root)
    finally:
        parcel.close()


def _installed_layer(root: Path, parcel: Path) -> str:
    key = _key("installed", parcel.name)
    _ensure(root, key, parcel, lambda: _wheels_layer(root, parcel), install_banger)
    return key


def _wheels_layer(root: Path, parcel: Path) -> str:
    key = _key("wheels", wheels.REQUIREMENTS.read_bytes())
    _ensure(root, key, parcel, lambda: None, install_wheels)
    return key


def _key(*content: str | bytes) -> str:
    return cache.key_of([*content, image.recipe_key(), layer.signature(qemu.Hardware())])


def _ensure(
    root: Path,
    key: str,
    parcel: Path,
    below: Callable[[], str | None],
    install_into: Callable[[session.Lab, Path], None],
) -> None:
    """Makes the layer unless it is there, from the one below it, which is asked for only then."""
    with layer.making(root, key):
        found = layer.find(root, key)
        if found is not None:
            found.close()
            return
        place, base = f"installing-{os.getpid()}", below()
        with session.Lab.up(place, layer_key=base, artefacts=parcel, root=root) as lab:
            install_into(lab, Path("/artefacts"))
            lab.commit(key)


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
    install_wheels(machine, parcel)
    install_banger(machine, parcel, owner)


def install_wheels(machine: Machine, parcel: Path) -> None:
    _step(machine, "making the virtual environment", ["python3", "-m", "venv", VENV])
    wheels_at = ["--find-links", f"{parcel}/wheels", "-r", f"{parcel}/requirements.txt"]
    _step(machine, "installing the pinned wheels", [*PIP, "--require-hashes", *wheels_at])


def install_banger(machine: Machine, parcel: Path, owner: str = OWNER) -> None:
    """Into a virtual environment that has the pinned wheels."""
    runtime = [f"--{tool}={parcel}/runtime/{tool}" for tool in ("firecracker", "jailer")]
    _step(machine, "installing banger", [*PIP, "--no-deps", "--find-links", f"{parcel}/dist", "banger"])
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
