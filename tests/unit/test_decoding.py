# SPDX-License-Identifier: MIT
"""Decoding in many threads at once, in a process of its own: what goes wrong there ends the interpreter."""

from __future__ import annotations

import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import msgspec

from banger.contract import decoding

ROUNDS = 40
THREADS = 8
DEPTH = 30
TREE = Path(__file__).parents[2]


def structs() -> type[msgspec.Struct]:
    """New classes, of which nothing is known yet, each in the next; the outermost."""
    kind = msgspec.defstruct("S0", [("value", int), ("more", dict[str, list[int]] | None, None)])
    for number in range(1, DEPTH):
        inner = types.GenericAlias(tuple, (kind, ...))
        kind = msgspec.defstruct(
            f"S{number}", [("value", int), ("inner", inner), ("text", str | None, None)]
        )
    return kind


def document() -> dict[str, Any]:
    made: dict[str, Any] = {"value": 0}
    for number in range(1, DEPTH):
        made = {"value": number, "inner": [made]}
    return made


def many() -> None:
    """Two kinds of decoding begin in several threads at the same moment."""
    sys.setswitchinterval(1e-6)
    plain = document()
    data = msgspec.json.encode(plain)

    def decode(number: int, kind: type[msgspec.Struct], together: threading.Barrier) -> None:
        together.wait()
        if number % 2:
            decoding.convert(plain, kind)
        else:
            decoding.json(data, kind)

    for _ in range(ROUNDS):
        shared = structs(), threading.Barrier(THREADS)
        threads = [threading.Thread(target=decode, args=(number, *shared)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def test_threads_may_decode_a_new_kind_at_once() -> None:
    here = "from tests.unit import test_decoding; test_decoding.many()"
    done = subprocess.run(
        [sys.executable, "-c", here], cwd=TREE, capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_there_is_one_decoder_of_a_kind() -> None:
    class Pair(msgspec.Struct):
        left: int

    assert decoding.decoder(Pair) is decoding.decoder(Pair)
    assert (
        decoding.json(b'{"left":1}', Pair)
        == decoding.toml("left = 1", Pair)
        == decoding.convert({"left": 1}, Pair)
    )
