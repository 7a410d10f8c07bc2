# SPDX-License-Identifier: MIT
"""One pull in a process of its own, as the daemon does it; says how long each part took and the most memory.

`python -m bench.pull_once REFERENCE STATE GUEST`, with layers in STATE/blobs and images in STATE/images.
"""

from __future__ import annotations

import asyncio
import json
import platform
import re
import sys
import time
from pathlib import Path
from typing import Final

from banger import run
from banger.images import assemble, blobs, pull, records, reference
from banger.owner import pulls

_HEADROOM_MIB: Final = 1024


class Silent:
    """Nobody watches."""

    def progress(self, current: int, total: int, detail: str = "") -> None:
        return

    def note(self, text: str) -> None:
        return


async def once(name: str, state: Path, guest: Path) -> dict[str, float]:
    """Seconds: to the digest, to whole layers, to a published image; and bytes of memory at the most."""
    images = records.Images(state / "images")
    began = time.perf_counter()
    async with pull.opened(
        reference.parse(name), pull.Settings(), blobs.Blobs(state / "blobs"), Silent()
    ) as puller:
        digest = await puller.digest()
        asked = time.perf_counter()
        if not any(image.digest == digest for image in images.records()):
            async with puller.bundle(platform.machine(), digest) as found:
                fetched = time.perf_counter()
                await run.in_thread(
                    assemble.assemble,
                    images,
                    found,
                    name="pulled",
                    guest_binary=guest,
                    kernel=pulls.DEFAULT_KERNEL,
                    headroom_mib=_HEADROOM_MIB,
                )
        else:
            fetched = asked
    return {
        "asked_s": asked - began,
        "fetched_s": fetched - began,
        "done_s": time.perf_counter() - began,
        "cpu_s": time.process_time(),
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """The most so far, of this program: `getrusage` counts what ran in the process before it, too."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(asyncio.run(once(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))))
