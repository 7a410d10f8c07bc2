# SPDX-License-Identifier: MIT
"""bangerd in the soak: on a clock that the soak advances, over a database whose disk is sometimes full."""

from __future__ import annotations

import asyncio
import datetime
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from banger.contract import errors
from banger.owner import activity, composition, config, lifetimes, operations, store
from banger.vm import lifetime
from tests.contract import conftest
from tests.contract.soak_control import Order, Start, control_socket, held

_LOOK_S = 0.05


class Clock:
    """Stands in for the module `time` where a VM's time is counted; deadlines stay the host's."""

    CLOCK_BOOTTIME = time.CLOCK_BOOTTIME

    def __init__(self, ahead_s: float) -> None:
        self.ahead_s = ahead_s

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s

    def clock_gettime(self, clock: int) -> float:
        return time.clock_gettime(clock) + self.ahead_s

    def now(self) -> datetime.datetime:
        return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=self.ahead_s)

    def put_on(self) -> None:
        for module in (activity, lifetimes, lifetime, operations):
            module.time = self  # type: ignore[attr-defined]
        operations._now = self.now
        lifetimes._LOOK_S = _LOOK_S  # type: ignore[misc]


class Disk:
    """Below the database; now and then it is full."""

    def __init__(self, start: Start) -> None:
        self._dice = random.Random(start.seed)
        self.fault_rate = start.fault_rate

    def put_on(self) -> None:
        transaction = store.Store._transaction

        @contextmanager
        def sometimes_full(rows: store.Store) -> Iterator[Any]:
            if self._dice.random() < self.fault_rate:
                raise errors.NoSpaceError("no space left for banger's database", hint="the soak's fault")
            with transaction(rows) as connection:
                yield connection

        store.Store._transaction = sometimes_full  # type: ignore[method-assign, assignment]


async def _daemon(start: Start) -> None:
    top, clock, disk = Path(start.top), Clock(start.ahead_s), Disk(start)
    clock.put_on()
    disk.put_on()

    async def obey(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        order = msgspec.json.decode(await reader.readline(), type=Order)
        clock.ahead_s += order.advance_s
        if order.fault_rate is not None:
            disk.fault_rate = order.fault_rate
        writer.write(msgspec.json.encode(held(len(asyncio.all_tasks())) if order.measure else None))
        writer.close()

    path = control_socket(top, "daemon")
    path.unlink(missing_ok=True)
    installation = config.Installation(owner_uid=os.getuid(), helper_dir=str(top / "h"))
    async with await asyncio.start_unix_server(obey, str(path)):
        await composition.serve(conftest.IMPATIENT, installation, conftest.laid_out(top), in_process=False)


if __name__ == "__main__":
    asyncio.run(_daemon(msgspec.json.decode(sys.argv[1], type=Start)))
