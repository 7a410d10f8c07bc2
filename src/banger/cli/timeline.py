# SPDX-License-Identifier: MIT
"""The steps of a VM's last start, in the order in which they began, and the stages that they are of."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from banger.contract import resources


class Shown(NamedTuple):
    """A step with its stage, and whether it is a part of the step before it that has no such mark."""

    stage: str
    step: resources.StepTiming
    is_part: bool


def total_ms(steps: tuple[resources.StepTiming, ...]) -> float:
    return max((step.started_ms + step.elapsed_ms for step in steps), default=0.0)


def took_ms(shown: Iterable[Shown]) -> float:
    return sum(each.step.elapsed_ms for each in shown if not each.is_part)


def shown(steps: Iterable[resources.StepTiming]) -> Iterator[Shown]:
    """As they began. One without a stage is part of what was shown last, as in the progress."""
    stage, whole_ends_ms = resources.Stage.PREFLIGHT.value, 0.0
    for step in sorted(steps, key=lambda each: (each.started_ms, -each.elapsed_ms)):
        ends_ms = step.started_ms + step.elapsed_ms
        is_part = ends_ms <= whole_ends_ms
        if not is_part:
            stage, whole_ends_ms = step.stage or stage, ends_ms
        yield Shown(stage, step, is_part)


def by_stage(steps: Iterable[resources.StepTiming]) -> Iterator[tuple[str, float]]:
    """Each stage and the milliseconds that its steps took."""
    for stage, group in itertools.groupby(shown(steps), key=lambda each: each.stage):
        yield stage, took_ms(group)
