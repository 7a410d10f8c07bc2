# SPDX-License-Identifier: MIT
"""Runs a command in a guest as if it ran here: bytes, signals, window size and exit status are exact."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Final

import msgspec

from banger.cli import client, exits, link, render, signals, terminal, websocket
from banger.contract import errors, resources

_PATIENCE: Final = 3
_LET_GO_MS: Final = 60_000
_GRACE_S: Final = 5.0
"""How long a command has for SIGTERM, and how long its guest has to say that SIGKILL ended it."""
_STOPPING: Final = 1012
"""How a WebSocket server says that it is being stopped or restarted, in the registry of RFC 6455."""
TIMED_OUT: Final = 124
"""As timeout(1) has it."""
FORWARDED: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


def run(
    api: client.Client,
    ref: str,
    request: resources.ExecRequest,
    *,
    stdin: bool = True,
    on_begin: Callable[[], None] = lambda: None,
    before: Callable[[], None] | None = None,
    timeout_s: float | None = None,
    kept: Kept | None = None,
    forwarded: Sequence[signal.Signals] = FORWARDED,
) -> int:
    """The command's exit status. `on_begin` is called when the daemon has the request.

    Its output is ours, byte for byte; with `kept` it goes there instead. Signals that are not `forwarded`
    do here what they did before, and when they raise, the guest ends the command: its client has gone.

    `before` prepares the VM once the daemon knows that it belongs to this command (`request.hold`). A
    command that takes longer than `timeout_s` is ended, a line on stderr says so, and the status is
    TIMED_OUT; also when the guest does not end it.
    """
    channel = websocket.connect(api, f"/v1/vms/{client.segment(ref)}/exec")
    with contextlib.closing(channel), contextlib.ExitStack() as stack:
        request = msgspec.structs.replace(request, notices=True, windowed=True)
        channel.send(websocket.Opcode.TEXT, client.encoded(request))
        if before is not None:
            _flush(channel)
            on_begin()
            before()
            channel.send(websocket.Opcode.TEXT, client.encoded(resources.ExecControl(begin=True)))
        outputs = None if kept is None else (kept, kept)
        session = _Session(
            channel, stack.enter_context(_handled_signals(forwarded)), tty=request.tty, outputs=outputs
        )
        session.end_after(timeout_s)
        if stdin:
            session.open_stdin(0)
        else:
            session.end_stdin()
        if request.tty and terminal.is_terminal(0):
            session.raw = stack.enter_context(terminal.raw(0))
        channel.flush()
        on_begin()
        status = _status(session.run())
    if timeout_s is None or not session.has_timed_out:
        return status
    if session.raw is not None:
        print(file=sys.stderr)  # the guest's line is not ours to go on with
    what = request.argv[0] if request.argv else "the image's command"
    render.note(_timed_out(what, timeout_s, may_run=session.has_given_up))
    return TIMED_OUT


def _timed_out(what: str, timeout_s: float, *, may_run: bool) -> str:
    limit = render.whole_span(int(timeout_s)) if timeout_s.is_integer() else f"{timeout_s:g} seconds"
    end = "the guest does not end it: it may still run there" if may_run else "was ended"
    return f"{what} took longer than {limit}, and {end}"


def _flush(channel: websocket.WebSocket) -> None:
    while channel.pending_bytes:
        poller = select.poll()
        poller.register(channel, select.POLLOUT)
        poller.poll()
        channel.flush()


@contextlib.contextmanager
def _handled_signals(forwarded: Sequence[signal.Signals]) -> Iterator[socket.socket]:
    with signals.collected((*forwarded, signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)) as reader:
        yield reader


def _status(end: resources.ExecEnd) -> int:
    if end.error is not None:
        raise client.failure(end.error)
    if end.exit_status is None:
        raise errors.ProtocolError("bangerd did not say how the command ended")
    return end.exit_status


class _Output:
    """Our stdout or stderr, written to without ever blocking, so that signals are always heard."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.held = bytearray()
        try:
            is_file = stat.S_ISREG(os.fstat(fd).st_mode)
            self._piece = link.HELD_BYTES if is_file else link.PIECE_BYTES
        except OSError:  # closed by whoever started us: output goes nowhere
            self.fd = -1

    def put(self, data: memoryview) -> None:
        if self.fd >= 0:
            self.held += data

    def write(self) -> None:
        link.write(self.fd, self.held, self._piece)


class Kept(_Output):
    """The end of what a command says, for whoever shows it later; nothing of it is written."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(-1)
        self.data = bytearray()
        self._limit_bytes = limit_bytes

    def put(self, data: memoryview) -> None:
        self.data += data
        del self.data[: -self._limit_bytes]


class _Session:
    """One running command and the descriptors that stand for it here."""

    def __init__(
        self,
        channel: websocket.WebSocket,
        woken: socket.socket,
        *,
        tty: bool,
        outputs: tuple[_Output, _Output] | None = None,
    ) -> None:
        self.raw: terminal.RawMode | None = None
        self._channel = channel
        self._link = link.Link(channel, self._hear)
        self._link.window_bytes = resources.EXEC_WINDOW_BYTES
        self._woken = woken
        self._tty = tty
        self._outputs = dict(zip((1, 2), outputs or (_Output(1), _Output(2)), strict=True))
        self._end: resources.ExecEnd | None = None
        self._asked_to_end = 0
        self._deadline: float | None = None
        self.has_timed_out = False
        self._was_killed = False
        self.has_given_up = False

    def end_after(self, timeout_s: float | None) -> None:
        if timeout_s is not None:
            self._deadline = time.monotonic() + timeout_s

    def open_stdin(self, fd: int) -> None:
        try:
            os.fstat(fd)
        except OSError:
            self.end_stdin()
            return
        self._link.input = fd

    def end_stdin(self) -> None:
        self._link.end_input()

    def run(self) -> resources.ExecEnd:
        """Until the command has ended, all it wrote is written, and the daemon has let go."""
        while not self._is_done():
            self._turn()
        if self.has_given_up:
            return resources.ExecEnd(exit_status=TIMED_OUT)
        if self._end is None:
            hint = "the VM may still run; see `banger vm list` and `journalctl -u bangerd`"
            raise errors.UnavailableError("the connection to bangerd was lost", hint=hint)
        return self._end

    def _is_done(self) -> bool:
        return self.has_given_up or (
            self._channel.at_end and not any(output.held for output in self._outputs.values())
        )

    def _turn(self) -> None:
        ready = dict(self._poller().poll(self._wait_ms()))
        if self._deadline is not None and self._end is None:
            self._keep_to_time(self._deadline)
        elif not ready:  # the command has ended, and the daemon takes its time to say goodbye
            self._channel.at_end = True
        if self._woken.fileno() in ready:
            for number in signals.arrived(self._woken):
                self._handle(signal.Signals(number))
        self._write_one(ready)
        self._link.move(ready)

    def _write_one(self, ready: Container[int]) -> None:
        """Both may be the same pipe, with room for no more than one. The other's turn is next."""
        for stream, output in self._outputs.items():
            if output.held and output.fd in ready:
                output.write()
                self._outputs[stream] = self._outputs.pop(stream)
                return

    def _wait_ms(self) -> float | None:
        if self._end is not None:
            return _LET_GO_MS
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic()) * 1000 + 1

    def _keep_to_time(self, deadline: float) -> None:
        """Asked first, then made to end; a guest that does not obey is left to itself."""
        if time.monotonic() < deadline:
            return
        if self._was_killed:
            # While nobody reads what came, we do not read either, and its end may be what we do not see.
            if any(output.held for output in self._outputs.values()):
                self._deadline = time.monotonic() + _GRACE_S
            else:
                self.has_given_up = True
            return
        self._was_killed = self.has_timed_out
        self._control(resources.ExecControl(signal=signal.SIGKILL if self._was_killed else signal.SIGTERM))
        self.has_timed_out, self._deadline = True, time.monotonic() + _GRACE_S

    def _poller(self) -> select.poll:
        poller = select.poll()
        poller.register(self._woken, select.POLLIN)
        for output in self._outputs.values():
            if output.held:
                poller.register(output.fd, link.WRITABLE)
        held = sum(len(output.held) for output in self._outputs.values())
        self._link.register(poller, has_room=held < link.HELD_BYTES, takes_input=self._end is None)
        return poller

    def _hear(self, message: websocket.Message) -> None:
        if message.opcode is websocket.Opcode.BINARY:
            self._take_output(message.data)
        elif message.opcode is websocket.Opcode.TEXT:
            self._take_word(message.data)
        else:
            self._take_close(message.data)

    def _take_word(self, data: bytes) -> None:
        said = link.decode(data, resources.ExecNotice)
        self._link.window_bytes += said.taken
        if said.taken:
            return
        if not said.notice:
            self._end = link.decode(data, resources.ExecEnd)
            return
        # A terminal in raw mode wants its own line ends; and the guest's line is not ours to go on with.
        begin, end = ("\r\n", "\r\n") if self.raw is not None else ("", "\n")
        self._outputs[2].put(memoryview(f"{begin}banger: {render.safe(said.notice)}{end}".encode()))

    def _take_output(self, data: bytes) -> None:
        if not data or data[0] not in self._outputs:
            raise errors.ProtocolError("bangerd sent output of neither stdout nor stderr")
        self._outputs[data[0]].put(memoryview(data)[1:])

    def _take_close(self, data: bytes) -> None:
        self._channel.send(websocket.Opcode.CLOSE, data[:2])
        with contextlib.suppress(ConnectionError):
            self._channel.flush()
        self._channel.at_end = True
        if self._end is None:
            if int.from_bytes(data[:2]) == _STOPPING:
                raise errors.UnavailableError(
                    "bangerd was stopped or started again, and the command ended with its connection",
                    hint="VMs go on, but for those of `vm run --rm`: `banger ps` shows them",
                )
            why = data[2:].decode(errors="replace")
            raise errors.UnavailableError(f"bangerd ended the connection: {why or 'it gave no reason'}")

    def _handle(self, number: signal.Signals) -> None:
        match number:
            case signal.SIGWINCH:
                if self._tty:
                    self._control(resources.ExecControl(resize=terminal.size(0)))
            case signal.SIGTSTP:
                self._stop()
            case signal.SIGCONT:
                self._resume()
            case _:
                self._forward(number)

    def _forward(self, number: signal.Signals) -> None:
        """The command may ignore it; who asks a third time wants out."""
        if self._end is not None:
            self._channel.at_end = True
            return
        if number in {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}:
            self._asked_to_end += 1
        if self._asked_to_end >= _PATIENCE:
            raise exits.SignalledError(number)
        self._control(resources.ExecControl(signal=number))

    def _control(self, control: resources.ExecControl) -> None:
        self._channel.send(websocket.Opcode.TEXT, client.encoded(control))

    def _stop(self) -> None:
        """Stopped from outside (in raw mode Ctrl-Z is a byte): the terminal must be usable meanwhile."""
        if self.raw is not None:
            self.raw.leave()
        os.kill(os.getpid(), signal.SIGSTOP)

    def _resume(self) -> None:
        if self.raw is not None:
            self.raw.enter()
            self._control(resources.ExecControl(resize=terminal.size(0)))
