# SPDX-License-Identifier: MIT
"""Whether a guest's agent lives, asked over a connection that stays: a byte there, the same byte back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from banger.contract import errors, names
from banger.owner import guest as guests
from banger.vm import host


class Pulse:
    """One guest's. `otherwise` asks an agent that has no such port, as those of older images."""

    def __init__(self, connect: guests.Connector, otherwise: Callable[[], Awaitable[object]]) -> None:
        self._connect = connect
        self._otherwise = otherwise
        self._stream: guests.Stream | None = None
        self._beat = 0

    async def ask(self) -> None:
        """Raises BangerError when no answer comes; the caller ends a wait for one."""
        if self._stream is None:
            try:
                self._stream = await self._connect()
            except errors.UnavailableError:
                await self._otherwise()
                return
        self._beat = (self._beat + 1) % 256
        try:
            await self._exchange(*self._stream)
        except BaseException:
            self.close()  # an answer that comes late must not be the next one's
            raise

    def close(self) -> None:
        if self._stream is not None:
            self._stream[1].transport.abort()
            self._stream = None

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = bytes([self._beat])
        try:
            writer.write(asked)
            answer = await reader.readexactly(1)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise errors.UnavailableError("the guest's agent has hung up") from error
        if answer != asked:
            raise errors.ProtocolError("the guest's agent gives back another byte than it was sent")


def of(machine: host.Host, vm_id: names.VmId) -> Pulse:
    connector = guests.vsock_connector(machine.layout.vsock_socket(vm_id), names.PULSE_PORT)
    return Pulse(connector, lambda: machine.agent(vm_id).health())
