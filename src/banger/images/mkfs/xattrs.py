# SPDX-License-Identifier: MIT
"""Extended attributes as ext4 stores them: what fits behind the inode's fields, the rest in one block.

ACLs have a form of their own on disk, the entries of owner, group, mask and others without an id.
Used by `mkfs` only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final

from banger.contract import errors
from banger.images.mkfs.layout import BLOCK, EXTRA_ISIZE, INODE_BYTES

_MAGIC: Final = 0xEA020000
_MAGIC_BYTES: Final = struct.pack("<I", _MAGIC)
AREA_BYTES: Final = INODE_BYTES - 128 - EXTRA_ISIZE
BODY_BYTES: Final = AREA_BYTES - len(_MAGIC_BYTES)
"""What follows the magic number in an inode; an empty body stands for no area at all."""
_HEADER: Final = struct.Struct("<IIIII12x")
_ENTRY: Final = struct.Struct("<BBHIII")
_MAX_NAME: Final = 255
# The longest first; a name of its own, such as an ACL's, has nothing left behind its prefix.
_PREFIXES: Final = (
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"security.", 6),
    (b"trusted.", 4),
    (b"system.", 7),
    (b"user.", 1),
)
_ACL_INDEXES: Final = (2, 3)
_ACL_LONG: Final = struct.Struct("<HHI")
_ACL_SHORT: Final = struct.Struct("<HH")
_ACL_WITH_ID: Final = (0x02, 0x08)
_ACL_TAGS: Final = (0x01, 0x02, 0x04, 0x08, 0x10, 0x20)
_ACL_VERSION: Final = 1
_ACL_CALL_VERSION: Final = 2
_NO_ID: Final = 0xFFFFFFFF
_UINT32: Final = 0xFFFFFFFF

_Stored = tuple[int, bytes, bytes]
"""Index, the rest of the name, and the value as it is on disk."""


def encode(xattrs: Sequence[tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
    """The body for the inode and the content of the block; either may be empty."""
    names = {name for name, _ in xattrs}
    if len(names) != len(xattrs):
        raise errors.BadRequestError("an extended attribute is given twice")
    inside: list[_Stored] = []
    outside: list[_Stored] = []
    left = BODY_BYTES - 4
    for each in sorted((_stored(name, value) for name, value in xattrs), key=_size):
        if _size(each) <= left:
            inside.append(each)
            left -= _size(each)
        else:
            outside.append(each)
    body = _area(inside, BODY_BYTES, 0, 0) if inside else b""
    return body, _block(outside) if outside else b""


def decode(body: bytes, block: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """The reverse of `encode`, in order of their names."""
    found = [*_entries(body, 0, 0), *_entries(block, _HEADER.size, 0)]
    return tuple(sorted(_full(each) for each in found))


def area(body: bytes) -> bytes:
    """What stands in the inode."""
    return _MAGIC_BYTES + body if body else b""


def _stored(name: bytes, value: bytes) -> _Stored:
    for prefix, index in _PREFIXES:
        if name.startswith(prefix):
            rest = name[len(prefix) :]
            if index in _ACL_INDEXES and not rest:
                return index, b"", _acl_to_disk(name, value)
            if rest and len(rest) <= _MAX_NAME and b"\0" not in rest and index not in _ACL_INDEXES:
                return index, rest, value
    raise errors.BadRequestError(f"ext4 cannot hold an extended attribute named {name!r}")


def _full(stored: _Stored) -> tuple[bytes, bytes]:
    index, rest, value = stored
    prefix = next(prefix for prefix, number in _PREFIXES if number == index)
    return prefix + rest, _acl_from_disk(value) if index in _ACL_INDEXES else value


def _size(stored: _Stored) -> int:
    _, name, value = stored
    return _ENTRY.size + _padded(len(name)) + _padded(len(value))


def _padded(length: int) -> int:
    return length + -length % 4


def _area(stored: list[_Stored], size: int, at: int, values_from: int) -> bytes:
    """Entries from `at` on, values back from the end; offsets of values count from `values_from`."""
    area = bytearray(size)
    end = size
    for index, name, value in stored:
        end -= _padded(len(value))
        area[end : end + len(value)] = value
        offset = end - values_from if value else 0
        _ENTRY.pack_into(area, at, len(name), index, offset, 0, len(value), _entry_hash(name, value))
        area[at + _ENTRY.size : at + _ENTRY.size + len(name)] = name
        at += _ENTRY.size + _padded(len(name))
    return bytes(area)


def _block(stored: list[_Stored]) -> bytes:
    # The kernel searches a block's entries in this order.
    stored.sort(key=lambda each: (each[0], len(each[1]), each[1]))
    if sum(map(_size, stored)) > BLOCK - _HEADER.size - 4:
        raise errors.BadRequestError("the extended attributes of a file are larger than ext4 can hold")
    block = bytearray(_area(stored, BLOCK, _HEADER.size, 0))
    _HEADER.pack_into(block, 0, _MAGIC, 1, 1, _block_hash(stored), 0)
    return bytes(block)


def _entries(area: bytes, at: int, values_from: int) -> Iterator[_Stored]:
    while area and area[at : at + 4] != bytes(4):
        name_length, index, offset, _, size, _ = _ENTRY.unpack_from(area, at)
        name = area[at + _ENTRY.size : at + _ENTRY.size + name_length]
        value_at = offset + values_from
        yield index, name, area[value_at : value_at + size]
        at += _ENTRY.size + _padded(name_length)


def _entry_hash(name: bytes, value: bytes) -> int:
    found = 0
    for byte in name:
        found = (found << 5 ^ found >> 27 ^ byte) & _UINT32
    for (word,) in struct.iter_unpack("<I", value.ljust(_padded(len(value)), b"\0")):
        found = (found << 16 ^ found >> 16 ^ word) & _UINT32
    return found


def _block_hash(stored: list[_Stored]) -> int:
    found = 0
    for _, name, value in stored:
        each = _entry_hash(name, value)
        if each == 0:
            return 0
        found = (found << 16 ^ found >> 16 ^ each) & _UINT32
    return found


def _acl_to_disk(name: bytes, value: bytes) -> bytes:
    if len(value) % _ACL_LONG.size != 4 or value[:4] != struct.pack("<I", _ACL_CALL_VERSION):
        raise errors.BadRequestError(f"{name.decode()} is not an access control list")
    out = struct.pack("<I", _ACL_VERSION)
    for tag, permissions, owner in _ACL_LONG.iter_unpack(value[4:]):
        if tag not in _ACL_TAGS:
            raise errors.BadRequestError(f"{name.decode()} has an entry of unknown kind {tag}")
        with_id = tag in _ACL_WITH_ID
        entry = (tag, permissions, owner)
        out += _ACL_LONG.pack(*entry) if with_id else _ACL_SHORT.pack(*entry[:2])
    return out


def _acl_from_disk(value: bytes) -> bytes:
    out = struct.pack("<I", _ACL_CALL_VERSION)
    at = 4
    while at < len(value):
        tag, permissions = _ACL_SHORT.unpack_from(value, at)
        owner = _NO_ID
        if tag in _ACL_WITH_ID:
            owner = _ACL_LONG.unpack_from(value, at)[2]
            at += _ACL_LONG.size
        else:
            at += _ACL_SHORT.size
        out += _ACL_LONG.pack(tag, permissions, owner)
    return out
