# SPDX-License-Identifier: MIT
"""A check, what it finds, and how all run: side by side, each with a deadline, none ending the others."""

from __future__ import annotations

import enum
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from banger.contract import errors
from banger.system.doctor import scene as scenes

_OURS: Final = "this is a fault in banger: report it with the line above"


class Status(enum.StrEnum):
    """`skip`: this user, or a service that does not answer, kept it from being looked at."""

    PASS = "pass"  # noqa: S105 - no password
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a probe found. Whatever does not pass has a remedy: the command to run, or where to look."""

    status: Status
    detail: str
    remedy: str = ""


def passed(detail: str) -> Finding:
    return Finding(Status.PASS, detail)


def warned(detail: str, remedy: str) -> Finding:
    return Finding(Status.WARN, detail, remedy)


def failed(detail: str, remedy: str) -> Finding:
    return Finding(Status.FAIL, detail, remedy)


@dataclass(frozen=True, slots=True)
class Check:
    """One row. `feature` is what suffers when it fails."""

    name: str
    feature: str
    run: Callable[[scenes.Scene], Finding]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the report, as `--json` gives it."""

    check: str
    feature: str
    status: Status
    detail: str
    remedy: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    rows: tuple[Row, ...]

    def counts(self) -> dict[str, int]:
        return {str(status): sum(row.status is status for row in self.rows) for status in Status}

    def is_good(self, *, strict: bool) -> bool:
        """No row fails; when strict, every row passes."""
        bad = set(Status) - {Status.PASS} if strict else {Status.FAIL}
        return not any(row.status in bad for row in self.rows)


def examine(checks: Sequence[Check], scene: scenes.Scene) -> Report:
    """Runs all of them at once; a row for each, in their order."""
    running = [_Running(check, scene) for check in checks]
    return Report(rows=tuple(each.row() for each in running))


class _Running:
    """One check in its own thread, which nobody waits for longer than its deadline."""

    def __init__(self, check: Check, scene: scenes.Scene) -> None:
        self._check = check
        self._scene = scene
        self._found: Finding | None = None
        self._deadline = time.monotonic() + scene.limit_s
        self._thread = threading.Thread(target=self._work, name=f"doctor-{check.name}", daemon=True)
        self._thread.start()

    def row(self) -> Row:
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        found = self._found or failed(
            f"the check was not done after {self._scene.limit_s:g} s",
            "see what keeps this host busy: `top`; give it longer: banger doctor --timeout 5m",
        )
        return Row(
            check=self._check.name,
            feature=self._check.feature,
            status=found.status,
            detail=found.detail,
            remedy=found.remedy,
        )

    def _work(self) -> None:
        self._found = judge(self._check, self._scene)


def judge(check: Check, scene: scenes.Scene) -> Finding:
    """What the probe finds; whatever it raises is a finding too."""
    try:
        return check.run(scene)
    except scenes.UnseenError as error:
        return Finding(Status.SKIP, error.why, error.remedy)
    except PermissionError as error:
        if scene.is_root:
            return failed(f"root may not look: {error}", "see the message")
        return Finding(Status.SKIP, f"this user may not look: {_described(error)}", "sudo banger doctor")
    except errors.BangerError as error:
        return failed(error.message, error.hint or "see the message")
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(at.filename).name}:{at.lineno}"
        return failed(f"the check itself failed: {type(error).__name__}: {error} ({where})", _OURS)


def _described(error: OSError) -> str:
    parts: Iterable[object] = filter(None, (error.filename, error.strerror or str(error)))
    return ": ".join(map(str, parts))
