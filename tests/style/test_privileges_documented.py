# SPDX-License-Identifier: MIT
"""docs/privileges.md and the units keep step with the code: operations, capabilities, absences."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from banger.contract import names, privileged
from banger.helper.linux import caps
from banger.system.doctor import services

TREE = Path(__file__).parents[2]
PAGE = (TREE / "docs" / "privileges.md").read_text()
UNIT = (TREE / "units" / "bangerd-root.service").read_text()


def test_every_operation_is_a_row_and_every_row_an_operation() -> None:
    section = PAGE.partition("## The operations")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z_]+)` \| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    assert [row[0] for row in rows] == [each.__struct_config__.tag for each in privileged.REQUEST_TYPES]


def test_every_capability_is_named_and_bounded_by_the_unit() -> None:
    listed = re.search(r"^Linux capabilities: ((?:`[A-Z_]+`\s)+)", PAGE, re.MULTILINE)
    assert listed is not None
    assert {name.lower() for name in re.findall(r"`([A-Z_]+)`", listed[1])} == set(caps.CAPABILITIES)
    bounded = " ".join(re.findall(r"^CapabilityBoundingSet=(.+)$", UNIT, re.MULTILINE)).split()
    assert {name.removeprefix("CAP_").lower() for name in bounded} == set(caps.CAPABILITIES)


UNCOUNTED = {
    "bangerd": (
        "Wants=bangerd-root.socket bangerd-build.socket",
        "After=bangerd-root.socket bangerd-build.socket network.target",
        "WantedBy=multi-user.target",
        "Type=notify",
        "Environment=BANGER_HOST_BOOT_ID=%b",
        "Restart=on-failure",
        "KillMode=mixed",
        "TimeoutStartSec=300",
        "TimeoutStopSec=60",
        "RuntimeDirectory=banger",
        "RuntimeDirectoryPreserve=restart",
        "StateDirectory=banger",
        "CacheDirectory=banger",
        "LimitNOFILE=65536",
        "NotifyAccess=main",
        "StartLimitIntervalSec=0",
        "RestartSec=1s",
        "WatchdogSec=60s",
        "LimitCORE=0",
        "RuntimeDirectoryMode=0700",
        "StateDirectoryMode=0700",
        "CacheDirectoryMode=0700",
        "TasksMax=4096",
        "AmbientCapabilities=",
        "KeyringMode=private",
        "SystemCallErrorNumber=EPERM",
        "PrivateIPC=yes",
        "DevicePolicy=closed",
        "SystemCallFilter=~@privileged @resources",
    ),
    "bangerd-build@": (
        "CollectMode=inactive-or-failed",
        "Type=exec",
        "Environment=TMPDIR=/var/tmp",
        "TimeoutStopSec=10",
        "ExecStart=/bin/sh -euc 'uid=$$((2099995904 + $${1%%%%-*} %% 4096)); exec /usr/bin/setpriv "
        '"--reuid=$$uid" "--regid=$$uid" --clear-groups '
        "/usr/local/lib/banger/bin/python -I -B -m banger.builder.main' build %i",
        "StandardInput=socket",
        "StandardOutput=journal",
        "StandardError=journal",
        "SyslogIdentifier=bangerd-build",
        "NotifyAccess=main",
        "WatchdogSec=60",
        "WatchdogSignal=SIGKILL",
        "KillSignal=SIGKILL",
        "RuntimeMaxSec=2100",
        "TasksMax=1024",
        "MemoryMax=2G",
        "MemorySwapMax=1G",
        "OOMScoreAdjust=500",
        "IOSchedulingPriority=7",
        "LimitCORE=0",
        "CapabilityBoundingSet=CAP_SETUID CAP_SETGID",
        "AmbientCapabilities=",
        "KeyringMode=private",
        "SystemCallErrorNumber=EPERM",
        "PrivateIPC=yes",
        "DevicePolicy=closed",
        "SystemCallFilter=@system-service",
        "SystemCallFilter=~@privileged @resources",
        "SystemCallFilter=capset setgroups setresgid setresuid",
        "SystemCallFilter=~@keyring io_uring_enter io_uring_register io_uring_setup userfaultfd",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
        "RestrictNamespaces=yes",
        "InaccessiblePaths=-/var/lib/banger -/var/lib/banger-root -/var/cache/banger",
        "TemporaryFileSystem=/run:ro /dev/shm:mode=1777",
        "PrivateNetwork=yes",
        "IPAddressDeny=any",
        "IPAddressAllow=localhost",
        "BindReadOnlyPaths=-/run/systemd/notify",
        "BindReadOnlyPaths=-/run/systemd/resolve/resolv.conf -/run/systemd/resolve/stub-resolv.conf",
        "BindReadOnlyPaths=-/run/resolvconf -/run/NetworkManager/resolv.conf -/run/connman/resolv.conf "
        "-/run/netconfig",
    ),
    "bangerd-root": (
        "Requires=bangerd-root.socket",
        "Requires=banger-vms.service",
        "After=bangerd-root.socket banger-vms.service",
        "Wants=modprobe@loop.service modprobe@dm_snapshot.service modprobe@tun.service modprobe@kvm.service",
        "After=modprobe@loop.service modprobe@dm_snapshot.service modprobe@tun.service modprobe@kvm.service",
        "Type=notify",
        "Restart=on-failure",
        "KillMode=mixed",
        "TimeoutStartSec=300",
        "TimeoutStopSec=30",
        "StateDirectory=banger-root",
        "OOMScoreAdjust=-500",
        "NotifyAccess=main",
        "StartLimitIntervalSec=0",
        "RestartSec=500ms",
        "StateDirectoryMode=0711",
        "TasksMax=512",
        "MemoryMax=512M",
        "OOMPolicy=continue",
        "LimitCORE=0",
        "KeyringMode=private",
        "SystemCallErrorNumber=EPERM",
        "SystemCallFilter=@system-service mount umount2 pivot_root seccomp",
        "SystemCallFilter=~@aio @ipc @keyring @memlock @resources setns splice tee userfaultfd vmsplice",
        "SystemCallFilter=memfd_create pipe pipe2",
        "RestrictAddressFamilies=AF_UNIX AF_NETLINK AF_INET AF_INET6",
        "RestrictNamespaces=mnt pid",
        "PrivateIPC=yes",
        "LimitNOFILE=4096",
        "ReadWritePaths=-/var/lib/banger",
        "ReadWritePaths=/sys/fs/cgroup/banger.slice",
        "DevicePolicy=closed",
        "DeviceAllow=/dev/loop-control rw",
        "DeviceAllow=block-loop rwm",
        "DeviceAllow=/dev/mapper/control rw",
        "DeviceAllow=block-device-mapper rwm",
        "DeviceAllow=/dev/net/tun rw",
    ),
}
"""What `systemd-analyze security` does not count, or not to the last word. Repeated ones are here whole."""
OTHERS = {
    "bangerd-root.socket": (
        "ListenStream=/run/banger-root/bangerd-root.sock",
        "SocketMode=0600",
        "SocketUser=@OWNER@",
        "DirectoryMode=0711",
        "RemoveOnStop=yes",
        "Backlog=256",
        "WantedBy=sockets.target",
    ),
    "bangerd-build.socket": (
        "ListenStream=/run/banger-build/bangerd-build.sock",
        "SocketMode=0600",
        "SocketUser=@OWNER@",
        "DirectoryMode=0711",
        "RemoveOnStop=yes",
        "Accept=yes",
        "MaxConnections=8",
        "WantedBy=sockets.target",
    ),
    "banger-vms.service": (
        "Type=exec",
        "ExecStart=/usr/bin/sleep infinity",
        "DynamicUser=yes",
        "Slice=banger.slice",
        "Delegate=cpu io memory pids",
        "RemainAfterExit=yes",
        "SuccessExitStatus=SIGKILL SIGTERM",
        "OOMPolicy=continue",
        "OOMScoreAdjust=-900",
        "KillSignal=SIGHUP",
        "TimeoutStopSec=10",
        "TasksMax=infinity",
        "LimitCORE=0",
        "DevicePolicy=closed",
        "DeviceAllow=/dev/kvm rwm",
        "DeviceAllow=/dev/net/tun rwm",
        "DeviceAllow=/dev/userfaultfd m",
        "DeviceAllow=block-loop rw",
        "DeviceAllow=block-device-mapper rw",
    ),
    "banger-guests.service": (
        "After=bangerd.service bangerd-root.socket bangerd-root.service banger-vms.service network.target",
        "WantedBy=multi-user.target",
        "Type=oneshot",
        "RemainAfterExit=yes",
        "ExecStop=/usr/local/lib/banger/bin/banger system stop-vms",
        "User=@OWNER@",
        "TimeoutStopSec=120",
        "UMask=0077",
        "CapabilityBoundingSet=",
        "NoNewPrivileges=yes",
        "SystemCallArchitectures=native",
        "SystemCallFilter=@system-service",
        "SystemCallFilter=~@privileged @resources",
        "SystemCallErrorNumber=EPERM",
        "RestrictAddressFamilies=AF_UNIX",
        "RestrictNamespaces=yes",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "LockPersonality=yes",
        "MemoryDenyWriteExecute=yes",
        "KeyringMode=private",
        "RemoveIPC=no",
        "ProtectSystem=strict",
        "ProtectHome=yes",
        "PrivateTmp=yes",
        "PrivateDevices=yes",
        "PrivateNetwork=yes",
        "PrivateUsers=yes",
        "ProtectHostname=yes",
        "ProtectClock=yes",
        "ProtectKernelLogs=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelTunables=yes",
        "ProtectControlGroups=yes",
        "ProtectProc=invisible",
        "ProcSubset=pid",
        "DevicePolicy=closed",
    ),
}
"""Units that run nothing of ours, or nothing for longer than a moment: all that they say, but for whom."""
REPEATED = (
    "DeviceAllow",
    "ReadWritePaths",
    "SystemCallFilter",
    "RestrictAddressFamilies",
    "RestrictNamespaces",
    "BindReadOnlyPaths",
    "IPAddressAllow",
)


def written(unit: str) -> str:
    return (TREE / "units" / f"{unit}.service").read_text()


@pytest.mark.parametrize("unit", UNCOUNTED)
def test_what_is_not_counted_is_as_it_was(unit: str) -> None:
    lines = written(unit).splitlines()
    assert not set(UNCOUNTED[unit]) - set(lines)
    if unit != "bangerd":
        assert sorted(line for line in lines if line.startswith(REPEATED)) == sorted(
            line for line in UNCOUNTED[unit] if line.startswith(REPEATED)
        )


@pytest.mark.parametrize("unit", OTHERS)
def test_sockets_and_the_vms_own_unit_are_as_they_were(unit: str) -> None:
    lines = (TREE / "units" / unit).read_text().splitlines()
    told = re.compile(r"(?!Description=|Documentation=)[A-Z][A-Za-z0-9]+=")
    assert tuple(line for line in lines if told.match(line)) == OTHERS[unit]


def test_every_unit_is_looked_at() -> None:
    assert {path.name for path in (TREE / "units").iterdir()} == {
        *OTHERS,
        *(f"{unit}.service" for unit in UNCOUNTED),
    }


@pytest.mark.parametrize("unit", UNCOUNTED)
def test_exposure_is_what_the_page_says_row_by_row(unit: str, tmp_path: Path) -> None:
    """Each directive that is taken away, or made wider, is a row that the page has not."""
    file = tmp_path / f"{unit}.service"
    file.write_text(written(unit).replace("@OWNER@", "daemon"))
    analyse = ["systemd-analyze", "security", "--offline=yes", "--no-pager"]
    rows = subprocess.run(
        [*analyse, "--json=short", file], check=True, capture_output=True, timeout=30
    ).stdout
    counted = {row["name"]: float(row["exposure"]) for row in json.loads(rows) if row["exposure"]}
    assert counted == documented(unit)
    limit = services.EXPOSURE_LIMITS[f"{unit}.service"]
    threshold = f"--threshold={round(limit * 10)}"
    subprocess.run([*analyse, threshold, file], check=True, capture_output=True, timeout=30)


@pytest.mark.parametrize("unit", ["bangerd", "banger-guests"])
def test_the_owner_s_other_programs_keep_their_shared_memory(unit: str) -> None:
    """By uid, and on the host whatever namespace the unit has: systemd.exec(5), RemoveIPC=."""
    lines = written(unit).splitlines()
    assert "User=@OWNER@" in lines
    assert "RemoveIPC=no" in lines


def documented(unit: str) -> dict[str, float]:
    """The rows of one unit in the table of what is counted."""
    table = PAGE.partition("| unit | counted | costs | because |\n|---|---|---|---|\n")[2].partition("\n\n")[
        0
    ]
    found: dict[str, float] = {}
    current = ""
    for line in table.splitlines():
        row = re.fullmatch(r"\| (?:`([a-z@-]+)`)? ?\| `(.+?)` \| ([0-9.]+) \| (.+) \|", line)
        assert row is not None, line
        current = row[1] or current
        if current == unit:
            found[row[2].replace("\\|", "|")] = float(row[3])
    return found


@pytest.mark.parametrize("unit", UNCOUNTED)
def test_absences_in_the_unit_are_explained_in_both_places(unit: str) -> None:
    absent = set(re.findall(r"([A-Z][A-Za-z]+)=", written(unit).partition("# Absent, and why:")[2]))
    assert absent
    section = PAGE.partition("Everything that it still counts")[2]
    missing = [name for name in absent if f"{name}=" not in section]
    assert not missing, f"not in docs/privileges.md: {missing}"


@pytest.mark.parametrize("resource", ["CPU", "IO"])
def test_a_build_counts_for_less_than_the_vms_beside_it(resource: str) -> None:
    """Weights are compared among neighbours alone: in another slice it would be as much as all VMs."""
    build, vms = written("bangerd-build@").splitlines(), written("banger-vms").splitlines()
    assert {line for line in build if line.startswith("Slice=")} == {"Slice=banger.slice"}
    assert "Slice=banger.slice" in vms
    [weight] = [line.partition("=")[2] for line in build if line.startswith(f"{resource}Weight=")]
    assert 1 <= int(weight) <= 20
    assert not [line for line in vms if line.startswith(f"{resource}Weight=")]  # so it is 100


@pytest.mark.parametrize(
    ("instance", "uid"),
    [
        ("0-1234-1000", names.BUILD_UIDS[0]),
        ("1-1234-0", names.BUILD_UIDS[1]),
        ("4095-1_2-1000", names.BUILD_UIDS[-1]),
        ("4096-1-1000", names.BUILD_UIDS[0]),
        (f"{2**32 - 1}-unknown", names.BUILD_UIDS[-1]),
        ("1_2-1-1", None),
        ("", None),
    ],
)
def test_each_build_has_a_uid_that_no_vm_has(instance: str, uid: int | None) -> None:
    """The command of the unit as systemd hands it to the shell, with what it does made visible."""
    [line] = re.findall(r"^ExecStart=(.+)$", written("bangerd-build@"), re.MULTILINE)
    line = line.replace("%i", instance).replace("%%", "%").replace("$$", "$")
    said = subprocess.run(
        shlex.split(line.replace("exec /usr/bin/setpriv", "exec echo")),
        check=False,
        capture_output=True,
        timeout=10,
    )
    if uid is None:
        assert (said.returncode != 0, said.stdout) == (True, b"")
    else:
        assert said.stdout.split()[:3] == [
            f"--reuid={uid}".encode(),
            f"--regid={uid}".encode(),
            b"--clear-groups",
        ]


def test_defaults_are_those_of_the_code() -> None:
    assert f"{names.UID_BASE:,}" in PAGE
    assert names.NETWORK in PAGE
    assert names.CGROUP_PARENT in PAGE


def test_doctor_keeps_the_limits_of_exposure() -> None:
    rows = re.findall(r"^\| `([a-z@-]+\.service)` \| [0-9.]+ \| ([0-9.]+) \|$", PAGE, re.MULTILINE)
    assert {unit: float(limit) for unit, limit in rows} == services.EXPOSURE_LIMITS
