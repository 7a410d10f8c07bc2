# SPDX-License-Identifier: MIT
"""Runs the benchmarks that are asked for, or all, and prints one table each."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Final, cast

from bench import host, report
from lab import errors

# Each module has `run(Host) -> Report`; imported when asked for, as those of the lab need its packages.
BENCHMARKS: Final = (
    "pipeline",
    "cli",
    "ssh",
    "dns",
    "network",
    "start",
    "memory",
    "exec",
    "workspace",
    "pull",
    "image_full",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--lab", metavar="NAME", default="", help="use this lab, as `make lab-up` makes it")
    parser.add_argument("--json", action="store_true", help="one document for each benchmark and line")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"no benchmark is named {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lab").setLevel(logging.INFO)
    try:
        with host.Host(options.lab) as machine:
            for name in options.names or BENCHMARKS:
                done = _benchmark(name)(machine)
                print(json.dumps(done.document()) if options.json else f"{done.text()}\n", flush=True)
    except errors.LabError as error:
        print(f"bench: {error}", *getattr(error, "__notes__", []), sep="\n", file=sys.stderr)
        return 1
    return 0


def _benchmark(name: str) -> Callable[[host.Host], report.Report]:
    return cast("Callable[[host.Host], report.Report]", importlib.import_module(f"bench.{name}").run)
