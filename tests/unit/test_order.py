# SPDX-License-Identifier: MIT
"""Files of the lab are spread over the others, and nothing is lost or turned round."""

from __future__ import annotations

import itertools

import pytest

from tests import order

OTHERS = [f"tests/unit/test_{number:03}.py" for number in range(100)]
LABS = [f"{order.LAB}test_{number:03}.py" for number in range(20)]


@pytest.mark.parametrize(("others", "labs"), [(100, 20), (100, 0), (0, 20), (1, 20), (3, 1), (0, 0)])
def test_nothing_is_lost_and_each_keeps_its_order(others: int, labs: int) -> None:
    files = [*OTHERS[:others], *LABS[:labs]]
    found = order.spread(files)
    assert sorted(found) == sorted(files)
    assert [file for file in found if file in OTHERS] == OTHERS[:others]
    assert [file for file in found if file in LABS] == LABS[:labs]


def test_labs_come_after_a_while_and_never_two_in_a_row() -> None:
    found = order.spread([*LABS, *OTHERS])
    assert found[:20] == OTHERS[:20]
    lengths = [
        len(list(group)) for is_lab, group in itertools.groupby(found[20:], LABS.__contains__) if is_lab
    ]
    assert lengths == [1] * 20
    assert 80 < found.index(LABS[-1]) < 100
