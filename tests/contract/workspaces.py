# SPDX-License-Identifier: MIT
"""A VM whose agent is a real one of this machine, and a user with a repository beside it."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

from banger.contract import resources
from tests.contract import api_served, cli_process


@dataclasses.dataclass(slots=True)
class Guest:
    """A VM, `web`, whose agent is a real one; its workspace goes from `source` to `repo`."""

    served: api_served.Served
    source: Path
    repo: Path

    async def banger(self, *arguments: str, status: int = 0, stdin: bytes = b"") -> cli_process.Done:
        done = await asyncio.to_thread(cli_process.Cli(self.served.path).run, *arguments, stdin=stdin)
        assert done.status == status, (done.err, done.out)
        return done

    async def prepare(self, *options: str, status: int = 0) -> cli_process.Done:
        words = ("vm", "workspace", "prepare", "web", str(self.source), "--guest-path", str(self.repo))
        return await self.banger(*words, *options, status=status)

    async def served_bytes(self, *options: str) -> int:
        """How many bytes a prepare sent."""
        return int((await self.prepare(*options, "--json")).json["sent_bytes"])

    async def workspace(self) -> resources.Workspace:
        vm = await self.served.get("/v1/vms/web", resources.Vm)
        assert vm.workspace is not None
        return vm.workspace
