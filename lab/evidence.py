# SPDX-License-Identifier: MIT
"""Saves what explains a failed test, while the lab still runs. Used by session."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

from lab import errors, qemu, remote

COMMAND_LIMIT_S = 15
TOTAL_LIMIT_S = 60
JAILS = "/var/lib/banger-root/jails"
VM_LOGS = "/var/lib/banger-root/logs"
LARGEST_LOG = "4M"
PROCESSOR_LOOKS = 10

COMMANDS: dict[str, tuple[str, ...]] = {
    "journal-bangerd.txt": ("journalctl", "--no-pager", "-o", "short-precise", "-u", "bangerd*"),
    "journal.txt": ("journalctl", "--no-pager", "-o", "short-precise", "-b", "-n", "5000"),
    "rows.sql": ("sqlite3", "-readonly", "/var/lib/banger/banger.db", ".dump"),
    "dmsetup-table.txt": ("dmsetup", "table"),
    "dmsetup-info.txt": ("dmsetup", "info"),
    "losetup.txt": ("losetup", "-l"),
    "nft.json": ("nft", "-j", "list", "ruleset"),
    "ip-addr.json": ("ip", "-j", "addr"),
    "ip-route.json": ("ip", "-j", "route"),
    "processes.txt": ("ps", "-eo", "pid,ppid,uid,lstart,cgroup,args"),
    "units.txt": ("systemctl", "--no-pager", "--full", "status", "bangerd*"),
    "mounts.txt": ("findmnt", "--list"),
    "disk-usage.txt": ("df", "-h"),
    "files.txt": (
        "find",
        "/var/lib/banger",
        "/var/lib/banger-root",
        "/run/banger",
        "/run/banger-root",
        "-ls",
    ),
}


def save(
    source: Path, shell: remote.Shell | None, directory: Path, machine: qemu.Machine | None = None
) -> None:
    """Save everything that can be had; what cannot be had leaves its reason in problems.txt."""
    directory.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    for name in (qemu.CONSOLE, qemu.QEMU_LOG):
        with contextlib.suppress(OSError):
            shutil.copyfile(source / name, directory / name)
    if machine is not None:
        _look_at_processors(machine, directory, problems)
    if shell is None:
        problems.append("the lab was switched off")
    else:
        _ask(shell, directory, problems)
    if problems:
        (directory / "problems.txt").write_text("\n".join(problems) + "\n")


def _look_at_processors(machine: qemu.Machine, directory: Path, problems: list[str]) -> None:
    """Some looks at where each is: of a lab that hangs there is nothing else to see."""
    try:
        with machine.control() as control, (directory / "processors.txt").open("w") as file:
            for _ in range(PROCESSOR_LOOKS):
                file.write(control.human("info registers -a"))
    except errors.LabError as error:
        problems.append(f"processors: {error}")


def _ask(shell: remote.Shell, directory: Path, problems: list[str]) -> None:
    deadline = time.monotonic() + TOTAL_LIMIT_S
    for name, argv in COMMANDS.items():
        if time.monotonic() > deadline:
            problems.append(f"no time left for {name}")
            continue
        try:
            result = shell.run(argv, timeout_s=COMMAND_LIMIT_S, check=False)
        except errors.LabError as error:
            problems.append(f"{name}: {error}")
        else:
            (directory / name).write_bytes(result.stdout + result.stderr)
    for place in (JAILS, VM_LOGS):
        _copy_small_files(shell, place, directory, problems)


def _copy_small_files(shell: remote.Shell, place: str, directory: Path, problems: list[str]) -> None:
    """Bring logs and consoles of the VMs, but neither disks nor kernels."""
    find = ["find", place, "-xdev", "-type", "f", "-size", f"-{LARGEST_LOG}", "-print0"]
    archive = directory / f"{Path(place).name}.tar"
    try:
        names = shell.run(find, timeout_s=COMMAND_LIMIT_S, check=False)
        if names.stdout:
            pack = ["tar", "-c", "--null", "--files-from=-", "-f", "-"]
            archive.write_bytes(
                shell.run(pack, stdin=names.stdout, timeout_s=COMMAND_LIMIT_S, check=False).stdout
            )
    except errors.LabError as error:
        problems.append(f"{place}: {error}")
