# SPDX-License-Identifier: MIT
"""Directories that are published whole: `<root>/<id>/` with files and one JSON record. Images and kernels.

A new one is staged beside its place and appears by rename; a deleted one disappears by rename first. So a
reader sees all of it or nothing, and a crash leaves only what `half_made` finds.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Generic, Protocol, TypeVar

import msgspec

from banger import run
from banger.contract import decoding, errors, given_names, names, sizes

_STAGED: Final = ".new"
_DELETED: Final = ".gone"
SCRATCH: Final = (".work-", ".fetch-", ".build-", ".new-")
"""How names of temporary directories begin, whoever makes them."""
RESERVE_BYTES: Final = 256 << 20
"""Left free on the disk that images are made on, and unpacked on."""
NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SPACE_HINT: Final = "free some space or move the state directory"
_NO_TIME: Final = datetime.datetime.min.replace(tzinfo=datetime.UTC)
_TICK: Final = datetime.timedelta(microseconds=1)
_CLOSED_HINT: Final = (
    "give it to the daemon's owner, or make it readable: `chmod a+r`, and a+x for the directories above"
)


class Record(Protocol):
    """What every published directory's record says of itself."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def created_at(self) -> str: ...


R = TypeVar("R", bound=Record)


def is_half_made(name: str) -> bool:
    """How a directory is called that is being published or deleted."""
    return name.startswith(".") and name.endswith((_STAGED, _DELETED))


def half_made(root: Path) -> list[Path]:
    """What a crash left half made or half deleted below a root, or what is being made right now."""
    return [path for path in _directories(root) if is_half_made(path.name)]


def scratch_left(parent: Path) -> list[Path]:
    """Directories of work that is going on, or that a crash ended."""
    return [path for path in _directories(parent) if path.name.startswith(SCRATCH)]


def _directories(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())


@contextlib.contextmanager
def room_for(what: str, *, hint: str = _SPACE_HINT) -> Iterator[None]:
    """A disk that is full is NoSpaceError, whoever of those inside meets it."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise errors.NoSpaceError(f"no space left for {what}: {error.strerror}", hint=hint) from error
        raise


def keep_room(
    place: Path,
    what: str,
    size_bytes: int = 0,
    *,
    reserve_bytes: int | None = None,
    hint: str = _SPACE_HINT,
) -> None:
    """Raises NoSpaceError where so much more would leave others too little: a running VM whose disk cannot
    grow any more is lost.
    """
    kept = RESERVE_BYTES if reserve_bytes is None else reserve_bytes
    free = shutil.disk_usage(place).free
    if free < size_bytes + kept:
        raise errors.NoSpaceError(
            f"no space left for {what}: {place} has {sizes.text_of_bytes(free)}, of which "
            f"{sizes.text_of_bytes(kept)} stay free",
            hint=hint,
        )


@contextlib.contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """A temporary directory on the disk of `parent`, for work too large for a memory file system."""
    with room_for(f"what is unpacked in {parent}"):
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".work-") as path:
            yield Path(path)


def now() -> str:
    """The time as records hold it: RFC 3339, UTC, fine enough to order by."""
    return _text(datetime.datetime.now(datetime.UTC))


def _text(when: datetime.datetime) -> str:
    return when.isoformat(timespec="microseconds").replace("+00:00", "Z")


def moment(text: str) -> datetime.datetime | None:
    """The time that a record holds; None where it holds none, as one from elsewhere may."""
    with contextlib.suppress(ValueError):
        found = datetime.datetime.fromisoformat(text)
        return found if found.tzinfo is not None else None
    return None


def _made_at(record: Record) -> datetime.datetime:
    """For an order; what holds no time is the oldest."""
    return moment(record.created_at) or _NO_TIME


_published: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("published", default=None)
"""By the work that goes on here, in whatever thread."""


class Artefacts(Generic[R]):
    """All published directories of one kind below a root."""

    def __init__(self, root: Path, what: str, record_name: str, record_type: type[R]) -> None:
        self._root = root
        self._what = what
        self._record_name = record_name
        self._type = record_type

    def path(self, artefact_id: str) -> Path:
        return self._root / given_names.parse_id(artefact_id, f"{self._what} id")

    def records(self) -> list[R]:
        """Every readable record, oldest first; a broken one is not listed, but `broken` names it."""
        found: list[R] = []
        for artefact_id in self._ids():
            with contextlib.suppress(errors.BangerError):
                found.append(self.read(artefact_id))
        return sorted(found, key=lambda record: (_made_at(record), record.id))

    def broken(self) -> dict[str, str]:
        """Directories whose record cannot be read, and why."""
        reasons: dict[str, str] = {}
        for artefact_id in self._ids():
            try:
                self.read(artefact_id)
            except errors.BangerError as error:
                reasons[artefact_id] = str(error)
        return reasons

    def read(self, artefact_id: str) -> R:
        path = self.path(artefact_id) / self._record_name
        try:
            record = decoding.json(path.read_bytes(), self._type)
        except FileNotFoundError as error:
            raise errors.NotFoundError(f"there is no {self._what} {artefact_id}") from error
        except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
            if errors.exhausted(error) is not None:
                raise  # its record may be as good as any
            why = (error.strerror if isinstance(error, OSError) else None) or error
            raise errors.OperationFailedError(
                f"the record of {self._what} {artefact_id} cannot be read: {why}",
                hint=f"delete it, and make it again: `banger {self._what} delete {artefact_id}`",
            ) from error
        if record.id != artefact_id:
            raise errors.OperationFailedError(f"{path} says it belongs to {record.id}")
        return record

    def is_broken(self, artefact_id: str) -> bool:
        """It is there, and its record is lost: only its id still names it."""
        if not names.is_id(artefact_id) or not self.path(artefact_id).is_dir():
            return False
        try:
            self.read(artefact_id)
        except errors.BangerError:
            return True
        return False

    def find(self, reference: str) -> R:
        """By id, or by name: the newest of that name."""
        if names.is_id(reference) and (self._root / reference / self._record_name).exists():
            return self.read(reference)
        named = [record for record in self.records() if record.name == reference]
        if not named:
            raise errors.NotFoundError(
                f"there is no {self._what} {reference!r}",
                hint=f"`banger {self._what} list --available` shows what there is",
            )
        return named[-1]

    @contextlib.contextmanager
    def stage(self, artefact_id: str) -> Iterator[Path]:
        """A directory to fill; what the block does not `publish` is gone after it."""
        staged = self._root / f".{given_names.parse_id(artefact_id)}{_STAGED}"
        with room_for(f"{self._what} {artefact_id}"):
            staged.mkdir(parents=True)
            try:
                yield staged
            finally:
                shutil.rmtree(staged, ignore_errors=True)

    def publish(self, staged: Path, record: R) -> R:
        """Writes the record last, makes everything durable, then gives the directory its name.

        Who cancels gets nothing up to that last moment, and all of it after, unless `whole` takes it back.
        It is the newest of its name: a clock that was ahead when another was made must not have that one
        used for ever.
        """
        others = [_made_at(each) for each in self.records() if each.name == record.name]
        if others and max(others) >= _made_at(record):
            later = _text(max(others) + _TICK)
            record = msgspec.structs.replace(record, created_at=later)  # type: ignore[type-var] # it is one
        encoded = msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"
        (staged / self._record_name).write_bytes(encoded)
        for path in (*staged.iterdir(), staged):
            sync(path)
        run.check_cancelled()
        try:
            staged.rename(self.path(record.id))
        except OSError as error:
            raise errors.AlreadyExistsError(f"{self._what} {record.id} is already there") from error
        if (published := _published.get()) is not None:
            published.append(record.id)
        sync(self._root)
        return record

    @contextlib.contextmanager
    def whole(self, is_used: Callable[[str], object]) -> Iterator[None]:
        """What is published in a block that then fails or is cancelled is taken back, unless it is used."""
        published: list[str] = []
        outer = _published.set(published)
        try:
            yield
        except BaseException:
            for each in published:
                if not is_used(each):
                    self.delete(each)
            raise
        finally:
            _published.reset(outer)

    def delete(self, artefact_id: str) -> None:
        """Whether something still uses it is for the caller to check, under its lock. Gone is fine."""
        doomed = self._root / f".{given_names.parse_id(artefact_id)}{_DELETED}"
        with contextlib.suppress(FileNotFoundError):
            self.path(artefact_id).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def names(self) -> dict[str, str]:
        """By id."""
        return {record.id: record.name for record in self.records()}

    def _ids(self) -> list[str]:
        return [path.name for path in self._entries() if names.is_id(path.name)]

    def _entries(self) -> list[Path]:
        return sorted(self._root.iterdir()) if self._root.is_dir() else []


def sync(path: Path) -> None:
    """Returns when a file, or what a directory says, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises NotFoundError and UnauthorizedError for what cannot be read inside, by name.

    The daemon reads as its owner: what root, or another user, made may be closed to it.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise errors.NotFoundError(f"there is no {error.filename or path}", hint=unseen(path)) from error
    except PermissionError as error:
        raise errors.UnauthorizedError(
            f"the daemon's owner may not read {error.filename or path}", hint=_CLOSED_HINT
        ) from error


def unread(path: Path, error: OSError) -> str:
    """The hint for a path of a user's that the daemon could not read; empty where there is none to give."""
    if isinstance(error, PermissionError):
        return _CLOSED_HINT
    return unseen(path) if isinstance(error, FileNotFoundError) else ""


def unseen(path: Path) -> str:
    """The hint for a path that is not there: as a service the daemon has some directories of its own."""
    if path.is_relative_to("/tmp") or path.is_relative_to("/var/tmp"):  # noqa: S108  # none is made there
        return (
            "the daemon does not see the host's /tmp and /var/tmp: put it elsewhere, such as into your home"
        )
    return "the path is looked up by the daemon, on the host that it runs on"
