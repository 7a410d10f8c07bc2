# SPDX-License-Identifier: MIT
"""In which order files of tests are run by several workers.

A lab wants all that a processor can give, and the other tests wait most of their time for something. One
after the other, they would leave processors idle first, and then have more labs at once than processors.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

LAB = "tests/lab/"
_FIRST, _LAST = 0.2, 0.75
"""Of the others, before the first lab and the last one: at first what labs start from is being made, and the
last files are those of the unit tests, which wait for nothing.
"""


def spread(files: Sequence[str]) -> list[str]:
    """The files of the lab spread over the others, which keep their order, as they do."""
    labs = [file for file in files if file.startswith(LAB)]
    others = [file for file in files if not file.startswith(LAB)]
    first, step = len(others) * _FIRST, len(others) * (_LAST - _FIRST) / max(1, len(labs))
    placed = [(first + number * step, 0, file) for number, file in enumerate(labs)]
    placed += [(float(number), 1, file) for number, file in enumerate(others)]
    return [file for _, _, file in sorted(placed, key=lambda each: each[:2])]


def by_file(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The tests in the order of `spread`; those of one file as they were."""
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(item.nodeid.split("::")[0], []).append(item)
    return [item for file in spread(list(groups)) for item in groups[file]]
