# SPDX-License-Identifier: MIT
"""From a reference on loopback to a bootable root disk, beside skopeo, umoci and mkfs.ext4 doing the same.

The registry is Debian's, the image the default recipe's packages as one layer and a small one over it. Each
round begins without anything cached, on disk or, where this machine lets us, in memory.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from banger import guest_binary
from banger.images import bundle, decompress, recipe
from bench import host, pull_large, report
from lab import cache
from tests import oci_make
from tests.root import registry_server

ROUNDS: Final = 3
_RECIPE: Final = "debian-bookworm"
_LIMIT_S: Final = 600


def run(_: host.Host) -> report.Report:
    with tempfile.TemporaryDirectory(prefix="banger-bench-", dir="/var/tmp") as name:
        return measure(Path(name), rounds=ROUNDS)


def measure(scratch: Path, *, rounds: int) -> report.Report:
    layout, base = scratch / "layout", _base(scratch)
    for number in (1, 2):
        top = oci_make.tar({"srv/version": str(number).encode() * 4096})
        oci_make.layout(layout, f"v{number}", [base, top], {"Cmd": ["/bin/sh"]})
    blob = layout / "blobs" / "sha256" / oci_make.digest(oci_make.compressed(base))[7:]
    ours: list[dict[str, float]] = []
    rivals: list[dict[str, float]] = []
    floors: list[float] = []
    with registry_server.registry(scratch / "registry") as registry, registry_server.line(registry) as line:
        for number in (1, 2):
            registry.push(layout, f"v{number}", f"bench/app:v{number}")
        for _ in range(rounds):
            is_cold = _drop_caches()
            ours.append(_ours(f"{registry.host}/bench/app:v1", _fresh(scratch / "ours")))
            _drop_caches()
            rivals.append(_rival(f"{registry.host}/bench/app:v1", _fresh(scratch / "rival")))
            _drop_caches()
            floors.append(_floor(blob, _fresh(scratch / "floor")))
        again = [_ours(f"{registry.host}/bench/app:v1", scratch / "ours") for _ in range(rounds)]
        before = line.received
        shutil.rmtree(scratch / "ours" / "images")
        changed = _ours(f"{line.host}/bench/app:v2", scratch / "ours")
        cost = line.received - before
        pull_large.layout(layout, "large")
        registry.push(layout, "large", "bench/large:v1")
        large = _ours(f"{registry.host}/bench/large:v1", _fresh(scratch / "ours"))
    return _report(ours, rivals, floors, again, changed, cost, large, cold=is_cold)


def _report(
    ours: list[dict[str, float]],
    rivals: list[dict[str, float]],
    floors: list[float],
    again: list[dict[str, float]],
    changed: dict[str, float],
    cost: int,
    large: dict[str, float],
    *,
    cold: bool,
) -> report.Report:
    def middle(rounds: list[dict[str, float]], key: str) -> float:
        return report.median(each[key] for each in rounds)

    whole = [each["done_s"] for each in ours]
    parts = ", ".join(f"{name} {middle(rivals, name):.2f} s" for name in ("skopeo", "umoci", "mkfs"))
    return report.Report(
        name="pull",
        rival="skopeo copy, umoci unpack, mkfs.ext4 -d",
        rows=(
            report.Row("reference to root disk", report.median(whole), "s", middle(rivals, "all"), "≤ 0.33"),
            report.Row("processor time", middle(ours, "cpu_s"), "s", middle(rivals, "cpu_s"), "≤ 0.33"),
            report.Row("to whole layers", middle(ours, "fetched_s"), "s", middle(rivals, "skopeo")),
            report.Row(
                "beside the floor: igzip, one write", report.median(whole), "s", report.median(floors)
            ),
            report.Row(
                "most memory", max(each["peak_bytes"] for each in ours) / (1 << 20), "MiB", None, "≤ 150"
            ),
            report.Row("again, nothing changed", middle(again, "done_s"), "s", None, "≤ 0.3 s"),
            report.Row("small top layer changed", changed["done_s"], "s"),
            report.Row("of that, bytes fetched", cost / 1024, "KiB"),
            report.Row("1 GiB and 100,000 files", large["done_s"], "s"),
            report.Row("of that, most memory", large["peak_bytes"] / (1 << 20), "MiB", None, "≤ 150"),
        ),
        notes=(
            f"{report.spread(whole, 's')}; the rival: {parts}; page cache {'dropped' if cold else 'warm'}",
        ),
    )


def _base(scratch: Path) -> bytes:
    made = recipe.base_archive(
        recipe.load(_RECIPE), arch=platform.machine(), cache_dir=cache.default_root() / "bench"
    )
    return made.read_bytes()


def _ours(name: str, state: Path) -> dict[str, float]:
    guest = guest_binary.path(platform.machine())
    argv = [sys.executable, "-m", "bench.pull_once", name, str(state), str(guest)]
    done = subprocess.run(argv, check=True, capture_output=True, timeout=_LIMIT_S)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _rival(name: str, state: Path) -> dict[str, float]:
    """Each tool by its own clock; the file system as large as ours would be."""
    unpacked, disk = state / "unpacked", state / "rootfs.ext4"
    before = _children_s()
    took = {
        "skopeo": _timed(
            "skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{name}", f"oci:{state}/l:v"
        ),
        "umoci": _timed("umoci", "unpack", "--image", f"{state}/l:v", str(unpacked)),
        "mkfs": _timed("mkfs.ext4", "-q", "-F", "-d", str(unpacked / "rootfs"), str(disk), "2G"),
    }
    return {**took, "all": sum(took.values()), "cpu_s": _children_s() - before}


def _children_s() -> float:
    """Processor time of all programs that were run and have ended."""
    spent = os.times()
    return spent.children_user + spent.children_system


def _floor(blob: Path, state: Path) -> float:
    def work() -> None:
        with blob.open("rb") as file, (state / "tar").open("wb") as out:
            for piece in decompress.decompressed(file, bundle.Compression.GZIP):
                out.write(piece)

    return _clock(work)


def _timed(*argv: str) -> float:
    return _clock(lambda: subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, timeout=_LIMIT_S))


def _clock(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def _drop_caches() -> bool:
    try:
        subprocess.run(["sync"], check=True, timeout=_LIMIT_S)
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True
