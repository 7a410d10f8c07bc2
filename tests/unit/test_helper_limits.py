# SPDX-License-Identifier: MIT
"""How often the owner may ask root: a burst is free, and then each waits its turn."""

from __future__ import annotations

import pytest

from banger.helper import limits


def test_a_burst_is_free_and_the_rest_comes_at_the_rate() -> None:
    bucket = limits.Bucket(rate=10, burst=3)
    assert [bucket.take(100.0) for _ in range(3)] == [0, 0, 0]
    assert [bucket.take(100.0) for _ in range(3)] == [pytest.approx(wait) for wait in (0.1, 0.2, 0.3)]


def test_it_fills_again_and_holds_no_more_than_the_burst() -> None:
    bucket = limits.Bucket(rate=10, burst=3)
    for _ in range(6):
        bucket.take(100.0)
    assert bucket.take(100.4) == pytest.approx(0.0)
    assert [bucket.take(1000.0) for _ in range(4)] == [0, 0, 0, pytest.approx(0.1)]
