# SPDX-License-Identifier: MIT
"""Serves the socket: one typed request a connection, from root or the owner, answered and logged once."""

from __future__ import annotations

import collections
import contextlib
import datetime
import os
import select
import socket
import struct
import sys
import threading
import time
from typing import Any, Final

import msgspec

from banger.contract import audit as records
from banger.contract import decoding, errors, peer, privileged
from banger.helper import audit, limits, network, operations
from banger.helper import policy as policies

READ_DEADLINE_S: Final = 5.0
WRITE_DEADLINE_S: Final = 10.0
PART_DEADLINE_S: Final = 0.5
STOP_DEADLINE_S: Final = 20.0
SHORT_S: Final = 0.1
"""Until the next try, when there is no descriptor for a connection."""
QUIET_S: Final = 60.0
MAX_CONNECTIONS: Final = 64
MAX_WAITING: Final = 256
"""Of the owner: what is worked on at once, and what waits for that. What comes beyond is sent away."""
RATE: Final = 200.0
"""Requests of the owner a second, when it goes on for long; a hundred starts at once fit into the burst."""
BURST: Final = 2_000
_LENGTH: Final = struct.Struct("!I")
_LEVELS: Final = {"error": "<3>", "warning": "<4>", "info": "<6>", "debug": "<7>"}
_TAKES_TAPS: Final = (privileged.EnsureBridge, privileged.CreateTap)
"""A start ensures the bridge some time before it takes a tap."""
_TOO_MANY_HINT: Final = "try again in a moment; `banger audit` shows what is asked so often"
_REFUSALS: Final = (errors.UnauthorizedError, errors.BadRequestError)

_decoder: Final = decoding.decoder(privileged.Envelope)
_encoder: Final = msgspec.json.Encoder()


def log(level: str, message: str, **fields: object) -> None:
    """One line of JSON for the journal, which takes the level from its head."""
    line = _encoder.encode({"level": level, "message": message, **fields}).decode()
    with contextlib.suppress(OSError):  # a journal that went away must keep nobody from an answer
        sys.stderr.write(f"{_LEVELS[level]}{line}\n")
        sys.stderr.flush()


class Server:
    """Accepts until told to stop. Each connection has a thread; many of the owner's wait for one.

    `wake_fd` is what `signal.set_wakeup_fd` takes: a byte there stops. Python runs a handler only once its
    main thread is back from the kernel, and a signal that came just before `poll`, or to another thread,
    does not bring it back.
    """

    def __init__(self, policy: policies.Policy, listener: socket.socket) -> None:
        self._policy = policy
        self._listener = listener
        self._changed = threading.Condition()
        self._roots = 0
        self._owners = 0
        self._waiting: collections.deque[socket.socket] = collections.deque()
        self._turns = limits.Bucket(rate=RATE, burst=BURST)
        self._stop, self.wake_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._quiet_until = 0.0

    def serve(self) -> None:
        """Returns after `stop`, once what was accepted has ended or a moment has passed."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while all(fd != self._stop for fd, _ in poll.poll()):
            if (connection := self._accept()) is not None:
                self._admit(connection)
        with self._changed:
            self._changed.wait_for(lambda: not self._roots + self._owners, STOP_DEADLINE_S)

    def stop(self) -> None:
        """The listener is systemd's too: shutting it down would be for good."""
        with contextlib.suppress(BlockingIOError):  # full of the bytes of who said it before
            os.write(self.wake_fd, b"\0")

    def _accept(self) -> socket.socket | None:
        """None when there was no descriptor for it: it waits in the backlog for the next try."""
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if errors.exhausted(error) is None:
                raise
            self._say_short(error)
            select.select([self._stop], [], [], SHORT_S)
            return None
        return connection

    def _admit(self, connection: socket.socket) -> None:
        """Root's at once: whatever the owner's daemon does, root is heard."""
        of_root = peer.of(connection).uid == 0
        try:
            with self._changed:
                if of_root or self._owners < MAX_CONNECTIONS:
                    threading.Thread(target=self._work, args=(connection, of_root), daemon=True).start()
                    self._roots += of_root
                    self._owners += not of_root
                elif len(self._waiting) < MAX_WAITING:
                    self._waiting.append(connection)
                else:
                    raise errors.UnavailableError("too many requests wait for root", hint=_TOO_MANY_HINT)
        except (RuntimeError, errors.UnavailableError) as error:
            _turn_away(connection, self._say_short(error))

    def _say_short(self, error: Exception) -> errors.ErrorBody:
        """In the journal once a minute, however many it meets."""
        body = errors.to_body(error)
        if time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + QUIET_S
            log("error", "cannot take connections", error=body.message, hint=body.hint)
        return body

    def _work(self, connection: socket.socket, of_root: bool) -> None:
        """A thread of the owner's goes on with those of the owner's that wait."""
        while True:
            self._handle(connection, of_root)
            with self._changed:
                if of_root or not self._waiting:
                    self._roots -= of_root
                    self._owners -= not of_root
                    self._changed.notify_all()
                    return
                connection = self._waiting.popleft()

    def _handle(self, connection: socket.socket, of_root: bool) -> None:
        try:
            with connection:
                if not of_root:
                    self._await_turn(self._turns.take(time.monotonic()))
                exchange(self._policy, connection)
        except OSError as error:
            log("debug", "peer went away", error=str(error))
        except Exception as error:
            log("error", "a connection ended by a fault", error=repr(error))

    def _await_turn(self, wait_s: float) -> None:
        """Stopping ends the wait."""
        if wait_s > 0:
            log("warning", "the owner asks too much and has to wait", wait_ms=round(wait_s * 1000))
            select.select([self._stop], [], [], wait_s)


def exchange(policy: policies.Policy, connection: socket.socket) -> None:
    """Reads one request, runs it, answers. The peer is judged before a byte of it is read."""
    began = time.monotonic()
    asker = peer.of(connection)
    request: privileged.AnyRequest | None = None
    entry: dict[str, Any] = {"id": os.urandom(6).hex(), "peer_uid": asker.uid, "peer_pid": asker.pid}
    try:
        if asker.uid not in {0, policy.owner_uid}:
            raise errors.UnauthorizedError(f"uid {asker.uid} may not ask the helper")
        envelope = _decode(_receive(connection, began + READ_DEADLINE_S))
        request = envelope.request
        vm_id = getattr(request, "vm_id", "")
        entry |= {"op": operations.operation_name(request), "op_id": envelope.op_id, "vm": vm_id}
        if not isinstance(request, operations.LOOKS):  # a kill in the middle leaves this trace of it
            _record(policy, request, {**entry, "outcome": "begun", "elapsed_ms": 0.0})
        reply = privileged.Reply(result=operations.run(policy, request))
        entry["outcome"] = "done"
        level = "info"
    except Exception as error:  # whatever fails, the peer gets an answer and the journal a line
        reply = privileged.Reply(error=errors.to_body(error, op_id=entry.get("op_id", "")))
        entry["outcome"] = "refused" if isinstance(error, _REFUSALS) else "failed"
        entry |= {"error": str(error), "code": getattr(error, "code", type(error).__name__)}
        level = "warning" if isinstance(error, errors.BangerError) else "error"
    entry["elapsed_ms"] = round((time.monotonic() - began) * 1000, 1)
    if reply.error is None and isinstance(request, operations.LOOKS):
        log("debug", "privileged operation", **entry)
    else:
        log(level, "privileged operation", **entry)
        _record(policy, request, entry)
    connection.settimeout(WRITE_DEADLINE_S)
    connection.sendall(_framed(reply))
    if reply.error is None and isinstance(request, _TAKES_TAPS):
        _refill(policy)
    _part(connection)


def _framed(reply: privileged.Reply) -> bytes:
    data = _encoder.encode(reply)
    return _LENGTH.pack(len(data)) + data


def _turn_away(connection: socket.socket, body: errors.ErrorBody) -> None:
    """At once, whatever the peer does. One that only then sends its request may find a broken pipe."""
    with connection, contextlib.suppress(OSError):
        connection.setblocking(False)
        connection.sendall(_framed(privileged.Reply(error=body)))
        connection.recv(privileged.MAX_REQUEST_BYTES)


def _refill(policy: policies.Policy) -> None:
    """In the thread of a request that is answered, beside those of others. A start can do without."""
    try:
        network.refill(policy)
    except (errors.BangerError, OSError) as error:
        log("warning", "no tap could be made ahead", error=str(error))


def _part(connection: socket.socket) -> None:
    """Closing with something unread would reset the connection under a peer that reads our answer."""
    connection.shutdown(socket.SHUT_WR)
    connection.settimeout(PART_DEADLINE_S)
    unread = privileged.MAX_REQUEST_BYTES
    while unread > 0 and (part := connection.recv(unread)):
        unread -= len(part)


def _receive(connection: socket.socket, deadline: float) -> bytes:
    (size,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size, deadline))
    if size > privileged.MAX_REQUEST_BYTES:
        raise errors.BadRequestError(f"a request of {size} bytes is too long")
    return _receive_exactly(connection, size, deadline)


def _receive_exactly(connection: socket.socket, size: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            part = connection.recv(size - len(data))
        except TimeoutError:
            raise errors.DeadlineError("the request did not arrive in time") from None
        if not part:
            raise errors.BadRequestError("the peer closed before its request was complete")
        data += part
    return bytes(data)


def _decode(data: bytes) -> privileged.Envelope:
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise errors.BadRequestError(f"the request is not valid: {error}") from None


def _record(policy: policies.Policy, request: privileged.AnyRequest | None, fields: dict[str, Any]) -> None:
    """A record that cannot be written is said in the journal: a full disk must not keep VMs from ending."""
    asked: dict[str, Any] = {} if request is None else msgspec.to_builtins(request)
    shortened = {**fields, "error": fields.get("error", "")[: records.MAX_TEXT]}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    try:
        audit.append(policy, records.Entry(time=now, asked=asked, **shortened))
    except OSError as failed:
        log("error", "the audit record cannot be written", error=str(failed))
