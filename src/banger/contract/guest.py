# SPDX-License-Identifier: MIT
"""The guest protocol: frames of a length, a type and a payload; payloads of tagged fields. No I/O.

`guest/README.md` is the reference, `guest/proto.h` the other end. A guest may answer anything: everything is
bounded and checked, and what does not fit raises ProtocolError.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from banger.contract import errors

MAGIC: Final = b"banger-guest"
VERSION: Final = 1
MAX_PAYLOAD_BYTES: Final = 64 * 1024
MAX_REQUEST_BYTES: Final = 1024 * 1024
STDIN_WINDOW_BYTES: Final = 256 * 1024
NO_CONSOLE: Final = "banger: no console in this kernel, see dmesg"
"""What an agent says where its kernel has no console: from now on I tell when the guest goes down."""
GOODBYE: Final = "banger: going down"
AGENT_LINES: Final = frozenset({NO_CONSOLE, GOODBYE})
"""On a console, what is not the guest's own."""
NO_DIRECTORY: Final = "cannot set up the process: working directory: "
"""What the agent says of a directory that it cannot enter, before the reason."""
HEADER: Final = struct.Struct("<IB")
_FIELD: Final = struct.Struct("<BI")
_U64: Final = struct.Struct("<Q")
_MAX_TEXT: Final = 4096


class FrameType(enum.IntEnum):
    HELLO = 0x01
    ERROR = 0x02
    WINDOW = 0x03
    DATA = 0x04
    MORE = 0x05
    REPLY = 0x06
    ENTRY = 0x07
    HEALTH = 0x10
    EXEC = 0x11
    PUT = 0x12
    GET = 0x13
    PORTS = 0x14
    FLUSH = 0x15
    POWER_OFF = 0x16
    TIME = 0x17
    CONNECT = 0x18
    STARTED = 0x20
    STDIN = 0x21
    STDOUT = 0x22
    STDERR = 0x23
    RESIZE = 0x24
    SIGNAL = 0x25
    EXIT = 0x26


class Tag(enum.IntEnum):
    MAGIC = 1
    VERSION = 2
    VERSION_MIN = 3
    VERSION_MAX = 4
    AGENT_VERSION = 5
    BOOT_ID = 6
    CODE = 10
    MESSAGE = 11
    COUNT = 12
    ARGUMENT = 20
    ENVIRONMENT = 21
    DIRECTORY = 22
    USER = 23
    TTY = 24
    STDIN = 25
    ROWS = 26
    COLUMNS = 27
    SIGNAL = 28
    PID = 29
    EXIT_KIND = 30
    EXIT_CODE = 31
    PATH = 40
    UID = 41
    GID = 42
    STRIP = 43
    FOLLOW_LINKS = 44
    MAKE_DIRECTORY = 45
    ONE_FILE_SYSTEM = 46
    ENTRIES = 47
    BYTES = 48
    SHRUNK = 49
    SHRUNK_COUNT = 50
    UPTIME_MS = 60
    AGENT_PID = 61
    INIT_KIND = 62
    INIT_FINISHED = 63
    REALTIME_NS = 64
    RSS_BYTES = 65
    MEMORY_TOTAL_BYTES = 66
    MEMORY_AVAILABLE_BYTES = 67
    LOAD_MILLI = 68
    FAILED_MOUNT = 69
    PROTOCOL = 80
    ADDRESS = 81
    PORT = 82
    PROCESS = 83
    GRACE_MS = 90


@dataclass(frozen=True, slots=True)
class Health:
    """What the agent says of its guest. Hostile until proven otherwise: for showing, not for trusting."""

    boot_id: str
    agent_version: str
    uptime_ms: int
    agent_pid: int
    init_kind: str
    init_finished: bool
    realtime_ns: int
    rss_bytes: int
    memory_total_bytes: int
    memory_available_bytes: int
    failed_mounts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket in the guest. `pid` is 0 when no process was found."""

    protocol: str
    address: str
    port: int
    pid: int
    process: str


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a command ended: by itself with `code`, or by `signal`."""

    code: int = 0
    signal: int = 0

    @property
    def as_shell(self) -> int:
        return 128 + self.signal if self.signal else self.code


@dataclass(frozen=True, slots=True)
class ExecSpec:
    """A command for the guest. `user` is `name[:group]` or `uid[:gid]`; empty means root."""

    argv: Sequence[str]
    env: Sequence[str] = ()
    cwd: str = ""
    user: str = ""
    tty: bool = False
    rows: int = 0
    cols: int = 0


@dataclass(frozen=True, slots=True)
class PutSpec:
    """Where an archive goes in the guest. Without `uid` and `gid` its own owners count.

    `follow_links`: links in the middle of a member's path may be followed while they stay inside `path`.
    """

    path: str
    uid: int | None = None
    gid: int | None = None
    strip: int = 0
    follow_links: bool = False
    make_directory: bool = False


@dataclass(frozen=True, slots=True)
class GetSpec:
    """What to pack in the guest. Members are named from the last component of `path` on."""

    path: str
    follow_link: bool = False
    one_file_system: bool = False


@dataclass(frozen=True, slots=True)
class ConnectSpec:
    """A port of the guest. Without an address its loopback is meant; `protocol` is `tcp` or `udp`."""

    port: int
    address: str = ""
    protocol: str = "tcp"


@dataclass(frozen=True, slots=True)
class Transferred:
    """What an archive held. `shrunk` names files that became shorter while they were read, and so end in
    zeros: the first of `shrunk_count`.
    """

    entries: int
    content_bytes: int
    shrunk: tuple[str, ...] = ()
    shrunk_count: int = 0


Value = bytes | str | int


def encode(fields: Sequence[tuple[Tag, Value]]) -> bytes:
    """A payload of these fields, in this order. Raises BadRequestError for text with a NUL."""
    parts: list[bytes] = []
    for tag, value in fields:
        data = _to_bytes(value)
        parts += (_FIELD.pack(tag, len(data)), data)
    return b"".join(parts)


def _to_bytes(value: Value) -> bytes:
    if isinstance(value, int):
        return _U64.pack(value)
    data = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    if b"\0" in data:
        raise errors.BadRequestError("a NUL byte cannot be handed to a program in the guest")
    return data


def frame(kind: FrameType, payload: bytes = b"") -> bytes:
    return HEADER.pack(len(payload), kind) + payload


def request(kind: FrameType, payload: bytes) -> bytes:
    """The frames of one request; a long one travels in MORE frames with its type on the last."""
    if len(payload) > MAX_REQUEST_BYTES:
        raise errors.BadRequestError(f"the request is longer than {MAX_REQUEST_BYTES} bytes")
    cut = max(0, (len(payload) - 1) // MAX_PAYLOAD_BYTES * MAX_PAYLOAD_BYTES)
    parts = (payload[i : i + MAX_PAYLOAD_BYTES] for i in range(0, cut, MAX_PAYLOAD_BYTES))
    return b"".join(frame(FrameType.MORE, part) for part in parts) + frame(kind, payload[cut:])


def hello() -> bytes:
    return frame(FrameType.HELLO, encode([(Tag.MAGIC, MAGIC), (Tag.VERSION, VERSION)]))


def exec_payload(spec: ExecSpec, *, stdin: bool) -> bytes:
    fields: list[tuple[Tag, Value]] = [(Tag.ARGUMENT, argument) for argument in spec.argv]
    fields += [(Tag.ENVIRONMENT, variable) for variable in spec.env]
    if spec.cwd:
        fields.append((Tag.DIRECTORY, spec.cwd))
    if spec.user:
        fields.append((Tag.USER, spec.user))
    fields += [(Tag.TTY, int(spec.tty)), (Tag.STDIN, int(stdin))]
    if spec.rows and spec.cols:
        fields += [(Tag.ROWS, spec.rows), (Tag.COLUMNS, spec.cols)]
    return encode(fields)


def put_payload(spec: PutSpec) -> bytes:
    fields: list[tuple[Tag, Value]] = [(Tag.PATH, spec.path), (Tag.STRIP, spec.strip)]
    fields += [(Tag.FOLLOW_LINKS, int(spec.follow_links)), (Tag.MAKE_DIRECTORY, int(spec.make_directory))]
    fields += [
        (tag, value) for tag, value in ((Tag.UID, spec.uid), (Tag.GID, spec.gid)) if value is not None
    ]
    return encode(fields)


def get_payload(spec: GetSpec) -> bytes:
    return encode(
        [
            (Tag.PATH, spec.path),
            (Tag.FOLLOW_LINKS, int(spec.follow_link)),
            (Tag.ONE_FILE_SYSTEM, int(spec.one_file_system)),
        ]
    )


def connect_payload(spec: ConnectSpec) -> bytes:
    fields: list[tuple[Tag, Value]] = [(Tag.PROTOCOL, spec.protocol), (Tag.PORT, spec.port)]
    if spec.address:
        fields.append((Tag.ADDRESS, spec.address))
    return encode(fields)


def parse_header(data: bytes) -> tuple[int, int]:
    """Type and payload length of a frame. Raises ProtocolError when it is too long."""
    size, kind = HEADER.unpack(data)
    if size > MAX_PAYLOAD_BYTES:
        raise errors.ProtocolError(f"the guest sent a frame of {size} bytes")
    return kind, size


class Fields:
    """The fields of a payload, by tag. Unknown tags are ignored: an agent may be newer."""

    def __init__(self, payload: bytes) -> None:
        self._values: dict[int, list[bytes]] = {}
        for tag, value in _walk(payload):
            self._values.setdefault(tag, []).append(value)

    def number(self, tag: Tag) -> int:
        """0 when it is absent."""
        values = self._values.get(tag)
        if not values:
            return 0
        if len(values[0]) != _U64.size:
            raise errors.ProtocolError(f"the guest's field {tag.name} is no number")
        return int(_U64.unpack(values[0])[0])

    def text(self, tag: Tag) -> str:
        """Printable, bounded, empty when absent: what a guest says ends up on terminals."""
        values = self._values.get(tag)
        return printable(values[0]) if values else ""

    def texts(self, tag: Tag) -> tuple[str, ...]:
        return tuple(printable(value) for value in self._values.get(tag, ()))


def _walk(payload: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position < len(payload):
        if len(payload) - position < _FIELD.size:
            raise errors.ProtocolError("the guest sent a truncated field")
        tag, size = _FIELD.unpack_from(payload, position)
        position += _FIELD.size
        if size > len(payload) - position:
            raise errors.ProtocolError("the guest sent a field longer than its frame")
        yield tag, payload[position : position + size]
        position += size


def printable(value: bytes) -> str:
    """What a guest says, as text that no terminal and no log obeys; the first 4096 bytes."""
    text = value[:_MAX_TEXT].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in text)


def parse_health(payload: bytes, greeting: Fields) -> Health:
    fields = Fields(payload)
    return Health(
        boot_id=greeting.text(Tag.BOOT_ID),
        agent_version=greeting.text(Tag.AGENT_VERSION),
        uptime_ms=fields.number(Tag.UPTIME_MS),
        agent_pid=fields.number(Tag.AGENT_PID),
        init_kind=fields.text(Tag.INIT_KIND),
        init_finished=bool(fields.number(Tag.INIT_FINISHED)),
        realtime_ns=fields.number(Tag.REALTIME_NS),
        rss_bytes=fields.number(Tag.RSS_BYTES),
        memory_total_bytes=fields.number(Tag.MEMORY_TOTAL_BYTES),
        memory_available_bytes=fields.number(Tag.MEMORY_AVAILABLE_BYTES),
        failed_mounts=fields.texts(Tag.FAILED_MOUNT),
    )


def parse_listener(payload: bytes) -> Listener:
    fields = Fields(payload)
    port = fields.number(Tag.PORT)
    if not 0 < port < 1 << 16:
        raise errors.ProtocolError(f"the guest sent port {port}")
    return Listener(
        protocol=fields.text(Tag.PROTOCOL),
        address=fields.text(Tag.ADDRESS),
        port=port,
        pid=fields.number(Tag.PID),
        process=fields.text(Tag.PROCESS),
    )


def parse_transferred(payload: bytes) -> Transferred:
    fields = Fields(payload)
    return Transferred(
        entries=fields.number(Tag.ENTRIES),
        content_bytes=fields.number(Tag.BYTES),
        shrunk=fields.texts(Tag.SHRUNK),
        shrunk_count=fields.number(Tag.SHRUNK_COUNT),
    )


def parse_exit(payload: bytes) -> ExitStatus:
    fields = Fields(payload)
    code = fields.number(Tag.EXIT_CODE)
    if code > 255:
        raise errors.ProtocolError(f"the guest sent exit code {code}")
    return ExitStatus(signal=code) if fields.number(Tag.EXIT_KIND) else ExitStatus(code=code)


_ERRORS: Final[dict[str, type[errors.BangerError]]] = {
    "not_found": errors.NotFoundError,
    "bad_request": errors.BadRequestError,
    "no_space": errors.NoSpaceError,
    "busy": errors.ConflictError,
    "refused": errors.RefusedError,
    "protocol_error": errors.ProtocolError,
    "version_mismatch": errors.ProtocolError,
}


def parse_error(payload: bytes) -> errors.BangerError:
    fields = Fields(payload)
    kind = _ERRORS.get(fields.text(Tag.CODE), errors.OperationFailedError)
    return kind(fields.text(Tag.MESSAGE) or "the guest's agent refused without a reason")
