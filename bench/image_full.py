# SPDX-License-Identifier: MIT
"""An image with as many files as banger takes: how many those are, and the most memory it needs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from bench import host, image_full_once, report

_LIMIT_S: Final = 1800


def run(_: host.Host) -> report.Report:
    with tempfile.TemporaryDirectory(prefix="banger-bench-", dir="/var/tmp") as name:
        found = {kind: _once(kind, Path(name) / "disk.ext4") for kind in image_full_once.KINDS}
    rows: list[report.Row] = []
    for kind, each in found.items():
        rows += [
            report.Row(f"{kind}: files taken", each["files"], ""),
            report.Row(f"{kind}: done", each["done_s"], "s"),
            report.Row(f"{kind}: most memory", each["peak_bytes"] / (1 << 20), "MiB", None, "≤ 150"),
        ]
    return report.Report(name="image_full", rival="nothing: no tool has such a limit", rows=tuple(rows))


def _once(kind: str, disk: Path) -> dict[str, float]:
    found: dict[str, float] = _child(kind, str(disk), str(_child(kind, str(disk))))
    disk.unlink()
    return found


def _child(*arguments: str) -> Any:
    argv = [sys.executable, "-m", "bench.image_full_once", *arguments]
    return json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE, timeout=_LIMIT_S).stdout)
