# SPDX-License-Identifier: MIT
"""The daemon's only door to root: asks bangerd-root one privileged operation for each connection."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from banger.contract import errors, privileged

SOCKET: Final = Path("/run/banger-root/bangerd-root.sock")
# Longer than any operation may take inside the helper, which has deadlines of its own.
CALL_DEADLINE_S: Final = 240.0
_LENGTH: Final = struct.Struct("!I")
_HINT: Final = "see `systemctl status bangerd-root.socket bangerd-root` and `journalctl -u bangerd-root`"


def _no_op_id() -> str:
    return ""


class Client:
    """Meets `PrivilegedOps`. `op_id` says on whose behalf a call is made; it greps in both journals."""

    def __init__(
        self,
        socket_path: Path = SOCKET,
        op_id: Callable[[], str] = _no_op_id,
        *,
        deadline_s: float = CALL_DEADLINE_S,
    ) -> None:
        self._path = socket_path
        self._op_id = op_id
        self._deadline_s = deadline_s
        self._decoder = msgspec.json.Decoder(privileged.Reply)

    async def call(self, request: privileged.Request[privileged.ResultT], /) -> privileged.ResultT:
        # The tagged decoder checks that it is a result; the operation's own type is the helper's contract.
        envelope = privileged.Envelope(request=request, op_id=self._op_id())  # type: ignore[arg-type]
        try:
            async with asyncio.timeout(self._deadline_s):
                data = await self._exchange(msgspec.json.encode(envelope))
        except TimeoutError:
            message = f"the root helper did not answer within {self._deadline_s:g} s"
            raise errors.DeadlineError(message, hint=_HINT) from None
        except (OSError, asyncio.IncompleteReadError) as error:
            raise errors.UnavailableError(f"the root helper does not answer: {error}", hint=_HINT) from error
        return _result(data, self._decoder)  # type: ignore[return-value]

    async def _exchange(self, data: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(str(self._path))
        try:
            writer.write(_LENGTH.pack(len(data)) + data)
            (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
            if size > privileged.MAX_REPLY_BYTES:
                raise errors.ProtocolError(f"the root helper's answer of {size} bytes is too long")
            return await reader.readexactly(size)
        finally:
            writer.close()


def _result(data: bytes, decoder: msgspec.json.Decoder[privileged.Reply]) -> privileged.AnyResult:
    try:
        reply = decoder.decode(data)
    except msgspec.MsgspecError as error:
        hint = "both services must be of one version: run banger system restart"
        raise errors.ProtocolError(f"the root helper's answer is not valid: {error}", hint=hint) from error
    if reply.error is not None:
        raise errors.from_body(reply.error)
    if reply.result is None:
        raise errors.ProtocolError("the root helper's answer is empty")
    return reply.result
