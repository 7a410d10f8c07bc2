# SPDX-License-Identifier: MIT
"""The one door through which unprivileged code starts a program, and asyncio's bridge to blocking work.

A program gets an argv list, a clean environment, no input unless given some, a deadline, and a process
group of its own that is gone when `run` returns. A failure can be replayed by hand: it carries the command
line and what the program said. Cancelling the task that awaits `in_thread` or `run_async` ends the running
program first.

Everything unprivileged may use this; the helper has its own door.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import fnmatch
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Final, ParamSpec, TypeVar

from banger.contract import errors

P = ParamSpec("P")
T = TypeVar("T")

SEARCH_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MAX_STDOUT_BYTES: Final = 64 << 20
MAX_STDERR_BYTES: Final = 64 << 10
_CHUNK: Final = 1 << 16
_STACK_BYTES: Final = 1 << 20
_GRACE_S: Final = 2.0
_USER: Final = re.compile(r"(?<=://)[^\s/:@'\"]{0,256}(:[^\s@'\"]{0,256})?@")
"""Before an address's host, with a password that may be written wrongly."""
_DRAIN_S: Final = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What a program left: `stderr` keeps its last 64 KiB."""

    argv: tuple[str, ...]
    status: int
    stdout: bytes
    stderr: bytes
    elapsed_s: float

    @property
    def text(self) -> str:
        return self.stdout.decode(errors="replace")


class Cancellation:
    """Asks blocking work in another thread to end; a descriptor, so that a selector can wait for it."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._requested = False

    def fileno(self) -> int:
        return self._fd

    @property
    def requested(self) -> bool:
        return self._requested

    def request(self) -> None:
        self._requested = True
        os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        os.close(self._fd)


_cancellation: contextvars.ContextVar[Cancellation | None] = contextvars.ContextVar(
    "cancellation", default=None
)


def check_cancelled() -> None:
    """Long loops in blocking code call this between two pieces of work."""
    cancellation = _cancellation.get()
    if cancellation is not None and cancellation.requested:
        raise errors.CancelledError("cancelled")


def await_readable(descriptor: int, deadline: float) -> bool:
    """For waits in blocking code. False when it is not by then, of time.monotonic. Raises CancelledError."""
    cancellation = _cancellation.get()
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        if cancellation is not None:
            selector.register(cancellation, selectors.EVENT_READ)
        found = selector.select(max(0.0, deadline - time.monotonic()))
    check_cancelled()
    return bool(found)


async def in_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs blocking work in its own thread; on cancellation ends it and returns only when it has ended."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    cancellation = Cancellation()
    context = contextvars.copy_context()
    context.run(_cancellation.set, cancellation)

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # None only when T is None

    def work() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = context.run(function, *args, **kwargs)
        except BaseException as caught:
            error = caught
        loop.call_soon_threadsafe(settle, result, error)

    try:
        threading.Thread(target=work, name=getattr(function, "__name__", "work"), daemon=True).start()
        return await _finish(done, cancellation)
    finally:
        cancellation.close()


async def _finish(done: asyncio.Future[T], cancellation: Cancellation) -> T:
    interrupted: asyncio.CancelledError | None = None
    while not done.done():
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError as caught:
            interrupted = caught
            cancellation.request()
    if interrupted is not None:
        done.exception()  # retrieved: cancellation wins, the work's own end is of no interest any more
        raise interrupted
    return done.result()


def environment(*inherit: str, **extra: str) -> dict[str, str]:
    """The clean environment, plus the caller's own variables whose names match a pattern of `inherit`."""
    clean = {"PATH": SEARCH_PATH, "LC_ALL": "C.UTF-8", "TZ": "UTC"}
    kept = {
        name: value for name, value in os.environ.items() if any(fnmatch.fnmatch(name, p) for p in inherit)
    }
    return kept | clean | extra


def require(tool: str, package: str = "") -> str:
    """The path of a program that the host must have."""
    found = shutil.which(tool, path=SEARCH_PATH)
    if found is None:
        hint = f"install the package {package or tool}"
        raise errors.MissingToolError(f"program {tool!r} is not installed", hint=hint, tool=tool)
    return found


def run(
    argv: Sequence[str],
    *,
    deadline_s: float,
    stdin: bytes = b"",
    stdout: IO[bytes] | None = None,
    ok: Collection[int] = (0,),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    on_line: Callable[[str], None] | None = None,
    memory_bytes: int = 0,
) -> Result:
    """Runs a program to its end. `stdout` takes its output, `on_line` gets each line of its stderr.

    With `memory_bytes` more than that is refused to it: for programs that parse what strangers made.
    """
    check_cancelled()
    program = argv[0] if os.path.isabs(argv[0]) else require(argv[0])
    limited = _limited(memory_bytes) if memory_bytes else ()
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            [*limited, program, *argv[1:]],
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=stdout if stdout is not None else subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(env) if env is not None else environment(),
            cwd=cwd,
            start_new_session=True,
            bufsize=0,
        )
    except OSError as error:
        if cwd is not None and Path(error.filename or "") == cwd:
            raise errors.OperationFailedError(f"cannot work in {cwd}: {error.strerror}") from error
        if (ours := errors.exhausted(error, of_fork=True)) is not None:
            raise ours from error
        raise errors.MissingToolError(
            f"cannot start {program}: {error.strerror}", hint="check its mode"
        ) from error
    child = _Child(process, argv, stdin, on_line)
    with child.owned():
        child.supervise(started + deadline_s, _cancellation.get())
    result = Result(
        tuple(argv), process.returncode, bytes(child.out), child.err_tail, time.monotonic() - started
    )
    if child.end != "exited":
        raise _interrupted(child.end, result, deadline_s)
    if result.status not in ok:
        raise failure(result)
    return result


def _limited(memory_bytes: int) -> tuple[str, ...]:
    """Set by a program, since nothing may run between fork and exec in a process with threads."""
    # Each thread's stack counts, and e2fsprogs may start one for each processor.
    limits = (f"--data={memory_bytes}", f"--stack={_STACK_BYTES}")
    return (require("prlimit", "util-linux"), *limits, "--")


async def run_async(
    argv: Sequence[str],
    *,
    deadline_s: float,
    stdin: bytes = b"",
    ok: Collection[int] = (0,),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Result:
    """`run` for asyncio; cancelling it terminates, waits for, then kills the program before it returns."""
    return await in_thread(run, argv, deadline_s=deadline_s, stdin=stdin, ok=ok, env=env, cwd=cwd)


@contextlib.contextmanager
def piped(
    argv: Sequence[str],
    *,
    deadline_s: float,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Iterator[IO[bytes]]:
    """A program's output while it runs. Leaving the block before its end ends the program.

    Raises the program's failure once its output has been read.
    """
    reader, writer = os.pipe()
    ended: list[BaseException] = []
    cancellation = Cancellation()
    context = contextvars.copy_context()
    context.run(_cancellation.set, cancellation)

    def work() -> None:
        try:
            with open(writer, "wb", buffering=0) as out:
                context.run(run, argv, deadline_s=deadline_s, stdin=stdin, stdout=out, env=env, cwd=cwd)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=work, name=f"piped-{argv[0]}", daemon=True)
    thread.start()
    with contextlib.closing(cancellation), open(reader, "rb", buffering=0) as out:
        try:
            yield out
            if out.read(1):
                cancellation.request()
        except BaseException:
            cancellation.request()
            raise
        finally:
            thread.join()
    if ended and not cancellation.requested:
        raise ended[0]


def failure(result: Result) -> errors.BangerError:
    """The error for a program that ended badly, for callers that judge its result themselves."""
    name = os.path.basename(result.argv[0])
    fields = _fields(result)
    said = fields["stderr"]
    last = said.splitlines()[-1] if said else "it said nothing"
    how = f"exited {result.status}" if result.status >= 0 else f"was ended by signal {-result.status}"
    fields["exit_status"] = str(result.status)
    if "No space left on device" in said:
        hint = "free some space or move the state directory"
        return errors.NoSpaceError(f"{name}: no space left on device", hint=hint, **fields)
    return errors.OperationFailedError(f"{name} {how}: {last}", **fields)


def _interrupted(end: str, result: Result, deadline_s: float) -> errors.BangerError:
    name = os.path.basename(result.argv[0])
    if end == "cancelled":
        return errors.CancelledError(f"{name} was ended: cancelled")
    fields = _fields(result)
    if end == "overflow":
        return errors.OperationFailedError(f"{name} wrote more than {MAX_STDOUT_BYTES} bytes", **fields)
    return errors.DeadlineError(f"{name} was ended: not done after {deadline_s:g} s", **fields)


def _fields(result: Result) -> dict[str, str]:
    """What was called and what it said, without the passwords in addresses."""
    said = {"replay": shlex.join(result.argv), "stderr": result.stderr.decode(errors="replace").strip()}
    return {name: _USER.sub("", text) for name, text in said.items()}


class _Child:
    """One running program: pumps its pipes until it exits, or ends it."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        argv: Sequence[str],
        feed: bytes,
        on_line: Callable[[str], None] | None,
    ) -> None:
        self.process = process
        self.argv = argv
        self.end = "exited"
        self.out = bytearray()
        self._err = bytearray()
        self._line = bytearray()
        self._feed = memoryview(feed)
        self._on_line = on_line

    @property
    def err_tail(self) -> bytes:
        return bytes(self._err[-MAX_STDERR_BYTES:])

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Whatever happens inside, the whole process group is gone and reaped afterwards."""
        try:
            with selectors.DefaultSelector() as self._selector:
                self._pidfd = os.pidfd_open(self.process.pid)
                try:
                    yield
                finally:
                    os.close(self._pidfd)
        finally:
            self._signal(signal.SIGKILL)
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
                if pipe is not None:
                    pipe.close()

    def supervise(self, deadline: float, cancellation: Cancellation | None) -> None:
        self._selector.register(self._pidfd, selectors.EVENT_READ)
        if cancellation is not None:
            self._selector.register(cancellation, selectors.EVENT_READ)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                self._selector.register(pipe, selectors.EVENT_READ)
        if self.process.stdin is not None:
            os.set_blocking(self.process.stdin.fileno(), False)
            self._selector.register(self.process.stdin, selectors.EVENT_WRITE)
        exited = self._pump(deadline, cancellation)
        if not exited:
            if cancellation is not None:
                self._selector.unregister(cancellation)
            self._signal(signal.SIGTERM)
            exited = self._pump(time.monotonic() + _GRACE_S, None)
        self._signal(signal.SIGKILL)
        self._drain()

    def _pump(self, deadline: float, cancellation: Cancellation | None) -> bool:
        """True when the program has exited; otherwise `end` says why it must be ended."""
        while True:
            events = self._selector.select(max(0.0, deadline - time.monotonic()))
            for key, _ in events:
                if key.fileobj is cancellation:
                    self.end = "cancelled"
                    return False
                if key.fd != self._pidfd:
                    self._move(key)
            if any(key.fd == self._pidfd for key, _ in events):
                return True
            if self.end == "overflow":
                return False
            if time.monotonic() >= deadline:
                self.end = self.end if self.end != "exited" else "deadline"
                return False

    def _drain(self) -> None:
        """Reads what is left, for a moment only: a descendant outside the group may hold a pipe open."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(self._pidfd)
        deadline = time.monotonic() + _DRAIN_S
        pipes = [pipe for pipe in (self.process.stdout, self.process.stderr) if pipe is not None]
        while any(not pipe.closed for pipe in pipes) and time.monotonic() < deadline:
            for key, _ in self._selector.select(max(0.0, deadline - time.monotonic())):
                if isinstance(key.fileobj, Cancellation):
                    self._selector.unregister(key.fileobj)
                else:
                    self._move(key)
        if self._line:
            self._emit(self._line)

    def _move(self, key: selectors.SelectorKey) -> None:
        pipe = key.fileobj
        if pipe is self.process.stdin:
            self._write(pipe)
            return
        data = os.read(key.fd, _CHUNK)
        if not data:
            self._close(pipe)  # type: ignore[arg-type]
        elif pipe is self.process.stdout:
            self.out += data
            if len(self.out) > MAX_STDOUT_BYTES:
                self.end = "overflow"
        else:
            self._keep_stderr(data)

    def _write(self, pipe: IO[bytes]) -> None:
        try:
            self._feed = self._feed[os.write(pipe.fileno(), self._feed[:_CHUNK]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._feed = self._feed[:0]
        if not self._feed:
            self._close(pipe)

    def _close(self, pipe: IO[bytes]) -> None:
        self._selector.unregister(pipe)
        pipe.close()

    def _keep_stderr(self, data: bytes) -> None:
        self._err += data
        if len(self._err) > 2 * MAX_STDERR_BYTES:
            del self._err[:-MAX_STDERR_BYTES]
        if self._on_line is not None:
            *lines, rest = (self._line + data).split(b"\n")
            self._line = bytearray(rest)
            for line in lines:
                self._emit(line)

    def _emit(self, line: bytes | bytearray) -> None:
        if self._on_line is not None and line.strip():
            self._on_line(line.decode(errors="replace").rstrip("\r"))

    def _signal(self, number: signal.Signals) -> None:
        """The group's leader is not reaped yet, so its number cannot mean another group."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
