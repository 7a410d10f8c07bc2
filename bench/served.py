# SPDX-License-Identifier: MIT
"""A daemon that answers at its socket, over the fake helper: what the CLI is measured against, natively."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from banger.owner import app, config, server
from bench import fake_host

TREE: Final = fake_host.TREE
END_S: Final = 20.0
_SCRIPT: Final = """#!{python}
import sys
from banger.cli.start import main
sys.exit(main())
"""


@contextlib.asynccontextmanager
async def running(
    *,
    agent: Path | None = None,
    settings: config.Config = fake_host.SETTINGS,
    network: ipaddress.IPv4Network = fake_host.NETWORK,
) -> AsyncIterator[tuple[fake_host.FakeHost, Path]]:
    """The daemon and its socket; with `agent`, that one does what is asked for in the guests."""
    async with fake_host.running(agent=agent, settings=settings, network=network) as daemon:
        stop = asyncio.Event()
        with server.listening(daemon.paths.socket) as listener:
            serving = asyncio.create_task(
                server.serve(
                    app.create_app(daemon.services),
                    listener,
                    stop=stop,
                    before_shutdown=daemon.services.operations.close,
                )
            )
            try:
                yield daemon, daemon.paths.socket
            finally:
                stop.set()
                async with asyncio.timeout(END_S):
                    await serving


def program(directory: Path) -> str:
    """`banger` as a wheel's installer writes it."""
    path = directory / "banger"
    path.write_text(_SCRIPT.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def environment(socket: Path) -> dict[str, str]:
    """A user's: what is said to Python here would have it compile each module anew."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "BANGER_SOCKET": str(socket), "LC_ALL": "C.UTF-8"}


async def run(*argv: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> bytes:
    """Its output. Raises RuntimeError with what it complained of."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        env=env,
        cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, complained = await process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{argv}: status {process.returncode}: {complained.decode(errors='replace')}")
    return said
