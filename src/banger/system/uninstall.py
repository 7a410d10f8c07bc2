# SPDX-License-Identifier: MIT
"""`banger system uninstall`: exactly what installing made is taken away."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from banger.contract import errors, names, privileged, sizes
from banger.system import alone, asking, host, manifest, releases

_OURS: Final = frozenset(map(str, (host.STATE, host.CACHE, host.HELPER)))
_LAST: Final = (str(host.HELPER), str(host.ETC))
_CGROUPS: Final = Path("/sys/fs/cgroup")


def uninstall(*, purge: bool, force: bool, say: Callable[[str], None]) -> None:
    """Raises ConflictError while VMs run, unless `force`. One that was cut off can be run again."""
    if os.geteuid() != 0:
        raise errors.UnauthorizedError("uninstalling needs root", hint="run it with sudo")
    if host.INSTALL_TOML.exists():
        with alone.on_host(host.HELPER):
            _uninstall(purge=purge, force=force, say=say)
    elif not host.KEPT_TOML.exists():
        raise errors.NotFoundError("banger is not installed on this host")
    else:
        with alone.on_host(host.HELPER):
            say("removing files")
            _remove(manifest.read(), purge=purge)
        if not purge:
            raise errors.NotFoundError(
                "banger is not installed on this host any more; its VMs, images and settings are here",
                hint=f"to delete these too: sudo {sys.prefix}/bin/banger system uninstall --purge",
            )


def _uninstall(*, purge: bool, force: bool, say: Callable[[str], None]) -> None:
    made = manifest.read()
    running = [path.name for path in (_CGROUPS / names.CGROUP_PARENT).glob("*") if names.is_id(path.name)]
    if running and not force:
        raise errors.ConflictError(
            f"still running: {sizes.counted(len(running), 'VM')}",
            hint="stop them first, as their owner: `banger vm stop NAME…`; or add --force to end them",
        )
    if running:
        say("stopping VMs")
    # Those that run, with --force: in order, as far as the daemon can. What is left is ended below.
    with contextlib.suppress(errors.BangerError):  # a unit that an upgrade was cut off before
        host.systemctl("stop", host.GUESTS)
    say("stopping the daemon")
    host.systemctl("stop", "bangerd.service")
    say("taking down what VMs left on this host")
    host.systemctl("start", "bangerd-root.socket")
    _take_down_vms()
    say("stopping the root helper")
    # systemd made the slice for banger-vms.service and would keep it until the next boot.
    host.systemctl("stop", "bangerd-root.socket", "bangerd-root.service", "banger-vms.service", host.SLICE)
    # An upgrade by a version that did not know of a unit yet has made no link to it.
    enabled = [name for name in host.ENABLED if (host.UNIT_DIR / name).exists()]
    host.systemctl("stop", *enabled, host.BUILDS)
    host.systemctl("disable", "-q", "--no-reload", *enabled)
    say("removing files")
    _remove(made, purge=purge)
    if not purge:
        say(
            f"kept: VMs, images and kernels in {host.STATE}, logs and Firecracker in {host.HELPER}, "
            f"settings in {host.ETC}"
        )
        say(f"a new installation finds them again: sudo {sys.prefix}/bin/banger system install")


def _take_down_vms() -> None:
    """As root; the daemon, whose business it is, has ended."""
    for vm in asking.required(privileged.ListWorld()).vms:
        asking.required(privileged.TearDown(vm_id=vm.vm_id))
    asking.required(privileged.DeleteBridge())


def _is_kept(path: Path) -> bool:
    """What somebody decided, or brought: settings, signers, and the Firecracker that was chosen."""
    return path in (host.CONFIG_TOML, host.SIGNERS) or path.parent == host.RUNTIME


def _remove(made: manifest.Manifest, *, purge: bool) -> None:
    """No unit runs any more, and from the first line on none is asked to: so this can be done again."""
    if host.INSTALL_TOML.exists():
        host.INSTALL_TOML.rename(host.KEPT_TOML)
    for path in map(Path, made.files):
        if purge or not _is_kept(path):
            path.unlink(missing_ok=True)
    for link in releases.Releases().links():  # an upgrade's, of what the first installation did not have
        if link.is_symlink():
            link.unlink()
    (host.RELEASES / releases.PREVIOUS).unlink(missing_ok=True)
    manifest.remove_empty(map(Path, made.shared))
    host.forget_units()
    if not purge:
        return
    # Whoever made ours, such as to have a disk of its own there: all in them is ours. The manifest goes
    # after what only it names, and last what says that there is something to take off: to be done again.
    for name in sorted(
        {*made.directories, *_OURS}, key=lambda name: _LAST.index(name) if name in _LAST else -1
    ):
        shutil.rmtree(name, ignore_errors=True)
    host.KEPT_TOML.unlink(missing_ok=True)
    manifest.remove_empty([host.ETC])
    # Of banger itself what lies in places that are its alone, whichever version takes it off.
    if Path(sys.prefix) == host.PREFIX or host.RELEASES in Path(sys.prefix).parents:
        shutil.rmtree(host.PREFIX, ignore_errors=True)
