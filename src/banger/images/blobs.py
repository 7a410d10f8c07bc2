# SPDX-License-Identifier: MIT
"""The cache of layers, by content and shared between images: `<root>/<algorithm>/<hex>`.

A blob appears there by rename, whole and verified. What is not whole yet lies in `<root>/partial/`, and is
taken up again where it ended. Nobody waits for a disk here: who uses a blob checks all of it once more, and
a power cut costs at most that one is fetched again. One daemon uses a cache; its locks are that daemon's.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import shutil
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from banger import artefacts, run
from banger.contract import errors, sizes
from banger.images import reference

if TYPE_CHECKING:
    from banger.images import registry

PRUNE_HINT: Final = "free some space; `banger image cache prune` removes what no pull needs"
_PARTIAL: Final = "partial"
_BATCH: Final = 1 << 20
_RESERVE_BYTES: Final = 64 << 20

Open = Callable[[int], AbstractAsyncContextManager["registry.Body"]]
"""The blob from an offset on."""


@dataclass(frozen=True, slots=True)
class Tries:
    """How often to go on after a break that brought nothing, and how long to wait before."""

    attempts: int = 5
    first_wait_s: float = 0.5
    patience_s: float = 30.0
    """Without a batch, when another waits for the same; twice as long the next time."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was, or would be, removed."""

    names: tuple[str, ...]
    size_bytes: int


class Blobs:
    def __init__(self, root: Path, tries: Tries | None = None) -> None:
        self._root = root
        self._tries = tries or Tries()
        self._turns: weakref.WeakValueDictionary[str, _Turns] = weakref.WeakValueDictionary()
        self._leased: collections.Counter[str] = collections.Counter()

    def path(self, digest: reference.Digest) -> Path:
        algorithm, _, name = digest.partition(":")
        return self._root / algorithm / name

    def has(self, digest: reference.Digest, size_bytes: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return self.path(digest).stat().st_size == size_bytes
        return False

    @contextlib.contextmanager
    def leased(self, digests: Iterable[reference.Digest]) -> Iterator[None]:
        """Inside, `prune` leaves these alone, whether they are here already or not."""
        held = set(digests)  # an image may name a layer twice
        self._leased.update(held)
        try:
            yield
        finally:
            self._leased.subtract(held)
            self._leased += collections.Counter()  # drops what nobody holds

    def require_space(self, wanted: Iterable[tuple[reference.Digest, int]]) -> None:
        """Raises NoSpaceError when what is missing will not fit. Better now than after an hour."""
        missing = sum(
            size - self._partial_size(digest)
            for digest, size in dict(wanted).items()
            if not self.has(digest, size)
        )
        with _space():
            self._root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._root).free
        if missing and missing + _RESERVE_BYTES > free:
            raise errors.NoSpaceError(
                f"the layers need {sizes.text_of_bytes(missing)} in {self._root}, "
                f"which has {sizes.text_of_bytes(free)} left",
                hint=PRUNE_HINT,
            )

    async def fetch(
        self, digest: reference.Digest, size_bytes: int, open_at: Open, on_bytes: Callable[[int], None]
    ) -> Path:
        """The blob, from the cache or fetched now; who wants it meanwhile waits. `on_bytes` hears how far.

        Who gets no further gives way to who waits: that one may ask another registry, and goes on where
        this one was. Raises ProtocolError when what comes is not what the digest says; nothing of that is
        kept.
        """
        turns = self._turns.setdefault(digest, _Turns())
        patience_s = self._tries.patience_s
        while True:
            async with turns.taken(on_bytes):
                if self.has(digest, size_bytes):
                    on_bytes(size_bytes)
                    return self.path(digest)
                partial = _Partial(self._partial_path(digest), digest, size_bytes)
                try:
                    await run.in_thread(partial.open)
                    async with turns.giving_way(patience_s, partial):
                        await self._download(partial, open_at, turns.tell)
                except _GaveWayError:
                    patience_s *= 2  # each may begin at 0 again, where a registry knows no ranges
                finally:
                    partial.close()

    def forget(self, digests: Iterable[reference.Digest]) -> None:
        """Of blobs that were not what they should be when somebody looked: the next pull fetches them anew.

        For who holds a lease; what another one holds as well stays.
        """
        for digest in digests:
            if self._leased[digest] == 1:
                self.path(digest).unlink(missing_ok=True)

    def prune(self, *, dry_run: bool = False) -> Pruned:
        """Removes every blob and partial that no pull uses now."""
        kept = {reference.Digest(digest) for digest in self._leased}
        doomed = [path for path in self._files() if self._digest(path) not in kept]
        total = 0
        for path in doomed:
            total += path.stat().st_blocks * 512
            if not dry_run:
                path.unlink()
        return Pruned(tuple(self._digest(path) for path in doomed), total)

    async def _download(self, partial: _Partial, open_at: Open, on_bytes: Callable[[int], None]) -> None:
        taken_up = partial.offset > 0
        await self._fill(partial, open_at, on_bytes)
        if taken_up and not partial.is_right:
            # What an earlier pull left may be at fault; what comes now may not.
            partial.restart()
            await self._fill(partial, open_at, on_bytes)
        await run.in_thread(partial.publish, self.path(partial.digest))

    async def _fill(self, partial: _Partial, open_at: Open, on_bytes: Callable[[int], None]) -> None:
        """Until it has all its bytes, going on after each break."""
        attempt = 0
        while not partial.is_whole:
            before = partial.offset
            failure: errors.BangerError = errors.UnavailableError(
                f"a layer ended early, {partial.missing} bytes before its end", layer=partial.digest
            )
            try:
                async with open_at(partial.offset) as body:
                    if body.offset != partial.offset:
                        partial.restart()
                    await _receive(partial, body, on_bytes)
            except (errors.UnavailableError, errors.DeadlineError) as error:
                if "status" in error.fields:  # an answer: that has been asked for often enough
                    raise
                failure = error
            attempt = attempt + 1 if partial.offset <= before else 0
            if attempt >= self._tries.attempts:
                raise failure
            if attempt:
                await asyncio.sleep(self._tries.first_wait_s * 2 ** (attempt - 1))

    def _partial_path(self, digest: reference.Digest) -> Path:
        return self._root / _PARTIAL / digest.replace(":", "-")

    def _partial_size(self, digest: reference.Digest) -> int:
        with contextlib.suppress(FileNotFoundError):
            return self._partial_path(digest).stat().st_size
        return 0

    def _files(self) -> list[Path]:
        return sorted(path for path in self._root.glob("*/*") if path.is_file())

    def _digest(self, path: Path) -> reference.Digest:
        if path.parent.name == _PARTIAL:
            return reference.Digest(path.name.replace("-", ":", 1))
        return reference.Digest(f"{path.parent.name}:{path.name}")


class _GaveWayError(Exception):
    """To who waits."""


class _Turns:
    """Who fetches a blob now; those that wait follow in the order in which they came."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._hearing: list[Callable[[int], None]] = []
        self._so_far = 0

    @contextlib.asynccontextmanager
    async def taken(self, on_bytes: Callable[[int], None]) -> AsyncIterator[None]:
        """Who waits hears how far the other one is."""
        self._hearing.append(on_bytes)
        try:
            if self._so_far:
                on_bytes(self._so_far)
            async with self._lock:
                yield
        finally:
            self._hearing.remove(on_bytes)

    def tell(self, so_far: int) -> None:
        self._so_far = so_far
        for on_bytes in self._hearing:
            on_bytes(so_far)

    @contextlib.asynccontextmanager
    async def giving_way(self, patience_s: float, partial: _Partial) -> AsyncIterator[None]:
        """Ends the block, with _GaveWayError, when somebody waits and nothing was added for so long."""
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle

        def look(before: int) -> None:
            nonlocal timer
            if len(self._hearing) > 1 and partial.offset == before:
                turn.reschedule(loop.time())
            else:
                timer = loop.call_later(patience_s, look, partial.offset)

        timer = loop.call_later(patience_s, look, partial.offset)
        try:
            async with asyncio.timeout(None) as turn:
                yield
        except TimeoutError:
            if turn.expired():
                raise _GaveWayError from None
            raise
        finally:
            timer.cancel()


async def _receive(partial: _Partial, body: registry.Body, on_bytes: Callable[[int], None]) -> None:
    """Small pieces are gathered: each batch is hashed and written in a thread, off the loop."""
    batch: list[bytes] = []
    held = 0
    try:
        async for chunk in body.chunks:
            batch.append(chunk)
            held += len(chunk)
            if held >= _BATCH or held > partial.missing:
                # Given away before the wait: who is cancelled in it has had it written, once.
                full, batch, held = batch, [], 0
                await run.in_thread(partial.take, full)
            on_bytes(partial.offset + held)  # on a slow line a batch takes a minute
    finally:
        # What came before a break is worth keeping; too much of it is an error of its own.
        if batch:
            await run.in_thread(partial.take, batch)
            on_bytes(partial.offset)


class _Partial:
    """A blob on its way, hashed as it grows. Blocking."""

    def __init__(self, path: Path, digest: reference.Digest, size_bytes: int) -> None:
        self.digest = digest
        self.offset = 0
        self._path = path
        self._size = size_bytes
        self._hash = reference.hasher(digest)
        self._fd = -1

    def open(self) -> None:
        """With what an earlier pull left, read and hashed."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with _space():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._path, flags, 0o600)
        self._take_up()

    @property
    def missing(self) -> int:
        return self._size - self.offset

    @property
    def is_whole(self) -> bool:
        return self.offset == self._size

    @property
    def is_right(self) -> bool:
        return f"{self.digest.partition(':')[0]}:{self._hash.hexdigest()}" == self.digest

    def restart(self) -> None:
        os.ftruncate(self._fd, 0)
        self.offset = 0
        self._hash = reference.hasher(self.digest)

    def take(self, pieces: Iterable[bytes]) -> None:
        """Adds what came. Whatever makes it useless also removes it, and a disk that others need as well."""
        try:
            place = self._path.parent
            artefacts.keep_room(place, "a layer in the cache", reserve_bytes=_RESERVE_BYTES, hint=PRUNE_HINT)
        except errors.NoSpaceError:
            self._path.unlink(missing_ok=True)
            raise
        for piece in pieces:
            if len(piece) > self.missing:
                self._path.unlink(missing_ok=True)
                raise errors.ProtocolError(
                    f"a layer is longer than the {self._size} bytes its manifest says", layer=self.digest
                )
            self._hash.update(piece)
            self._write(piece)

    def publish(self, final: Path) -> None:
        """Verified before it has its name."""
        if not self.is_right:
            self._path.unlink(missing_ok=True)
            raise errors.ProtocolError(
                f"a layer is not what its digest {self.digest} says; it was not kept",
                hint="pull again; if it stays so the registry's copy is damaged, or something changes it",
                layer=self.digest,
            )
        with _space():
            final.parent.mkdir(parents=True, exist_ok=True)
            self._path.replace(final)

    def close(self) -> None:
        """Also of one that was never opened."""
        if self._fd >= 0:
            os.close(self._fd)

    def _write(self, piece: bytes) -> None:
        """A disk that is full is not left full by us."""
        try:
            with _space():
                view = memoryview(piece)
                while view:
                    written = os.pwrite(self._fd, view, self.offset)
                    self.offset += written
                    view = view[written:]
        except errors.NoSpaceError:
            self._path.unlink(missing_ok=True)
            raise

    def _take_up(self) -> None:
        if os.fstat(self._fd).st_size > self._size:
            os.ftruncate(self._fd, 0)
        while piece := os.pread(self._fd, _BATCH, self.offset):
            run.check_cancelled()
            self._hash.update(piece)
            self.offset += len(piece)


def _space() -> AbstractContextManager[None]:
    return artefacts.room_for("a layer in the cache", hint=PRUNE_HINT)
