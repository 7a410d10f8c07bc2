# SPDX-License-Identifier: MIT
"""What a VM has used, read from a copy of the kernel's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from banger.contract import errors, names
from banger.owner import usage

VM = names.VmId("0123456789ab")


def test_counters_of_cgroup_and_tap(tmp_path: Path) -> None:
    files = {
        "fs/cgroup/banger.slice/banger-vms.service/0123456789ab/cpu.stat": "usage_usec 7\nuser_usec 3\n",
        "fs/cgroup/banger.slice/banger-vms.service/0123456789ab/io.stat": "7:0 rbytes=5 wbytes=6 rios=1\n"
        "253:0 rbytes=10 wbytes=20 rios=1\n",
        "fs/cgroup/banger.slice/banger-vms.service/0123456789ab/memory.current": "9\n",
        "fs/cgroup/banger.slice/banger-vms.service/0123456789ab/memory.peak": "11\n",
        f"class/net/{names.tap_name(VM)}/statistics/rx_bytes": "100\n",
        f"class/net/{names.tap_name(VM)}/statistics/tx_bytes": "200\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert usage.of(VM, tmp_path) == usage.Usage(
        cpu_usec=7,
        memory_bytes=9,
        memory_peak_bytes=11,
        rx_bytes=200,
        tx_bytes=100,
        read_bytes=15,
        write_bytes=26,
    )


def test_what_may_not_be_read_is_no_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(errors.UnavailableError, match=r"Permission denied: .*/cpu\.stat") as caught:
        usage.of(VM, tmp_path)
    assert "banger vm restart" in caught.value.hint


def test_a_vm_that_has_just_ended_counts_nothing(tmp_path: Path) -> None:
    assert usage.of(VM, tmp_path) == usage.Usage()


@pytest.mark.parametrize(
    ("said", "expected"), [("268435456\n", 256), ("max\n", 0), (None, 0)], ids=["some", "none", "gone"]
)
def test_what_a_cgroup_may_take(tmp_path: Path, said: str | None, expected: int) -> None:
    if said is not None:
        limit = tmp_path / "fs/cgroup" / names.cgroup_path(VM) / "memory.max"
        limit.parent.mkdir(parents=True)
        limit.write_text(said)
    assert usage.limit_mib(VM, tmp_path) == expected
