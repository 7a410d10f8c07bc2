# SPDX-License-Identifier: MIT
"""Bytes through `banger vm exec` both ways, and through a raw vsock stream of the same VM; one line of JSON.

`python -m bench.inside.transfer MIB ROUNDS`. Behind the raw stream is a loop of perl, which is in the image.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Final

from banger.cli import client
from bench.inside import agent, ours

PORT: Final = 5005
# No more at once than Firecracker 1.12 passes on whole: firecracker-microvm/firecracker#5475.
PIECE: Final = 28 * 1024
DEADLINE_S: Final = 300.0
_LISTEN_S: Final = 20.0
_PAUSE_S: Final = 0.05
# linux/vm_sockets.h: AF_VSOCK is 40, any context id is -1. A client says in or out and how many bytes.
_PEER: Final = f"""
socket(L, 40, 1, 0) && bind(L, pack("SSLLx4", 40, 0, {PORT}, 0xffffffff)) && listen(L, 1) or die "$!";
while (accept(C, L)) {{
    sysread(C, $asked, 24); ($way, $left) = split " ", $asked; $zeros = "\\0" x {PIECE};
    while ($left > 0) {{
        $n = $way eq "in" ? sysread(C, $got, {PIECE})
            : syswrite(C, $zeros, $left < {PIECE} ? $left : {PIECE});
        last unless $n; $left -= $n;
    }}
    syswrite(C, "k"); close C;
}}
"""


def main(size_mib: int, rounds: int) -> None:
    api = client.Client(ours.API)
    size = size_mib << 20
    with ours.running(api) as vm, tempfile.TemporaryFile(dir="/var/tmp") as zeros:
        os.truncate(zeros.fileno(), size)
        inside = ours.agent_of(vm)
        inside.run("setsid", "sh", "-c", 'perl -e "$1" < /dev/null > /dev/null 2>&1 &', "sh", _PEER)
        for _ in range(rounds):
            found = {"in": (_exec_in(zeros.fileno()), _raw_in(inside, size))}
            found["out"] = (_exec_out(size), _raw_out(inside, size))
            print(json.dumps(found), flush=True)


def _exec_in(zeros: int) -> float:
    os.lseek(zeros, 0, os.SEEK_SET)
    return _exec_s(("cat",), stdin=zeros)


def _exec_out(size: int) -> float:
    return _exec_s(("head", "-c", str(size), "/dev/zero"), stdin=subprocess.DEVNULL)


def _exec_s(argv: tuple[str, ...], *, stdin: int) -> float:
    """The whole CLI process. What comes in is thrown away in the guest, what goes out here."""
    script = ("sh", "-c", '"$@" > /dev/null', "sh") if argv[0] == "cat" else ()
    began = time.monotonic()
    subprocess.run(
        ["banger", "vm", "exec", ours.NAME, "--", *script, *argv],
        check=True,
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        timeout=DEADLINE_S,
    )
    return time.monotonic() - began


def _raw_in(inside: agent.Agent, size: int) -> float:
    began = time.monotonic()
    with _connected(inside, "in", size) as link:
        for piece in _pieces(size):
            link.sendall(piece)
        _need(link.recv(1) == b"k")
    return time.monotonic() - began


def _raw_out(inside: agent.Agent, size: int) -> float:
    began, left = time.monotonic(), size
    with _connected(inside, "out", size) as link:
        while left > 0 and (got := link.recv(PIECE)):
            left -= len(got)
    _need(left <= 0)
    return time.monotonic() - began


def _pieces(size: int) -> Iterator[bytes]:
    piece = bytes(PIECE)
    for sent in range(0, size, PIECE):
        yield piece[: size - sent]


def _connected(inside: agent.Agent, way: str, size: int) -> socket.socket:
    until = time.monotonic() + _LISTEN_S
    while True:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.settimeout(DEADLINE_S)
        link.connect(inside.vsock)
        link.sendall(f"CONNECT {PORT}\n".encode())
        if link.recv(64).startswith(b"OK "):
            link.sendall(f"{way} {size}".ljust(24).encode())
            return link
        link.close()
        _need(time.monotonic() < until)
        time.sleep(_PAUSE_S)


def _need(condition: bool) -> None:
    if not condition:
        raise RuntimeError("the raw stream does not work")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
