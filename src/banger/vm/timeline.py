# SPDX-License-Identifier: MIT
"""What became of each step: kept for `vm show`, logged, and told to whoever watches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import msgspec

from banger import steps
from banger.contract import errors, resources
from banger.vm import host, record

_log = logging.getLogger(__name__)


class Timeline:
    """Observer of one pipeline run."""

    def __init__(self, vm_id: str, on_stage: Callable[[str, str], None]) -> None:
        self._vm_id = vm_id
        self._on_stage = on_stage
        self._stage = ""
        self._zero = time.monotonic()
        self.timings: list[resources.StepTiming] = []
        self.failed_step = ""

    def began(self, step: steps.Step, name: str) -> None:
        """A stage is announced once, by its first step."""
        if step.stage and name == step.name and step.stage != self._stage:
            self._stage = step.stage
            self._on_stage(step.stage, step.detail)

    def ended(self, step: steps.Step, name: str, elapsed_s: float, error: BaseException | None) -> None:
        self.timings.append(
            resources.StepTiming(
                name=name,
                stage=step.stage,
                started_ms=round((time.monotonic() - self._zero - elapsed_s) * 1000, 3),
                elapsed_ms=round(elapsed_s * 1000, 3),
            )
        )
        extra = {
            "vm": self._vm_id,
            "step": name,
            "elapsed_ms": round(elapsed_s * 1000, 1),
            **step.attributes,
        }
        if error is None:
            _log.debug("step done", extra=extra)
            return
        if name == step.name:
            self.failed_step = name
        _log.warning("step failed", extra={**extra, "error": str(error) or type(error).__name__})


def kept(records: host.Records, vm: record.VmRecord, seen: Timeline) -> record.VmRecord:
    """The row of a VM that has started, with its timings: not worth failing a start that is done."""
    timed = msgspec.structs.replace(vm, last_start=tuple(seen.timings))
    try:
        records.save(timed)
    except errors.BangerError as error:
        _log.warning("the timings of a start are lost", extra={"vm": vm.id, "error": error.message})
    return timed
