# SPDX-License-Identifier: MIT
"""Carries frames between two taps as a VMM does between a guest and its tap: `python -m bench.pump FD FD`.

Both keep their offloads, so a frame may be 64 KiB, as with virtio. It ends with its standard input.
"""

from __future__ import annotations

import os
import select
import sys

_FRAME = 70_000
_AT_ONCE = 64


def main(argv: list[str]) -> None:
    one, other = map(int, argv)
    buffer = memoryview(bytearray(_FRAME))
    poll = select.poll()
    for fd in (one, other):
        os.set_blocking(fd, False)
        poll.register(fd, select.POLLIN)
    poll.register(0, select.POLLIN)
    to = {one: other, other: one}
    while True:
        for fd, _ in poll.poll():
            if fd not in to:
                return
            _carry(fd, to[fd], buffer)


def _carry(source: int, target: int, buffer: memoryview) -> None:
    """Some frames, then it is the other direction's turn."""
    for _ in range(_AT_ONCE):
        try:
            size = os.readv(source, [buffer])
        except BlockingIOError:
            return
        os.write(target, buffer[:size])


if __name__ == "__main__":
    main(sys.argv[1:])
