# SPDX-License-Identifier: MIT
"""The daemon's only door to root: asks bangerd-root one privileged operation for each connection."""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from banger import steps
from banger.contract import decoding, errors, privileged

_log = logging.getLogger(__name__)

# Longer than any operation may take inside the helper, which has deadlines of its own.
CALL_DEADLINE_S: Final = 240.0
# A request is never called back, not even by the time limit of an undo. So it is the client that gives up
# first, and says on what; what the VM needs next waits for its turn in the helper.
TAKE_BACK_DEADLINE_S: Final = steps.UNDO_TIMEOUT_S - 5
_SLOW_S: Final = 10.0
TAKES_BACK: Final = (
    privileged.KillVmm,
    privileged.DeleteJail,
    privileged.DeleteTap,
    privileged.DeleteGuestRules,
    privileged.DetachWorkDisk,
    privileged.DeleteSnapshot,
)
"""What undos ask for. The helper gives each of them some ten seconds."""
_LENGTH: Final = struct.Struct("!I")
_HINT: Final = "see `systemctl status bangerd-root.socket bangerd-root` and `journalctl -u bangerd-root`"


def _no_op_id() -> str:
    return ""


def _nobody(_: str) -> None:
    return


class Client:
    """Meets `PrivilegedOps`. `op_id` says on whose behalf a call is made; it greps in both journals.

    `tell` hears of an answer that takes longer than `slow_s`.
    """

    def __init__(
        self,
        socket_path: Path,
        op_id: Callable[[], str] = _no_op_id,
        *,
        tell: Callable[[str], None] = _nobody,
        deadline_s: float = CALL_DEADLINE_S,
        take_back_s: float = TAKE_BACK_DEADLINE_S,
        slow_s: float = _SLOW_S,
    ) -> None:
        self._path = socket_path
        self._op_id = op_id
        self._tell = tell
        self._deadline_s = deadline_s
        self._take_back_s = take_back_s
        self._slow_s = slow_s
        self._decoder = decoding.decoder(privileged.Reply)

    async def call(self, request: privileged.Request[privileged.ResultT], /) -> privileged.ResultT:
        # The tagged decoder checks that it is a result; the operation's own type is the helper's contract.
        envelope = privileged.Envelope(request=request, op_id=self._op_id())  # type: ignore[arg-type]
        deadline_s = self._take_back_s if isinstance(request, TAKES_BACK) else self._deadline_s
        slow = asyncio.get_running_loop().call_later(self._slow_s, self._say_slow, request)
        try:
            async with asyncio.timeout(deadline_s):
                data = await self._exchange(msgspec.json.encode(envelope))
        except TimeoutError:
            message = f"the root helper did not answer {_name(request)} within {deadline_s:g} s"
            raise errors.DeadlineError(message, hint=_HINT) from None
        except (OSError, asyncio.IncompleteReadError) as error:
            if (ours := errors.exhausted(error)) is not None:
                raise ours from error
            raise errors.UnavailableError(f"the root helper does not answer: {error}", hint=_HINT) from error
        finally:
            slow.cancel()
        return _result(data, self._decoder)  # type: ignore[return-value]

    def _say_slow(self, request: privileged.Request[Any]) -> None:
        waited = f"{self._slow_s:g} s"
        _log.warning(
            "the root helper takes long",
            extra={"request": _name(request), "vm": getattr(request, "vm_id", ""), "waited": waited},
        )
        self._tell(f"still waiting for the root helper after {waited}: {_name(request)}")

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


def _name(request: privileged.Request[Any]) -> str:
    return str(request.__struct_config__.tag)


def _result(data: bytes, decoder: msgspec.json.Decoder[privileged.Reply]) -> privileged.AnyResult:
    try:
        reply = decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        hint = "both services must be of one version: run banger system restart"
        raise errors.ProtocolError(f"the root helper's answer is not valid: {error}", hint=hint) from error
    if reply.error is not None:
        raise errors.from_body(reply.error)
    if reply.result is None:
        raise errors.ProtocolError("the root helper's answer is empty")
    return reply.result
