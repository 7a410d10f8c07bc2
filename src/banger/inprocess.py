# SPDX-License-Identifier: MIT
"""The privileged operations run in this process, for tests and for development as root: the same code.

Nothing else outside `banger.helper` imports the helper.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from pathlib import Path

from banger.contract import privileged
from banger.helper import operations
from banger.helper import policy as policies
from banger.helper.linux import caps

load_policy = policies.load
Policy = policies.Policy


class InProcess:
    """Meets `PrivilegedOps`. Its threads, and the programs they start, can gain no privileges."""

    def __init__(self, policy: policies.Policy, *, threads: int = 8) -> None:
        self._policy = policy
        self._threads = concurrent.futures.ThreadPoolExecutor(
            threads, thread_name_prefix="privileged", initializer=caps.no_new_privileges
        )

    @classmethod
    def from_file(cls, path: Path) -> InProcess:
        return cls(load_policy(path))

    async def call(self, request: privileged.Request[privileged.ResultT], /) -> privileged.ResultT:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, operations.execute, self._policy, request)

    def close(self) -> None:
        self._threads.shutdown()
