# SPDX-License-Identifier: MIT
"""A bounded run of each fuzz target: what the guest binary reads from outside never makes it misstep."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path
from typing import Final

import pytest

from banger.contract import guest
from guest import build_hook

RUN_S = 6


def archive(fmt: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=fmt) as tar:
        for name, kind in (("d/", tarfile.DIRTYPE), ("d/f", tarfile.REGTYPE), ("l" * 120, tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mtime = kind, "t" * 120, 1.5
            info.pax_headers = {"SCHILY.xattr.user.a": "b"}
            info.size = 3 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"abc"))
    return buffer.getvalue()


SEEDS = {
    "fuzz_proto": [
        guest.hello() + guest.frame(guest.FrameType.HEALTH),
        guest.request(
            guest.FrameType.EXEC,
            guest.exec_payload(
                guest.ExecSpec(("a", "b"), ("K=V",), "/", "u:g", tty=True, rows=1, cols=2), stdin=True
            ),
        ),
        guest.request(
            guest.FrameType.CONNECT, guest.connect_payload(guest.ConnectSpec(22, "10.0.0.2", "udp"))
        ),
        guest.request(guest.FrameType.CONNECT, guest.connect_payload(guest.ConnectSpec(8080, "::1"))),
    ],
    "fuzz_tar": [archive(fmt) for fmt in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)],
    "fuzz_text": [
        b"\x00console=ttyS0 ro ip=10.0.0.2::10.0.0.1:255.255.255.0:vm:eth0:off rw",
        b"\x00banger.ip6=fd00::2/64,fd00::1 banger.hostname=vm banger.mount=/dev/vdb:/root:ext4",
        b"\x01 0: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 4242 1",
        b"\x0210.0.0.2::10.0.0.1:24:vm:eth0:off:1.1.1.1:9.9.9.9",
        b"\x03hostname=vm\nip=10.0.0.2:\ndns=1.1.1.1\nmount=/dev/vdb:/root:ext4\nroot:x:0:0:r:/root:/bin/sh\na:x:1:b",
    ],
}


# libFuzzer's limit is of the peak that getrusage(2) tells, and a program takes over that of the process that
# executes it: one of these tests may have a larger one than the limit, a fork of the shell has not.
_WITH_A_PEAK_OF_ITS_OWN: Final = ("sh", "-c", '"$@"; exit $?', "sh")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("target", build_hook.FUZZ_TARGETS)
def test_fuzzing_finds_nothing(tmp_path: Path, target: str) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(SEEDS[target]):
        (corpus / str(number)).write_bytes(seed)
    run = subprocess.run(
        [
            *_WITH_A_PEAK_OF_ITS_OWN,
            str(build_hook.build_fuzzer(target)),
            f"-max_total_time={RUN_S}",
            "-max_len=65536",
            "-rss_limit_mb=1024",
            "-timeout=10",
            f"-artifact_prefix={tmp_path}/",
            str(corpus),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=RUN_S + 60,
    )
    assert run.returncode == 0, run.stderr[-3000:]
