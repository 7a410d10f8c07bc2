# SPDX-License-Identifier: MIT
"""Run in a namespace by test_installation.py: one history of an installation, and whether it was exact."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest

import banger
from banger import pinned, run
from banger.contract import errors, privileged
from banger.system import (
    alone,
    asking,
    choices,
    host,
    install,
    machine,
    ownership,
    releases,
    runtime,
    settings,
    uninstall,
)

PLACES = ("/etc", "/usr/local", "/var/lib", "/var/cache")
PREFIX = Path("/usr/local/lib/banger")
NEWER = Path("/usr/local/lib/banger-of-later")
OWNER = "nobody"
SYSTEMCTL = """\
#!/bin/sh
verb=$1; shift; now=; [ "$2" != --now ] || { now=1; first=$1; shift 2; set -- "$first" "$@"; }
case $verb in
  disable) SYSTEMD_OFFLINE=1 /usr/bin/systemctl "$verb" "$@"; cd /run; shift; [ -z "$now" ] || rm -f "$@";;
  is-enabled) SYSTEMD_OFFLINE=1 exec /usr/bin/systemctl "$verb" "$@";;
  stop|start)
    cd /usr/local/lib/systemd/system
    for unit; do
      case $unit in *'*'*|*.slice) continue;; esac
      [ -e "$unit" ] || exit 5
      if [ "$verb" = start ]; then : >/run/"$unit"; else rm -f /run/"$unit"; fi
    done;;
  daemon-reload) ls /usr/local/lib/systemd/system >/run/known 2>/dev/null || :;;
esac
"""
"""What runs, and what it knew when it was told to look, is in /run; units that are not there it refuses."""


def seen() -> set[str]:
    """Every path, its kind, mode, owner and target, where an installation may make something."""
    found = set()
    for place in PLACES:
        for directory, names, files in os.walk(place):
            for name in (*names, *files):
                path = Path(directory, name)
                stat = path.lstat()
                target = str(path.readlink()) if path.is_symlink() else ""
                found.add(f"{path} {stat.st_mode:o} {stat.st_uid}:{stat.st_gid} {target}")
    return found


def check_nothing_runs() -> None:
    """No unit of ours, and systemd was told that there is none."""
    left = [path.name for path in Path("/run").glob("banger*") if path.is_file()]
    assert not left, left
    assert "banger" not in Path("/run/known").read_text()


def environment(prefix: Path) -> None:
    """A virtual environment, as far as an installation looks into it."""
    (prefix / "bin").mkdir(parents=True)
    site = prefix / "lib/python3.11/site-packages"
    (site / f"banger-{banger.__version__}.dist-info").mkdir(parents=True)
    for name in host.COMMANDS:
        (prefix / "bin" / name).write_text("#!/bin/sh\nexit 0\n")
        (prefix / "bin" / name).chmod(0o755)


def furnish() -> None:
    """What is there before: virtual environments, the tools' names, no service."""
    environment(PREFIX)
    environment(NEWER)
    for name, script in {
        "systemctl": SYSTEMCTL,
        "modprobe": "#!/bin/sh\n",
        "firecracker": "#!/bin/sh\necho 'Firecracker v1.12.1'\n",
        "jailer": "#!/bin/sh\necho 'Jailer v1.12.1'\n",
    }.items():
        path = Path("/usr/local/sbin") / name
        path.write_text(script)
        path.chmod(0o755)


@contextlib.contextmanager
def played() -> Iterator[None]:
    """Of this machine what an installation cannot have here: systemd, cgroup v2, services that answer."""
    with contextlib.ExitStack() as stack:
        for place, name, instead in (
            (sys, "prefix", str(PREFIX)),
            (host, "check", pwd.getpwnam),
            (ownership, "require", lambda prefix, others=(): None),
            (machine, "wait_answer", answer),
            (asking, "helper", helper),
        ):
            stack.enter_context(mock.patch.object(place, name, instead))
        yield


async def answer(version: str) -> None:
    if failing:
        raise errors.DeadlineError("the daemon did not answer")


failing: list[str] = []
running: list[privileged.VmWorld] = []
asked: list[str] = []


def helper(request: privileged.Request[Any]) -> privileged.AnyResult:
    asked.append(type(request).__name__)
    if isinstance(request, privileged.ListWorld):
        return privileged.World(vms=tuple(running), bridge=True)
    return privileged.Done()


def installed(**said: Any) -> None:
    sbin = Path("/usr/local/sbin")
    own = {name: sbin / name for name in ("firecracker", "jailer")}
    chosen = choices.Choices(**{"owner": OWNER, "programs": own, **said})
    asyncio.run(install.Install(chosen, print).run())


def check_stays() -> None:
    """What is not said again stays; what is said is changed, where nothing that runs would suffer."""
    before = settings.read()
    assert before is not None
    anew = {"owner": "", "caller": "daemon", "programs": {}}
    installed(**anew)
    assert settings.read() == before
    with pytest.raises(errors.ConflictError, match=f"installed for {OWNER}"):
        installed(**{**anew, "owner": "daemon"})
    running.append(privileged.VmWorld(vm_id="0123456789ab", vmm_pid=1))
    with pytest.raises(errors.ConflictError, match="in use, by 1 VM"):
        installed(**anew, network="10.98.0.0/16")
    running.clear()
    with pytest.raises(errors.BadRequestError, match=r"10\.98\.0\.0/24 is too small for 4000 VMs"):
        installed(**anew, network="10.98.0.0/24")
    failing.append("it")
    with pytest.raises(errors.DeadlineError):
        installed(**anew, network="10.98.0.0/16")
    other = Path("/usr/local/sbin/other")
    other.write_text("#!/bin/sh\necho 'Firecracker v1.13.0'\n")
    other.chmod(0o755)
    with pytest.raises(errors.DeadlineError):
        installed(**{**anew, "programs": {"firecracker": other}})
    failing.clear()
    assert settings.read() == before
    assert pinned.sha256_of_path(host.RUNTIME / "firecracker") == before.firecracker_sha256
    assert [row.problem for row in runtime.status(host.RUNTIME)] == ["", ""]
    asked.clear()
    installed(**anew, network="10.98.0.0/16")
    assert asked == ["ListWorld", "DeleteBridge"]
    after = settings.read()
    assert after == msgspec.structs.replace(before, network="10.98.0.0/16")
    (host.RUNTIME / "firecracker").write_text("#!/bin/sh\n")
    with pytest.raises(errors.ConflictError, match="firecracker is neither"):
        installed(**anew)
    installed(network=before.network)
    assert settings.read() == before
    check_fetched_once(anew)
    check_own_keys(anew)


def check_owner_gone() -> None:
    """Renamed, it is the owner still, and nobody else; deleted, whoever is named has all that was its."""
    before = settings.read()
    assert before is not None
    uid = before.owner_uid
    image, others = host.STATE / "images/rootfs.ext4", host.STATE / "others"
    image.parent.mkdir()
    for path in (image, others, host.STATE / "banger.db"):
        path.write_text("")
    for path in (image, image.parent, host.STATE / "banger.db"):
        os.chown(path, uid, uid)
    rename, program = f'owner_name = "{OWNER}"', PREFIX / "bin/bangerd"
    program.write_text("#!/bin/sh\nexec cat /var/lib/banger/banger.db\n")
    (host.STATE / "banger.db").chmod(0o600)

    host.INSTALL_TOML.write_text(host.INSTALL_TOML.read_text().replace(rename, 'owner_name = "before"'))
    with pytest.raises(errors.ConflictError, match=f"installed for {OWNER}"):
        installed(owner="daemon", programs={})
    assert host.STATE.stat().st_uid == uid
    installed(owner="", caller="daemon", programs={})
    assert settings.read() == before

    gone = 45678
    text = host.INSTALL_TOML.read_text().replace(f"owner_uid = {uid}", f"owner_uid = {gone}")
    host.INSTALL_TOML.write_text(text.replace(rename, 'owner_name = "before"'))
    for path in (image, image.parent, host.STATE / "banger.db", host.STATE, host.CACHE):
        os.chown(path, gone, gone)
    with pytest.raises(errors.NotFoundError, match=f"uid {gone}") as raised:
        machine.Machine().bangerd(PREFIX, "--check-migrations")
    assert "system install --owner USER" in raised.value.hint
    installed(owner="", caller="daemon", programs={})
    daemon = pwd.getpwnam("daemon")
    for path in (image, image.parent, host.STATE / "banger.db", host.STATE, host.CACHE):
        assert (path.stat().st_uid, path.stat().st_gid) == (daemon.pw_uid, daemon.pw_gid), path
    assert others.stat().st_uid == 0
    assert "User=daemon" in (host.UNIT_DIR / "bangerd.service").read_text()


def check_first_at_once() -> None:
    """Of two that begin at the same moment the second takes away nothing of the first's."""

    def held(_: Path) -> None:
        (host.HELPER / "of-the-first").write_text("")
        raise errors.ConflictError("another installation is under way")

    with mock.patch.object(alone, "on_host", held), pytest.raises(errors.ConflictError, match="another"):
        installed()
    assert (host.HELPER / "of-the-first").exists()
    assert not host.ETC.exists()
    shutil.rmtree(host.HELPER)


def check_loose_umask() -> None:
    """Not even for a moment may others write what root will believe."""
    loose = []
    chmod = Path.chmod

    def seen_before(path: Path, mode: int) -> None:
        if path.stat().st_mode & 0o022:
            loose.append(path)
        chmod(path, mode)

    os.umask(0)
    with mock.patch.object(Path, "chmod", seen_before):
        installed()
    assert not loose


def check_own_keys(anew: dict[str, Any]) -> None:
    """What root has written into install.toml besides: other uids, another bridge."""
    own = 'uid_base = 1900000000\nuid_count = 100\nbridge = "br-mine"\n'
    host.INSTALL_TOML.write_text(host.INSTALL_TOML.read_text() + own)
    installed(**anew)
    assert own in host.INSTALL_TOML.read_text()
    uninstall.uninstall(purge=False, force=False, say=print)
    installed(**anew)
    assert own in host.INSTALL_TOML.read_text()


def check_fetched_once(anew: dict[str, Any]) -> None:
    """The catalog's Firecracker that is installed is not fetched again: here is nowhere to fetch it from."""
    there = {name: pinned.sha256_of_path(host.RUNTIME / name) for name in ("firecracker", "jailer")}
    pins = tuple(
        pinned.PinnedFile(
            name=name,
            version="1.12.1",
            arch="x86_64",
            sha256=sha,
            size_bytes=(host.RUNTIME / name).stat().st_size,
            licence="",
            sources=(),
        )
        for name, sha in there.items()
    )
    with mock.patch.object(runtime, "catalog", return_value=pins):
        installed(**anew, pinned=True)
        installed(**anew)
        assert {file.source for file in runtime.read_record(host.RUNTIME).values()} == {"catalog"}


def check_kept(made: set[str]) -> None:
    """Without --purge all that was decided is found again, and by nobody else; it ends taken off."""
    installed(network="10.98.0.0/16")
    host.SIGNERS.write_text("# mine\n")
    host.CONFIG_TOML.write_text("vcpus = 1\n")
    before = settings.read()
    uninstall.uninstall(purge=False, force=False, say=print)
    assert settings.read() is None
    assert not [link for link in releases.Releases().links() if link.is_symlink()]
    with pytest.raises(errors.NotFoundError, match="any more") as raised:
        uninstall.uninstall(purge=False, force=False, say=print)
    assert "system uninstall --purge" in raised.value.hint
    kept = seen()
    with pytest.raises(errors.ConflictError, match=f"installed for {OWNER}"):
        installed(owner="daemon", programs={})
    assert seen() == kept, seen() ^ kept
    installed(owner="", caller="daemon", programs={})
    check_installed()
    assert settings.read() == before
    assert (host.SIGNERS.read_text(), host.CONFIG_TOML.read_text()) == ("# mine\n", "vcpus = 1\n")
    assert seen() == made, seen() ^ made
    uninstall.uninstall(purge=False, force=False, say=print)


def check_cut_off() -> None:
    """Wherever taking off files is cut off, the same command finishes it."""
    unlink = Path.unlink
    for purge in (True, False):
        for count in (1, 6, 12):
            if not PREFIX.exists():  # purged
                environment(PREFIX)
            installed()
            left = [count]

            def cut(path: Path, missing_ok: bool = False, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                unlink(path, missing_ok=missing_ok)

            with mock.patch.object(Path, "unlink", cut), pytest.raises(KeyboardInterrupt):
                uninstall.uninstall(purge=purge, force=False, say=print)
            with (
                contextlib.nullcontext() if purge else pytest.raises(errors.NotFoundError, match="any more")
            ):
                uninstall.uninstall(purge=purge, force=False, say=print)
            assert not [link for link in releases.Releases().links() if link.is_symlink()]
            assert host.STATE.exists() != purge
    check_purge_cut_off()


def check_purge_cut_off() -> None:
    """Images take their time; whichever directory it is in, the same command finds what is left."""
    uninstall.uninstall(purge=True, force=False, say=print)
    environment(PREFIX)
    before, rmtree = seen(), shutil.rmtree
    for done in range(5):
        installed()
        left = [done]

        def cut(path: Any, ignore_errors: bool = False, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            rmtree(path, ignore_errors=ignore_errors)

        with mock.patch.object(shutil, "rmtree", cut), pytest.raises(KeyboardInterrupt):
            uninstall.uninstall(purge=True, force=False, say=print)
        uninstall.uninstall(purge=True, force=False, say=print)
        environment(PREFIX)
        assert seen() == before, (done, seen() ^ before)


def check_way_back(*, rows: bool) -> None:
    """A newer version does not answer: its rows go back and all with them, or it stays, whole."""
    made = seen()
    asked = []

    def bangerd(self: machine.Machine, prefix: Path, *arguments: str) -> int:
        asked.append((prefix, *arguments, laid.current()))
        if not rows:
            raise errors.ConflictError("VMs were made since")
        return 0

    laid = releases.Releases()
    with (
        mock.patch.object(sys, "prefix", str(NEWER)),
        mock.patch.object(machine.Machine, "bangerd", bangerd),
    ):
        failing.append("it")
        with pytest.raises(errors.DeadlineError) as raised:
            installed()
        failing.clear()
    assert asked == [(PREFIX, "--undo-migrations", NEWER)]
    if rows:
        assert seen() == made, seen() ^ made
        check_installed()
        return
    told = " ".join(raised.value.__notes__)
    assert "VMs were made since" in told
    assert "stays installed" in told
    check_installed(NEWER)
    uninstall.uninstall(purge=True, force=False, say=print)
    assert not [path for path in seen() if "bangerd" in path and "lib/banger" not in path]


def check_alone() -> None:
    """While another one is under way, or without the helper, none goes on, and nothing is touched."""
    made = seen()
    changes: list[Callable[[], None]] = [
        installed,
        lambda: uninstall.uninstall(purge=True, force=True, say=print),
    ]
    with alone.on_host(host.HELPER):
        for change in changes:
            with pytest.raises(errors.ConflictError, match="another installation"):
                change()
            assert seen() == made, seen() ^ made
    # Nor does anything go on without the helper: it is said where to look.
    changes[0] = lambda: installed(network="10.98.0.0/16")
    silent = mock.patch.object(asking, "helper", side_effect=OSError("closed without an answer"))
    for change in changes:
        with silent, pytest.raises(errors.UnavailableError, match="bangerd-root does not answer"):
            change()
        assert seen() == made, seen() ^ made


def check_older_is_refused() -> None:
    """Over a newer version, and over rows that a newer one wrote, before anything is touched."""
    made = seen()
    with (
        mock.patch.object(banger, "__version__", "0.0.1"),
        pytest.raises(errors.ConflictError, match=r"is installed, and 0\.0\.1 is older"),
    ):
        installed()
    rows, program = host.STATE / "banger.db", PREFIX / "bin/bangerd"
    rows.write_bytes(b"of later")
    before = program.read_text()
    program.write_text('#!/bin/sh\n[ "$*" != "--check-migrations --state-dir=/var/lib/banger" ] || exit 2\n')
    with pytest.raises(errors.ConflictError, match="written by a newer banger") as raised:
        installed()
    assert f"sudo -u {OWNER} bangerd --undo-migrations" in raised.value.hint
    program.write_text(before)
    rows.unlink()
    assert seen() == made, seen() ^ made
    check_installed()


def check_installed(prefix: Path = PREFIX) -> None:
    laid = releases.Releases()
    assert laid.current() == prefix
    for link in laid.links():
        assert link.is_symlink(), link
        assert link.resolve().is_relative_to(prefix), link
    text = (host.UNIT_DIR / "bangerd.service").read_text()
    assert f"ExecStart={prefix}/bin/bangerd" in text
    assert f"User={OWNER}" in text
    units = ("bangerd.service", "bangerd-root.socket", "bangerd-build.socket")
    states = run.run(["/usr/local/sbin/systemctl", "is-enabled", *units], deadline_s=30).text
    assert states.split() == ["enabled"] * 3, states


def main(act: str) -> None:
    os.umask(0o022)
    furnish()
    before = seen()
    with played():
        if act == "fails":
            failing.append("it")
            with pytest.raises(errors.DeadlineError):
                installed()
            assert seen() == before, seen() ^ before
            check_nothing_runs()
            return
        if act == "at-once":
            check_first_at_once()
            check_loose_umask()
            return
        if act == "cut-off":
            host.STATE.mkdir()  # such as a disk of its own is mounted on
            check_cut_off()
            return
        installed()
        check_installed()
        if act in ("again", "owner-gone"):
            {"again": check_stays, "owner-gone": check_owner_gone}[act]()
            return
        if act in ("goes-back", "stays"):
            check_way_back(rows=act == "goes-back")
            return
        made = seen()
        if act == "mend-fails":
            check_alone()
            check_older_is_refused()
            failing.append("it")
            with pytest.raises(errors.DeadlineError) as raised:
                installed()
            assert not hasattr(raised.value, "__notes__"), raised.value.__notes__
            assert seen() == made, seen() ^ made
            check_installed()
            return
        (host.HELPER / machine.UPGRADING).write_text("9.9")  # as an upgrade that was cut off leaves it
        installed()
        assert seen() == made, seen() ^ made
        if act == "keep":
            check_kept(made)
        uninstall.uninstall(purge=True, force=False, say=print)
        assert {
            line for line in before if not line.startswith(f"{PREFIX}/") and line.split()[0] != str(PREFIX)
        } == seen(), seen() ^ before
        check_nothing_runs()


if __name__ == "__main__":
    main(sys.argv[1])
