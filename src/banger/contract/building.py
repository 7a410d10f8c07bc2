# SPDX-License-Identifier: MIT
"""What the builder is asked to make, and how: the packages of an image, as the tar of a root file system.

Wire: one build per connection on `bangerd-build.sock`: a 4-byte big-endian length and a `Request` as JSON;
then frames come back, each a kind, a 4-byte length and that many bytes: the way out, lines of progress, the
tar piece by piece, and the `Answer` as JSON, the last of them. Whoever closes the connection ends the build.

The way out is a TCP socket that listens on the loopback of the build's own network, as `SCM_RIGHTS` of an
empty frame: the daemon serves an HTTP proxy there, the only one that the build has.

The daemon and the builder believe each other nothing: one runs what strangers wrote, the other may have been
taken over. Both check each field by these types, and bound what they read.
"""

from __future__ import annotations

import struct
from typing import Annotated, Final, Literal

import msgspec

from banger.contract import errors, privileged

MAX_REQUEST_BYTES: Final = 1 << 20
MAX_FRAME_BYTES: Final = 256 << 10
MAX_LINE_BYTES: Final = 4096
MAX_LINES_BYTES: Final = 64 << 20
"""All that a build says; mmdebstrap says some hundred KiB of a default image."""
MAX_LINES: Final = 200_000
"""However short: each is an event in the daemon's loop."""
LENGTH: Final = struct.Struct("!I")
FRAME: Final = struct.Struct("!cI")
LINE: Final = b"L"
TAR: Final = b"T"
ANSWER: Final = b"A"
WAY_OUT: Final = b"W"

Variant = Literal["extract", "custom", "essential", "apt", "minbase", "required", "important", "standard"]
# Words of command lines and of dpkg's configuration: nothing in them may begin another line or option.
Suite = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9-]{0,31}$(?!\n)")]
Package = Annotated[
    str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9+.-]{1,99}(=[A-Za-z0-9.+:~-]{1,99})?$(?!\n)")
]
Packages = Annotated[tuple[Package, ...], msgspec.Meta(min_length=1, max_length=2000)]
Glob = Annotated[str, msgspec.Meta(pattern=r"^/[\x21-\x7e]{0,1000}$(?!\n)")]
Mirror = Annotated[str, msgspec.Meta(pattern=r"^((https?|file):/[\x21-\x7e]{1,500})?$(?!\n)")]
Variable = Annotated[str, msgspec.Meta(pattern=r"^SSL_CERT_(FILE|DIR)$(?!\n)")]
"""Of what `debian.APT_ENVIRONMENT` lets through. No proxy: that may hold a password."""
Value = Annotated[str, msgspec.Meta(pattern=r"^[\x20-\x7e]{0,2000}$(?!\n)")]


class Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What mmdebstrap makes. `mirror` is empty for the host's own package sources."""

    arch: Literal["x86_64", "aarch64"]
    suite: Suite
    variant: Variant
    packages: Packages
    exclude_paths: tuple[Glob, ...] = ()
    include_paths: tuple[Glob, ...] = ()
    mirror: Mirror = ""


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    base: Base
    environment: dict[Variable, Value] = {}
    op_id: privileged.OpId = ""


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How it ended: well, or by this."""

    error: errors.ErrorBody | None = None
