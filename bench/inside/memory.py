# SPDX-License-Identifier: MIT
"""What processes hold while one VM runs, and Firecracker with and without banger: one line of JSON."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Final

from banger.cli import client
from banger.contract import guest, names
from bench.inside import agent, bare, ours

CONSOLES: Final = Path("/sys/fs/cgroup/banger.slice/banger-vms.service/consoles/cgroup.procs")
Sizes = dict[str, int]
_KIB = re.compile(r"^(Rss|Pss): +(\d+) kB$", re.MULTILINE)
# The head of a mapping in smaps, and its resident size.
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) .*\n(?:[A-Z].*\n)*?Rss: +(\d+) kB$", re.MULTILINE)


def main() -> None:
    api = client.Client(ours.API)
    ours.prepare_bare(api)
    found: dict[str, Sizes] = {}
    with ours.running(api) as vm:
        ours.execute(api, "true")
        found["bangerd"] = _of(_main_pid("bangerd.service"))
        found["bangerd-root"] = _of(_main_pid("bangerd-root.service"))
        found["log writer"] = _of(int(CONSOLES.read_text().split()[0]))
        found["firecracker"] = _of(vm.pid) | _own(vm.pid)
        found["agent"] = _in_guest(ours.agent_of(vm))

    def look(pid: int, inside: agent.Agent) -> None:
        found["bare firecracker"] = _of(pid) | _own(pid)

    bare.renew_disk()
    bare.live(look)
    print(json.dumps(found))


def _main_pid(unit: str) -> int:
    said = subprocess.run(
        ["systemctl", "show", "--value", "-p", "MainPID", unit], check=True, capture_output=True
    )
    return int(said.stdout)


def _of(pid: int) -> Sizes:
    """In KiB: rss and pss."""
    return parse(Path(f"/proc/{pid}/smaps_rollup").read_text())


def parse(rollup: str) -> Sizes:
    return {name.lower(): int(kib) for name, kib in _KIB.findall(rollup)}


def _own(pid: int) -> Sizes:
    """Resident without the guest's memory, which is the one mapping of its size."""
    mappings = Path(f"/proc/{pid}/smaps").read_text()
    return {"own": resident(mappings, below_bytes=bare.MEMORY_MIB << 20)}


def resident(mappings: str, *, below_bytes: int) -> int:
    """In KiB, of the mappings that are smaller than this."""
    return sum(
        int(kib)
        for begin, end, kib in _MAPPING.findall(mappings)
        if int(end, 16) - int(begin, 16) < below_bytes
    )


def _in_guest(inside: agent.Agent) -> Sizes:
    """The process that listens, not the one that serves this request."""
    pid = inside.ask(guest.FrameType.HEALTH).number(guest.Tag.AGENT_PID)
    sizes = parse(inside.run("cat", f"/proc/{pid}/smaps_rollup").decode())
    program = inside.run("stat", "--format=%s", names.GUEST_BINARY)
    return sizes | {"file": int(program) // 1024}


if __name__ == "__main__":
    main()
