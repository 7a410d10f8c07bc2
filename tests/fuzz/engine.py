# SPDX-License-Identifier: MIT
"""Coverage-guided fuzzing of Python parsers: mutate what reached new lines, keep what reaches newer ones.

In pure Python, so that it runs wherever the tests do; the kept-up alternative, atheris, has left Python 3.11
and is a wheel of 35 MB for one architecture. What is followed are lines of banger's own modules, in pairs.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import banger

_OURS = str(Path(banger.__file__).parent)
_HANG_S = 10.0
_MOST_BYTES = 1 << 16
_INTERESTING = (0, 1, 2, 7, 8, 16, 32, 63, 64, 100, 127, 128, 255)
_WIDE = (
    0,
    1,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
)


@dataclass(frozen=True, slots=True)
class Target:
    """One parser. `run` may return, or raise what is `expected`; anything else is a finding."""

    name: str
    run: Callable[[bytes], object]
    seeds: Sequence[bytes]
    expected: tuple[type[BaseException], ...]
    words: Sequence[bytes] = ()
    """What a blind mutation would hardly guess."""


class HangError(BaseException):
    """An input held the parser for ten seconds of processor time."""


class FoundError(Exception):
    """An input that the parser does not stand. `__cause__` is what it raised."""

    def __init__(self, target: Target, data: bytes) -> None:
        super().__init__(f"{target.name} does not stand {data[:200]!r} ({len(data)} bytes)")
        self.data = data


@dataclass(slots=True)
class Fuzzer:
    """`corpus` grows with every input that reached a pair of lines that none had reached before."""

    target: Target
    dice: random.Random
    corpus: list[bytes] = field(default_factory=list)
    runs: int = 0
    follows: str = _OURS
    """Where the files are whose lines count."""
    _seen: set[tuple[object, int, int]] = field(default_factory=set)

    @property
    def covered(self) -> int:
        return len(self._seen)

    def fuzz(self, seconds: float) -> None:
        """For so many seconds of processor time: an hour is an hour on a busy machine too.

        Raises FoundError at the first finding.
        """
        end = time.process_time() + seconds
        with _hang_is_noticed():
            for seed in (*self.target.seeds, *self.corpus):
                self._try(seed)
            while time.process_time() < end:
                self._try(self._mutated())

    def _try(self, data: bytes) -> None:
        self.runs += 1
        before = len(self._seen)
        signal.setitimer(signal.ITIMER_VIRTUAL, _HANG_S)
        sys.settrace(self._trace)
        try:
            self.target.run(data)
        except self.target.expected:
            pass
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            sys.settrace(None)
            raise FoundError(self.target, data) from error
        finally:
            sys.settrace(None)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if len(self._seen) > before or not self.corpus:
            self.corpus.append(data)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if event != "call" or not frame.f_code.co_filename.startswith(self.follows):
            return None
        code, last, seen = frame.f_code, 0, self._seen

        def line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            if event == "line":
                seen.add((code, last, frame.f_lineno))
                last = frame.f_lineno
            return line

        return line

    def _mutated(self) -> bytes:
        """Of one input, the newer the likelier; several changes at once now and then."""
        dice = self.dice
        at = max(dice.randrange(len(self.corpus)), dice.randrange(len(self.corpus)))
        data = bytearray(self.corpus[at])
        for _ in range(1 << dice.choice((0, 0, 0, 1, 1, 2, 3, 4))):
            dice.choice(_MUTATIONS)(data, self)
        return bytes(data[:_MOST_BYTES])


@contextlib.contextmanager
def _hang_is_noticed() -> Iterator[None]:
    def hung(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGVTALRM, hung)
    try:
        yield
    finally:
        signal.signal(signal.SIGVTALRM, before)


# --- mutations: each changes the data in place ---


def _place(data: bytearray, fuzzer: Fuzzer) -> int:
    """Anywhere, but headers are where the decisions are."""
    if not data:
        return 0
    return fuzzer.dice.randrange(min(len(data), 1 << fuzzer.dice.randint(3, 16)))


def _flip(data: bytearray, fuzzer: Fuzzer) -> None:
    if data:
        data[_place(data, fuzzer)] ^= 1 << fuzzer.dice.randrange(8)


def _set(data: bytearray, fuzzer: Fuzzer) -> None:
    if data:
        near = fuzzer.dice.random() < 0.5
        value = fuzzer.dice.choice(_INTERESTING) if near else fuzzer.dice.randrange(256)
        data[_place(data, fuzzer)] = value


def _number(data: bytearray, fuzzer: Fuzzer) -> None:
    """A whole integer, of either order, or one that is a little more or less."""
    size = fuzzer.dice.choice((2, 4, 8))
    at = _place(data, fuzzer)
    if at + size > len(data):
        return
    order: Literal["big", "little"] = fuzzer.dice.choice(("big", "little"))
    if fuzzer.dice.random() < 0.5:
        value = fuzzer.dice.choice(_WIDE)
    else:
        value = int.from_bytes(data[at : at + size], order) + fuzzer.dice.randint(-9, 9)
    data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, order)


def _digits(data: bytearray, fuzzer: Fuzzer) -> None:
    """Numbers that are text."""
    at = _place(data, fuzzer)
    digits = str(fuzzer.dice.choice((*_INTERESTING, *_WIDE, -1))).encode()
    data[at : at + fuzzer.dice.randint(0, len(digits))] = digits


def _delete(data: bytearray, fuzzer: Fuzzer) -> None:
    at = _place(data, fuzzer)
    del data[at : at + (1 << fuzzer.dice.randint(0, 9))]


def _cut(data: bytearray, fuzzer: Fuzzer) -> None:
    del data[_place(data, fuzzer) :]


def _repeat(data: bytearray, fuzzer: Fuzzer) -> None:
    at = _place(data, fuzzer)
    block = bytes(data[at : at + (1 << fuzzer.dice.randint(0, 9))])
    times = 1 << fuzzer.dice.choice((0, 0, 1, 4, 10))
    data[at:at] = block * min(times, _MOST_BYTES // max(len(block), 1))


def _word(data: bytearray, fuzzer: Fuzzer) -> None:
    words = fuzzer.target.words or fuzzer.target.seeds
    word = fuzzer.dice.choice(words)
    at = _place(data, fuzzer)
    data[at : at + fuzzer.dice.choice((0, len(word)))] = word


def _splice(data: bytearray, fuzzer: Fuzzer) -> None:
    other = fuzzer.dice.choice(fuzzer.corpus)
    if other:
        start = fuzzer.dice.randrange(len(other))
        at = _place(data, fuzzer)
        end = start + (1 << fuzzer.dice.randint(0, 12))
        data[at : at + fuzzer.dice.choice((0, end - start))] = other[start:end]


def _noise(data: bytearray, fuzzer: Fuzzer) -> None:
    at = _place(data, fuzzer)
    data[at:at] = fuzzer.dice.randbytes(1 << fuzzer.dice.randint(0, 6))


_MUTATIONS = (_flip, _set, _set, _number, _digits, _delete, _cut, _repeat, _word, _word, _splice, _noise)


def name_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
