# SPDX-License-Identifier: MIT
"""The random walk in the lab: that a kill of it can be repeated."""

from __future__ import annotations

from tests.lab import crash_walk


def test_what_is_drawn_for_a_kill_follows_from_its_number_alone() -> None:
    drawn = [crash_walk.Draws.of(7, number) for number in range(200)]
    assert drawn == [crash_walk.Draws.of(7, number) for number in range(200)]
    assert crash_walk.Draws.of(7, 150) == drawn[150]
    assert len(set(drawn)) == 200
    assert crash_walk.Draws.of(8, 150) != drawn[150]


def test_every_choice_is_made_and_the_host_dies_seldom() -> None:
    numbers = range(200)
    victims = {
        crash_walk.pick(crash_walk.Draws.of(7, number).victims, crash_walk.VICTIMS) for number in numbers
    }
    assert victims == set(crash_walk.VICTIMS)
    assert [number for number in numbers if crash_walk.is_power(number)] == [49, 99, 149, 199]
    assert all(crash_walk.is_proof(number) for number in numbers if crash_walk.is_power(number))
