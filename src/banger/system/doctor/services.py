# SPDX-License-Identifier: MIT
"""Probes of the two services: active, answering, confined as promised, in step, and nothing forgotten."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import banger
from banger.contract import errors, privileged, sizes
from banger.system import host
from banger.system.doctor import installed, report
from banger.system.doctor import scene as scenes

_SHOWN: Final = 5
EXPOSURE_LIMITS: Final = {
    "bangerd.service": 1.2,
    "bangerd-root.service": 4.0,
    "bangerd-build@.service": 1.6,
}
"""docs/privileges.md promises them."""
_RESTART: Final = "sudo banger system restart"
_EXPOSURE: Final = re.compile(r": ([0-9]+(?:\.[0-9]+)?) ")
_PROPERTIES: Final = "Id,LoadState,ActiveState,SubState,UnitFileState,NeedDaemonReload"
_WANTED: Final = {name: True for name in host.ENABLED} | {"banger-vms.service": False}
"""Units that must be active always, and whether they must start with the host by themselves."""


def daemon(scene: scenes.Scene) -> report.Finding:
    """bangerd answers; the unit's state explains why it does not."""
    scene.settings()
    try:
        info = scene.info()
    except PermissionError:
        raise
    except OSError as error:
        return _silent(scene, error, "bangerd", host.API_SOCKET, "bangerd.service")
    return report.passed(
        f"{info.version} answers, pid {info.pid}, since {info.started_at:%Y-%m-%d %H:%M} UTC"
    )


def helper(scene: scenes.Scene) -> report.Finding:
    """bangerd-root answers; a request starts it when it does not run."""
    scene.settings()
    try:
        found = scene.helper()
    except PermissionError:
        raise
    except OSError as error:
        return _silent(scene, error, "bangerd-root", host.HELPER_SOCKET, "bangerd-root.socket")
    except errors.BangerError as error:
        return report.failed(f"bangerd-root refuses: {error.message}", error.hint or _RESTART)
    return report.passed(f"{found.version} answers")


def _silent(scene: scenes.Scene, error: OSError, service: str, path: object, unit: str) -> report.Finding:
    """`unit` is what starts the service."""
    return report.failed(
        f"{service} does not answer at {path}: {error.strerror or error}{_state(scene, unit)}",
        f"sudo systemctl restart {unit.removesuffix('.service')} "
        f"(why it did not run: journalctl -u {service})",
    )


def _state(scene: scenes.Scene, unit: str) -> str:
    """For the end of a message; empty when systemd cannot be asked."""
    try:
        found = _units(scene).get(unit, {})
    except (scenes.UnseenError, errors.BangerError):
        return ""
    return f"; {unit} is {found.get('ActiveState', 'unknown')} ({found.get('SubState', '')})"


def units(scene: scenes.Scene) -> report.Finding:
    """The units are active, start with the host, and systemd knows their files as they are."""
    scene.settings()
    found = _units(scene)
    for name, at_boot in _WANTED.items():
        unit = found.get(name, {})
        if unit.get("SubState") == "auto-restart":
            return report.failed(
                f"{name} ends whenever it is started, and is started again",
                f"journalctl -u {name.partition('.')[0]} (why it ends; mended, it starts by itself)",
            )
        if unit.get("ActiveState") != "active":
            return report.failed(
                f"{name} is {unit.get('ActiveState', 'unknown')} ({unit.get('SubState', '')})",
                f"sudo systemctl start {name}",
            )
        if at_boot and unit.get("UnitFileState") != "enabled":
            return report.failed(
                f"{name} does not start with the host: it is {unit.get('UnitFileState') or 'unknown'}",
                f"sudo systemctl enable {name}",
            )
    stale = [name for name, unit in found.items() if unit.get("NeedDaemonReload") == "yes"]
    if stale:
        return report.warned(
            f"systemd runs older files of {', '.join(stale)}", f"sudo systemctl daemon-reload && {_RESTART}"
        )
    return report.passed(f"{', '.join(_WANTED)} active")


def _units(scene: scenes.Scene) -> dict[str, dict[str, str]]:
    said = scene.run("systemctl", "show", "--no-pager", f"--property={_PROPERTIES}", *host.LOADED).text
    found: dict[str, dict[str, str]] = {}
    for block in said.split("\n\n"):
        unit = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        found[unit.get("Id", "")] = unit
    return found


@dataclass(frozen=True, slots=True)
class Socket:
    """A service's socket: its owner's alone, from the moment it is made."""

    path: str
    units: str
    """That make it anew."""
    mode: int = 0o600

    def __call__(self, scene: scenes.Scene) -> report.Finding:
        given = scene.settings()
        return installed.owned(
            scene,
            self.path,
            uid=given.owner_uid,
            name=given.owner_name,
            mode=self.mode,
            remedy=f"sudo systemctl restart {self.units} ({self.path} is made anew)",
        )


@dataclass(frozen=True, slots=True)
class Exposure:
    """What `systemd-analyze security` says of a service, against what the documentation promises."""

    unit: str

    def __call__(self, scene: scenes.Scene) -> report.Finding:
        scene.settings()
        done = scene.run(
            "systemd-analyze", "security", "--no-pager", self.unit, deadline_s=scene.long_program_s
        )
        last = (done.text.strip().splitlines() or [""])[-1]
        found = _EXPOSURE.search(last)
        if found is None:
            return report.warned(
                f"systemd-analyze says no exposure: {last or 'nothing'}",
                f"systemd-analyze security {self.unit}",
            )
        limit = EXPOSURE_LIMITS[self.unit]
        if float(found[1]) > limit:
            return report.failed(
                f"exposure {found[1]}, and {limit} is promised", f"systemd-analyze security {self.unit}"
            )
        return report.passed(f"exposure {found[1]}, at most {limit} is promised")


def versions(scene: scenes.Scene) -> report.Finding:
    """CLI, daemon and helper are of one version."""
    info, root = scene.require_daemon(), scene.require_helper()
    found = {"banger": banger.__version__, "bangerd": info.version, "bangerd-root": root.version}
    said = ", ".join(f"{name} {version}" for name, version in found.items())
    if root.protocol != privileged.PROTOCOL_VERSION:
        return report.failed(f"bangerd-root speaks protocol {root.protocol}: {said}", _RESTART)
    if len(set(found.values())) > 1:
        return report.failed(f"not in step: {said}", _RESTART)
    return report.passed(f"all {banger.__version__}")


def leftovers(scene: scenes.Scene) -> report.Finding:
    """Everything of banger's on the host has an owner."""
    found = scene.inventory()
    left = found.leftovers
    if left:
        shown = "; ".join(f"{thing.kind} {thing.name} ({thing.why})" for thing in left[:_SHOWN])
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        return report.warned(f"nobody owns {shown}{more}", "banger gc --apply")
    return report.passed(f"{sizes.counted(len(found.things), 'thing')}, and each has its owner")
