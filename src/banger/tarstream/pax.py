# SPDX-License-Identifier: MIT
"""pax headers: records that say what a tar header has no room for. Used by `tarstream` only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import msgspec

from banger.tarstream import acl
from banger.tarstream.header import NS, damaged

MAX_BYTES: Final = 1 << 20
_MAX_XATTR_NAME: Final = 255
_MAX_XATTR_VALUE: Final = 1 << 16
_MAX_DIGITS: Final = 20
_NUMBER: Final = re.compile(rb"\d{1,20}")
_TIME: Final = re.compile(rb"(-?)(\d{1,20})(?:\.(\d{0,30}))?")
_XATTR: Final = b"SCHILY.xattr."
_ACLS: Final = {
    b"SCHILY.acl.access": b"system.posix_acl_access",
    b"SCHILY.acl.default": b"system.posix_acl_default",
}
_SPARSE: Final = b"GNU.sparse."
_OF_ONE_MEMBER: Final = (b"path", b"linkpath", b"size")


class Records(msgspec.Struct, frozen=True):
    """What pax headers say of a member; None and nothing where they are silent."""

    path: bytes = b""
    link_path: bytes = b""
    size: int | None = None
    uid: int | None = None
    gid: int | None = None
    mtime_ns: int | None = None
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    sparse: tuple[tuple[bytes, bytes], ...] = ()
    """Keys without their prefix, in the order they came in: some come many times."""


NOTHING: Final = Records()


def parse(body: bytes, base: Records, *, is_global: bool = False) -> Records:
    """The records of one header over those of the global ones.

    What names a member or says where it ends may only be said of one: not every reader would believe it.
    """
    said = _Said(base)
    for key, value in _records(body):
        if is_global and (key in _OF_ONE_MEMBER or key.startswith(_SPARSE)):
            raise damaged(f"a global pax header sets {key.decode(errors='replace')}")
        said.take(key, value)
    return said.records()


class _Said:
    def __init__(self, base: Records) -> None:
        self._base = base
        self._values: dict[bytes, bytes] = {}
        self._xattrs = dict(base.xattrs)
        self._sparse: list[tuple[bytes, bytes]] = []

    def take(self, key: bytes, value: bytes) -> None:
        if key.startswith(_XATTR):
            name = key[len(_XATTR) :]
            if not 0 < len(name) <= _MAX_XATTR_NAME or b"\0" in name or len(value) > _MAX_XATTR_VALUE:
                raise damaged("an extended attribute is larger than any can be")
            self._xattrs[name] = value
        elif key.startswith(_SPARSE):
            self._sparse.append((key[len(_SPARSE) :], value))
        else:
            self._values[key] = value

    def records(self) -> Records:
        values, base = self._values, self._base
        for key, name in _ACLS.items():
            binary = acl.encode(values[key]) if values.get(key) else b""
            if binary:
                self._xattrs.setdefault(name, binary)
        if sum(len(name) + len(value) for name, value in self._xattrs.items()) > MAX_BYTES:
            raise damaged("the extended attributes of a member are more than any can have")
        path, link_path = values.get(b"path", b""), values.get(b"linkpath", b"")
        return Records(
            path,
            link_path,
            self._number(b"size", None),
            self._number(b"uid", base.uid),
            self._number(b"gid", base.gid),
            _time(values[b"mtime"]) if values.get(b"mtime") else base.mtime_ns,
            tuple(self._xattrs.items()),
            tuple(self._sparse),
        )

    def _number(self, key: bytes, otherwise: int | None) -> int | None:
        value = self._values.get(key)
        return number(value, key) if value else otherwise


def number(value: bytes, key: bytes) -> int:
    if not _NUMBER.fullmatch(value):
        raise damaged(f"a pax header's {key.decode(errors='replace')} is no number")
    return int(value)


def _time(value: bytes) -> int:
    found = _TIME.fullmatch(value)
    if found is None:
        raise damaged("a pax header's mtime is no time")
    sign, seconds, fraction = found.groups()
    ns = int(seconds) * NS + int((fraction or b"")[:9].ljust(9, b"0"))
    return -ns if sign else ns


def _records(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """`LENGTH KEY=VALUE\\n` each; the length counts all of it."""
    at = 0
    while at < len(body):
        blank = body.find(b" ", at, at + _MAX_DIGITS)
        digits = body[at:blank]
        if blank < 0 or not digits.isdigit():
            raise damaged("a pax header is malformed")
        end = at + int(digits)
        key, equals, value = body[blank + 1 : end - 1].partition(b"=")
        if end > len(body) or end <= blank + 1 or body[end - 1] != 0x0A or not equals or not key:
            raise damaged("a pax header is malformed")
        yield key, value
        at = end
