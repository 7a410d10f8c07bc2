# SPDX-License-Identifier: MIT
"""A helper over a fake world, on a real socket: the wire of contract/privileged.py, as strict as the real.

In a test it lives in the test's own loop; `python -m tests.fakes.helper` makes it a program. It can be told
to die in the middle of a request: the peer sees a closed connection, as when bangerd-root is killed, and the
next connection is served again, as systemd's socket activation would see to.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from banger.contract import errors, privileged
from tests.fakes import world as worlds

_LENGTH = struct.Struct("!I")
_PEER = struct.Struct("=iII")


class Killed(Exception):
    """Raised by a hook of the world: this request gets no answer."""


@dataclass(frozen=True, slots=True)
class Record:
    """One request that arrived, and how it ended: `done`, `killed`, or the error's code."""

    op_id: str
    request: privileged.Request[Any] | None
    outcome: str


@dataclass(slots=True)
class FakeHelper:
    """Serves a world. `records` holds every request, refused ones too, in the order they ended."""

    world: worlds.World
    uids: frozenset[int] = frozenset({0, os.getuid()})
    records: list[Record] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def serving(self, path: Path) -> AsyncIterator[FakeHelper]:
        server = await asyncio.start_unix_server(self._serve, str(path))
        try:
            yield self
        finally:
            server.close()
            await server.wait_closed()

    def dies(self, kind: type[privileged.Request[Any]], *, after: bool) -> None:
        """The first request of this kind kills it, before or after its effect."""
        left = [kind]

        async def hook(request: privileged.Request[Any]) -> None:
            if left and isinstance(request, left[0]):
                left.clear()
                raise Killed

        if after:
            self.world.after = hook
        else:
            self.world.before = hook

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            reply = await self._exchange(reader, _peer_uid(writer))
        except Killed:
            writer.transport.abort()
            return
        data = msgspec.json.encode(reply)
        with contextlib.suppress(OSError):
            writer.write(_LENGTH.pack(len(data)) + data)
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    async def _exchange(self, reader: asyncio.StreamReader, uid: int) -> privileged.Reply:
        envelope: privileged.Envelope | None = None
        outcome = "killed"
        try:
            if uid not in self.uids:
                raise errors.UnauthorizedError(f"uid {uid} may not ask the helper")
            envelope = await _receive(reader)
            result: Any = await self.world.call(envelope.request)
            outcome = "done"
            return privileged.Reply(result=result)
        except errors.BangerError as error:
            outcome = error.code
            return privileged.Reply(error=errors.to_body(error, op_id=envelope.op_id if envelope else ""))
        finally:
            op_id, request = (envelope.op_id, envelope.request) if envelope else ("", None)
            self.records.append(Record(op_id, request, outcome))


def _peer_uid(writer: asyncio.StreamWriter) -> int:
    wire: socket.socket = writer.get_extra_info("socket")
    credentials = wire.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    uid: int = _PEER.unpack(credentials)[1]
    return uid


async def _receive(reader: asyncio.StreamReader) -> privileged.Envelope:
    try:
        (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if size > privileged.MAX_REQUEST_BYTES:
            raise errors.BadRequestError(f"a request of {size} bytes is too long")
        return msgspec.json.decode(await reader.readexactly(size), type=privileged.Envelope)
    except asyncio.IncompleteReadError:
        raise errors.BadRequestError("the peer closed before its request was complete") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise errors.BadRequestError(f"the request is not valid: {error}") from None


async def _main(path: Path, state: Path, helper_dir: Path, agent: Path | None) -> int:
    """Serves until SIGTERM. The exit status is the number of VMs of which something is left."""
    world = worlds.World(state=state, jails=helper_dir / "jails", logs=helper_dir / "logs")
    world.behaviour.agent = agent
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    async with FakeHelper(world).serving(path):
        await ended.wait()
    left = world.leftovers()
    await world.close()
    return min(len(left), 100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("socket", "state", "helper-dir"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--agent", type=Path, help="socket of a real agent for all guests")
    given = parser.parse_args()
    sys.exit(asyncio.run(_main(given.socket, given.state, given.helper_dir, given.agent)))
