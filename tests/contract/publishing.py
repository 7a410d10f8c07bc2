# SPDX-License-Identifier: MIT
"""What tests of published ports share: a row with ports, and ports that are free."""

from __future__ import annotations

import datetime
import itertools
import os
import socket
from typing import Final

from banger.contract import names, resources
from banger.vm import record

# Below those that a kernel hands out: it would give a port that is free now to the next who asks, also in
# another process that tests at the same time. That one has others here.
_EACH = 100
_FIRST = 10_000 + os.getpid() % 200 * _EACH
_PORTS: Final = itertools.cycle(range(_FIRST, _FIRST + _EACH))


def free_port() -> int:
    """Of TCP and UDP, at every address. It stays free until somebody who was told of it takes it."""
    return next(port for port in itertools.islice(_PORTS, _EACH) if _is_free(port))


def _is_free(port: int) -> bool:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        try:
            for each in (tcp, udp):
                each.bind(("0.0.0.0", port))  # noqa: S104 - for a moment, and heard by nobody
        except OSError:
            return False
        return True


def row(*published: str, network: bool = False) -> record.VmRecord:
    return record.VmRecord(
        id=names.VmId("c0ffee000001"),
        name=names.VmName("web"),
        slot=1,
        image_id=names.ImageId("0" * 12),
        kernel_id=names.KernelId("0" * 12),
        vcpus=1,
        memory_mib=128,
        disk_size_mib=16,
        network=network,
        publish=published,
        state=resources.VmState.RUNNING,
        created_at=datetime.datetime.now(datetime.UTC),
    )
