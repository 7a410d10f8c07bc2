# SPDX-License-Identifier: MIT
"""Things that are slow to build, stored by content outside the tree: images, layers, artefact disks.

An entry is a directory `<root>/<kind>/<key>`, published by one rename. Whoever uses an entry holds a shared
lock on `<key>.lock` beside it, so pruning never takes it away; lock files themselves are never deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


def default_root() -> Path:
    """Give the cache directory: $BANGER_LAB_CACHE, else the user's cache directory."""
    if chosen := os.environ.get("BANGER_LAB_CACHE"):
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "banger-lab"


def key_of(parts: Iterable[str | bytes]) -> str:
    """Hash the inputs of a build; each part counts with its length, so no two lists give one key."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:20]


@dataclass(frozen=True, slots=True)
class Entry:
    """A published entry with the descriptor whose shared lock keeps it from being pruned."""

    path: Path
    lock_fd: int

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.lock_fd)


@dataclass(frozen=True, slots=True)
class Cache:
    """One kind of entry, of which the `keep` used last are kept."""

    root: Path
    kind: str
    keep: int

    @property
    def directory(self) -> Path:
        return self.root / self.kind

    def ensure(self, key: str, build: Callable[[Path], None]) -> Entry:
        """Open the entry, building it first when it is missing; other builders of it wait meanwhile."""
        while (entry := self.open(key)) is None:
            with self._locked(key, fcntl.LOCK_EX):
                if not self._path(key).exists():
                    self._build(key, build)
        self.prune()
        return entry

    def open(self, key: str) -> Entry | None:
        """Open an entry that is there; None when it is not."""
        fd = self._lock_fd(key)
        fcntl.flock(fd, fcntl.LOCK_SH)
        if not self._path(key).exists():
            os.close(fd)
            return None
        os.utime(fd)
        return Entry(self._path(key), fd)

    @contextlib.contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Keeps out everybody else who builds the entry by other means than `ensure`."""
        with self._locked(f"{key}-building", fcntl.LOCK_EX):
            yield

    def delete(self, key: str) -> bool:
        """Delete an entry unless somebody uses it; say whether it is gone."""
        fd = self._lock_fd(key)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            self._discard(self._path(key))
            return True
        finally:
            os.close(fd)

    def prune(self) -> None:
        """Delete what is neither in use nor among the last used, and what builders that died left."""
        for key in self._keys_by_use()[self.keep :]:
            self.delete(key)
        for stage in self.directory.glob(".stage-*"):
            key = stage.name.removeprefix(".stage-").partition(".")[0]
            with contextlib.suppress(BlockingIOError), self._locked(key, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(stage, ignore_errors=True)

    def _build(self, key: str, build: Callable[[Path], None]) -> None:
        stage = self.directory / f".stage-{key}.{os.getpid()}"
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        try:
            build(stage)
            stage.rename(self._path(key))
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _discard(self, path: Path) -> None:
        if path.exists():
            doomed = path.with_name(f".stage-{path.name}.{time.monotonic_ns()}")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _keys_by_use(self) -> list[str]:
        keys = [path.name for path in self.directory.glob("[!.]*") if path.is_dir()]
        return sorted(keys, key=self._last_used, reverse=True)

    def _last_used(self, key: str) -> float:
        with contextlib.suppress(FileNotFoundError):
            return self._path(key).with_suffix(".lock").stat().st_mtime
        return 0.0

    def _path(self, key: str) -> Path:
        return self.directory / key

    def _lock_fd(self, key: str) -> int:
        self.directory.mkdir(parents=True, exist_ok=True)
        return os.open(self.directory / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @contextlib.contextmanager
    def _locked(self, key: str, mode: int) -> Iterator[None]:
        fd = self._lock_fd(key)
        try:
            fcntl.flock(fd, mode)
            yield
        finally:
            os.close(fd)
