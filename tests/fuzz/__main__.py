# SPDX-License-Identifier: MIT
"""`python -m tests.fuzz TARGET SECONDS`: one parser for as long as one likes; `make fuzz` is this.

Seconds are of processor time. The corpus is kept below build/fuzz/, and goes on where it was. A finding is
saved beside it, said, and gives exit status 1; it belongs into tests/fuzz/found/TARGET/, where it is tried
in every run of the tests.
"""

from __future__ import annotations

import argparse
import math
import random
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path

from guest import build_hook
from tests.fuzz import engine, targets

_TREE = Path(__file__).parents[2]
_MEMORY_BYTES = 4 << 30


def _fuzz(name: str, seconds: float, seed: int) -> int:
    target = targets.TARGETS[name]()
    kept = _TREE / "build" / "fuzz" / name / "corpus"
    kept.mkdir(parents=True, exist_ok=True)
    before = [path.read_bytes() for path in sorted(kept.iterdir())]
    fuzzer = engine.Fuzzer(target, random.Random(seed), corpus=before)
    print(f"{name}: seed {seed}, {len(before)} kept inputs", flush=True)
    try:
        fuzzer.fuzz(seconds)
    except engine.FoundError as found:
        path = kept.parent / f"found-{engine.name_of(found.data)}"
        path.write_bytes(found.data)
        traceback.print_exception(found)
        print(f"{name}: found, saved as {path}")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        for data in fuzzer.corpus:
            (kept / engine.name_of(data)).write_bytes(data)
        print(
            f"{name}: {time.process_time():.0f} s, {fuzzer.runs} runs, {fuzzer.covered} pairs of lines, "
            f"{len(fuzzer.corpus)} inputs kept",
            flush=True,
        )
    return 0


def _fuzz_guest(name: str, seconds: int) -> int:
    """The guest binary's own readers, in C, under libFuzzer."""
    from tests.contract import test_guest_fuzz

    kept = _TREE / "build" / "fuzz" / name / "corpus"
    kept.mkdir(parents=True, exist_ok=True)
    for seed in test_guest_fuzz.SEEDS[name]:
        (kept / engine.name_of(seed)).write_bytes(seed)
    limits = ("-max_len=65536", "-rss_limit_mb=1024", "-timeout=10", f"-artifact_prefix={kept.parent}/")
    program = str(build_hook.build_fuzzer(name))
    before = _ended_programs_seconds()
    # libFuzzer counts by the clock; what other work took from it is made up for.
    while (left := math.ceil(seconds - (_ended_programs_seconds() - before))) > 0:
        run = subprocess.run([program, f"-max_total_time={left}", *limits, str(kept)], check=False)
        if run.returncode != 0:
            return run.returncode
        print(f"{name}: {_ended_programs_seconds() - before:.0f} s", flush=True)
    return 0


def _ended_programs_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=[*targets.TARGETS, *build_hook.FUZZ_TARGETS, "all"])
    parser.add_argument("seconds", type=int)
    parser.add_argument("--seed", type=int, default=time.time_ns() & 0xFFFFFFFF)
    asked = parser.parse_args()
    if asked.target == "all":
        return max(_fuzz(name, asked.seconds, asked.seed) for name in targets.TARGETS)
    if asked.target in build_hook.FUZZ_TARGETS:
        return _fuzz_guest(asked.target, asked.seconds)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    return _fuzz(asked.target, asked.seconds, asked.seed)


if __name__ == "__main__":
    sys.exit(main())
