# SPDX-License-Identifier: MIT
"""The image file: whole blocks written where they belong, small neighbouring writes joined.

A full disk is `NoSpaceError` wherever it is met. Used by `mkfs` only.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from banger import artefacts
from banger.contract import errors
from banger.images.mkfs.layout import BLOCK

_JOIN_BYTES: Final = 1 << 20
_BEGIN_BYTES: Final = 8 << 20
_SYNC_FILE_RANGE_WRITE: Final = 2
_DIRECT_BYTES: Final = 128 << 10
_FALLOC_KEEP_SIZE: Final = 1
_FALLOC_PUNCH_HOLE: Final = 2
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int
_sync_file_range = ctypes.CDLL(None, use_errno=True).sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class Disk:
    """A new sparse file, open until `close`; reads see what was written before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            with self._errors():
                self._fd = os.open(path, flags, 0o600)
        except FileExistsError as error:
            raise errors.AlreadyExistsError(f"{path} is already there") from error
        self._joined = bytearray()
        self._joined_at = 0
        self._begun = 0

    def write(self, block: int, data: bytes | bytearray | memoryview) -> None:
        """Writes data from the start of a block on; what is missing of its last block is zeros."""
        if len(data) >= _DIRECT_BYTES:
            self.flush()
            self._write_at(block * BLOCK, data)
            return
        offset = block * BLOCK
        if offset != self._joined_at + len(self._joined) or len(self._joined) >= _JOIN_BYTES:
            self.flush()
            self._joined_at = offset
        self._joined += data
        if len(data) % BLOCK:
            self._joined += bytes(-len(data) % BLOCK)

    def flush(self) -> None:
        if self._joined:
            self._write_at(self._joined_at, self._joined)
            self._joined_at += len(self._joined)
            self._joined = bytearray()

    def read(self, block: int, count: int = 1) -> bytes:
        """Whole blocks; beyond the end of the file there are zeros."""
        self.flush()
        with self._errors():
            data = os.pread(self._fd, count * BLOCK, block * BLOCK)
        return data.ljust(count * BLOCK, b"\0")

    def punch(self, block: int, count: int) -> None:
        """Gives blocks back to the host: they read as zeros and take nothing."""
        self.flush()
        mode = _FALLOC_KEEP_SIZE | _FALLOC_PUNCH_HOLE
        if _fallocate(self._fd, mode, block * BLOCK, count * BLOCK) != 0:
            self._clear(block, count)

    def resize(self, size_bytes: int) -> None:
        self.flush()
        with self._errors():
            os.ftruncate(self._fd, size_bytes)

    def close(self) -> None:
        os.close(self._fd)

    def _clear(self, block: int, count: int) -> None:
        """For a file system without holes."""
        step = _JOIN_BYTES // BLOCK
        for at in range(block, block + count, step):
            self._write_at(at * BLOCK, bytes(min(step, block + count - at) * BLOCK))

    def _write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        with self._errors(), memoryview(data) as view:
            done = 0
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], offset + done)
        self._begin(offset + len(data))

    def _begin(self, end: int) -> None:
        """Has the kernel write while we go on: at the end all of it must be on the disk. Only advice."""
        if end - self._begun >= _BEGIN_BYTES:
            _sync_file_range(self._fd, self._begun, end - self._begun, _SYNC_FILE_RANGE_WRITE)
            self._begun = end

    def _errors(self) -> AbstractContextManager[None]:
        return artefacts.room_for(f"the disk image {self.path.name}")
