# SPDX-License-Identifier: MIT
"""Every parser that reads bytes from outside, fuzzed for a moment, and against all that was ever found.

`make fuzz TARGET=dns SECONDS=3600` goes on for longer. The guest binary's own are in
contract/test_guest_fuzz.py.
"""

from __future__ import annotations

import contextlib
import functools
import random
from pathlib import Path

import pytest

from banger.contract import privileged
from banger.helper import server as helper_server
from tests.fuzz import engine, targets

RUN_S = 0.5
SEED = random.SystemRandom().randrange(1 << 32)
FOUND = sorted((Path(__file__).parents[1] / "fuzz" / "found").glob("*/*"))


@functools.cache
def target(name: str) -> engine.Target:
    return targets.TARGETS[name]()


@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_moment_of_fuzzing_finds_nothing(name: str) -> None:
    fuzzer = engine.Fuzzer(target(name), random.Random(SEED))
    fuzzer.fuzz(RUN_S)
    print(f"seed {SEED}: {fuzzer.runs} runs, {fuzzer.covered} pairs of lines")
    assert fuzzer.runs >= len(fuzzer.target.seeds)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_what_it_begins_with_is_what_the_parser_takes(name: str) -> None:
    """Mutations of what is refused at its first byte would try little else."""
    seeds = target(name).seeds
    refused = [seed for seed in seeds if not _is_taken(target(name), seed)]
    assert len(refused) <= len(seeds) // 2, refused


def _is_taken(aimed: engine.Target, data: bytes) -> bool:
    try:
        aimed.run(data)
    except aimed.expected:
        return False
    return True


def test_each_request_to_root_is_one_to_begin_with() -> None:
    seeds = [helper_server._decode(seed[4:]).request for seed in target("helper").seeds]
    assert {type(seed) for seed in seeds} == set(privileged.REQUEST_TYPES)


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_found_is_mended(path: Path) -> None:
    found = target(path.parent.name)
    with contextlib.suppress(*found.expected):
        found.run(path.read_bytes())


def test_the_fuzzer_finds_what_is_hidden_behind_branches() -> None:
    """In a parser that is wrong on purpose: without following its lines, one in 2^24 inputs would do."""

    def fragile(data: bytes) -> None:
        if data[:1] != b"F":
            return
        if data[1:2] != b"U":
            return
        if data[2:3] != b"Z":
            return
        raise KeyError("found")

    aimed = engine.Target("fragile", fragile, [b"..."], ())
    with pytest.raises(engine.FoundError) as caught:
        engine.Fuzzer(aimed, random.Random(1), follows=__file__).fuzz(30)
    assert caught.value.data.startswith(b"FUZ")
    assert isinstance(caught.value.__cause__, KeyError)
