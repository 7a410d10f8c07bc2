# SPDX-License-Identifier: MIT
"""What tests of published ports share: a row with ports, and ports that are free."""

from __future__ import annotations

import datetime
import socket

from banger.contract import names, resources
from banger.vm import record


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as made:
        made.bind(("127.0.0.1", 0))
        port: int = made.getsockname()[1]
        return port


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
