# SPDX-License-Identifier: MIT
"""Access control lists in words, as `tar --acls` and star write them, into what the kernel takes.

Used by `tarstream` only. A name in place of a number is refused: whom it means, nobody here can know.
"""

from __future__ import annotations

import re
import struct
from typing import Final

from banger.contract import errors

_VERSION: Final = struct.pack("<I", 2)
_ENTRY: Final = struct.Struct("<HHI")
_NO_ID: Final = 0xFFFFFFFF
_USER_OBJ: Final = 0x01
_USER: Final = 0x02
_GROUP_OBJ: Final = 0x04
_GROUP: Final = 0x08
_MASK: Final = 0x10
_OTHER: Final = 0x20
_TAGS: Final = {
    b"u": (_USER_OBJ, _USER),
    b"g": (_GROUP_OBJ, _GROUP),
    b"m": (_MASK, _MASK),
    b"o": (_OTHER, _OTHER),
}
_ID: Final = re.compile(rb"\d{1,10}")
_WORDS: Final = re.compile(
    rb"(u|g|m|o|user|group|mask|other):([^:]*):([r-])([w-])([x-])(?::(\d{1,10}))?(?:\s*#.*)?"
)


def encode(text: bytes) -> bytes:
    """The value of the extended attribute."""
    found = [_entry(line.strip()) for line in re.split(rb"[,\n]", text) if line.strip()]
    tags = [tag for tag, _, _ in found]
    if any(tags.count(tag) != 1 for tag in (_USER_OBJ, _GROUP_OBJ, _OTHER)):
        raise errors.BadRequestError("an access control list lacks owner, group or others")
    return _VERSION + b"".join(_ENTRY.pack(tag, bits, who) for tag, who, bits in sorted(found))


def _entry(line: bytes) -> tuple[int, int, int]:
    """Tag, id and permissions: the order in which they are sorted."""
    words = _WORDS.fullmatch(line)
    if words is None:
        raise errors.BadRequestError(f"an access control list says {line.decode(errors='replace')!r}")
    kind, who, read, write, execute, number = words.groups()
    nobody, somebody = _TAGS[kind[:1]]
    bits = (read != b"-") << 2 | (write != b"-") << 1 | (execute != b"-")
    if not who:
        return nobody, _NO_ID, bits
    number = number or who
    if not _ID.fullmatch(number) or nobody == somebody or int(number) >= _NO_ID:
        raise errors.BadRequestError(
            f"an access control list names {who.decode(errors='replace')!r}, not a number",
            hint="make the archive with `tar --xattrs`, which has them as numbers, and without --acls",
        )
    return somebody, int(number), bits
