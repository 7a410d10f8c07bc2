# SPDX-License-Identifier: MIT
"""The rows: what the daemon wants and remembers. SQLite in WAL mode; every call is one short transaction."""

from __future__ import annotations

import datetime
import difflib
import functools
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Final

import msgspec

from banger.contract import decoding, destinations, errors, names, ports, resources
from banger.owner import migrations
from banger.vm import record

_log = logging.getLogger(__name__)

_BUSY_TIMEOUT_MS: Final = 5000
_SHORTEST_PREFIX: Final = 4
_DAMAGED: Final = (
    "stop bangerd, then put banger.db back from a copy, or move it, its -wal and vms/ aside;"
    " no disk was touched"
)
_ENDED: Final = frozenset(resources.VmState) - {resources.VmState.RUNNING}
Row = tuple[str, str, int, str, str, str, str, bytes]
Rows = list[record.VmRecord]
_COLUMNS: Final = "id, name, slot, state, image_id, kernel_id, created_at, record"
_READ: Final = "id, name, slot, state, image_id, kernel_id, created_at, CAST(record AS BLOB)"
"""As bytes: one row whose text is none must not keep the others from being read."""


class Store:
    """One connection, guarded by a lock: the daemon is the only writer, and its transactions are tiny."""

    def __init__(self, path: Path) -> None:
        """Opens and migrates. Raises ConflictError for a file of a newer program."""
        self._lock = threading.Lock()
        self._told: set[str] = set()
        """Whose row is known to be corrupt: rows are read every second."""
        self._connection = connect(path)
        try:
            with _explained():
                _require_whole(self._connection, path)
                migrations.keep(self._connection, path)
                migrations.migrate(self._connection)
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def reserve(
        self, draft: Callable[[int], record.VmRecord], *, throw_away: bool = False
    ) -> record.VmRecord:
        """Leases the lowest free slot and inserts the row drafted for it, in one transaction.

        `throw_away`: see `throw_aways`. Raises AlreadyExistsError for a name that is taken, ConflictError
        when every slot is.
        """
        with self._lasting(), self._transaction() as connection:
            taken = {slot for (slot,) in connection.execute("SELECT slot FROM vms")}
            slot = next((n for n in range(1, names.MAX_SLOTS + 1) if n not in taken), 0)
            if slot == 0:
                raise errors.ConflictError(
                    f"all {names.MAX_SLOTS} VM slots are taken", hint="delete VMs that are no longer needed"
                )
            vm = draft(slot)
            try:
                connection.execute(
                    f"INSERT INTO vms ({_COLUMNS}, throw_away) VALUES (?,?,?,?,?,?,?,?,?)",  # noqa: S608
                    (*_row(vm), throw_away),
                )
            except sqlite3.IntegrityError as error:
                raise _refused(vm, error) from None
        return vm

    def save(self, vm: record.VmRecord) -> None:
        """Raises NotFoundError when the row was deleted meanwhile, OperationFailedError for one salvaged."""
        vm.require_readable()
        with self._transaction() as connection:
            try:
                done = connection.execute(
                    "UPDATE vms SET (id, name, slot, state, image_id, kernel_id, created_at, record)"
                    " = (?,?,?,?,?,?,?,?) WHERE id = ?",
                    (*_row(vm), vm.id),
                )
            except sqlite3.IntegrityError as error:
                raise _refused(vm, error) from None
            if done.rowcount == 0:
                raise errors.NotFoundError(f"VM {vm.name} does not exist any more")

    def save_state(self, vm: record.Salvaged, state: resources.VmState) -> record.VmRecord:
        """All else stays as it is, for whoever can mend it. Raises NotFoundError."""
        with self._transaction() as connection:
            connection.execute("UPDATE vms SET state = ? WHERE id = ?", (state, vm.id))
        return self.get(vm.id)

    def get(self, vm_id: names.VmId) -> record.VmRecord:
        """Raises NotFoundError."""
        for row in self._select("WHERE id = ?", vm_id):
            return row
        raise errors.NotFoundError(f"VM {vm_id} does not exist any more")

    def has(self, vm_id: names.VmId) -> bool:
        with self._lock, _explained():
            return (
                self._connection.execute("SELECT 1 FROM vms WHERE id = ?", (vm_id,)).fetchone() is not None
            )

    def find(self, ref: str) -> record.VmRecord:
        """By name, id or unambiguous beginning of an id. Raises NotFoundError or BadRequestError."""
        for row in self._select("WHERE name = ?1 OR id = ?1 ORDER BY id != ?1", ref):
            return row
        found = self._select("WHERE substr(id, 1, ?) = ?", len(ref), ref) if _is_prefix(ref) else []
        if len(found) == 1:
            return found[0]
        if found:
            raise errors.BadRequestError(f"{ref!r} is the beginning of {len(found)} VM ids")
        close = difflib.get_close_matches(ref, self.taken_names(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "`banger vm list` shows what there is"
        raise errors.NotFoundError(f"there is no VM {ref!r}", hint=hint)

    def find_running(self, ref: str) -> record.VmRecord:
        """As `find`. Raises NotRunningError for one that the row does not call running."""
        vm = self.find(ref)
        if vm.state is not resources.VmState.RUNNING:
            hint = f"start it: `banger vm start {vm.name}`"
            raise errors.NotRunningError(f"{vm.name} is not running", hint=hint)
        return vm

    def list(self) -> list[record.VmRecord]:
        """All rows, the oldest first."""
        return self._select("ORDER BY created_at, id")

    def delete(self, vm_id: names.VmId) -> None:
        """A row that is gone already is fine."""
        with self._lasting(), self._transaction() as connection:
            connection.execute("DELETE FROM vms WHERE id = ?", (vm_id,))

    def set_throw_away(self, vm_id: names.VmId, *, throw_away: bool, lasts: bool = False) -> None:
        """A row that is gone already is fine. `lasts`: it outlives a power cut from here on."""
        with self._lasting() if lasts else nullcontext(), self._transaction() as connection:
            connection.execute("UPDATE vms SET throw_away = ? WHERE id = ?", (throw_away, vm_id))

    def throw_aways(self) -> frozenset[names.VmId]:
        """VMs that end with a client's request, or were being deleted: a daemon that starts deletes them."""
        with self._lock, _explained():
            rows = self._connection.execute("SELECT id FROM vms WHERE throw_away")
            return frozenset(vm_id for (vm_id,) in rows)

    def taken_names(self) -> frozenset[str]:
        return frozenset(self._names("SELECT name FROM vms"))

    def names_using_image(self, image_id: str) -> tuple[str, ...]:
        return self._names("SELECT name FROM vms WHERE image_id = ? ORDER BY name", image_id)

    def names_using_kernel(self, kernel_id: str) -> tuple[str, ...]:
        return self._names("SELECT name FROM vms WHERE kernel_id = ? ORDER BY name", kernel_id)

    @contextmanager
    def _lasting(self) -> Iterator[None]:
        """What is committed in the block, and all before it, outlives a power cut.

        Which VMs there are must: what has no row is deleted. How they are is seen when the host is back.
        """
        with self._lock, _explained():
            self._connection.execute("PRAGMA synchronous = FULL")
        try:
            yield
        finally:
            with self._lock, _explained():
                self._connection.execute("PRAGMA synchronous = NORMAL")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _explained():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                # A full disk may have ended the transaction already.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _select(self, where: str, *values: str | int) -> Rows:
        # Only fixed clauses of this module come in as `where`; values are bound.
        with self._lock, _explained():
            rows = self._connection.execute(f"SELECT {_READ} FROM vms {where}", values).fetchall()  # noqa: S608
        return [self._parsed(row) for row in rows]

    def _parsed(self, row: Row) -> record.VmRecord:
        try:
            vm = decoding.json(row[-1], record.VmRecord)
            _require_same(vm, row)
            _require_meaning(vm.publish, vm.allow)
        except (msgspec.MsgspecError, UnicodeDecodeError, errors.BadRequestError) as error:
            if row[0] not in self._told:
                self._told.add(row[0])
                _log.error("a row is corrupt", extra={"vm": row[0], "error": str(error)})
            return _salvaged(row, str(error))
        return vm

    def _names(self, query: str, *values: str) -> tuple[str, ...]:
        with self._lock, _explained():
            return tuple(name for (name,) in self._connection.execute(query, values))


@contextmanager
def _explained() -> Iterator[None]:
    """SQLite's errors, as errors that say what to do."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        name = error.sqlite_errorname if hasattr(error, "sqlite_errorname") else ""
        if name == "SQLITE_FULL":
            raise errors.NoSpaceError(
                "no space left for banger's database", hint="free space in the state directory"
            ) from error
        if name.startswith("SQLITE_CORRUPT") or name == "SQLITE_NOTADB":
            message = f"banger's database is damaged: {error}"
            raise errors.OperationFailedError(message, hint=_DAMAGED) from error
        hint = "is its disk there, writable, and with free inodes? `df -i` shows those"
        raise errors.OperationFailedError(f"banger's database cannot be used: {error}", hint=hint) from error


def require_rows_for(path: Path, disks: Path) -> None:
    """Without its rows no VM's disk has an owner, and what has none is deleted. Raises ConflictError."""
    has_rows = any(each.exists() and each.stat().st_size > 0 for each in (path, Path(f"{path}-wal")))
    if not has_rows and disks.is_dir() and any(disks.iterdir()):
        raise errors.ConflictError(
            f"{path} is missing or empty, and {disks} holds disks of VMs",
            hint=f"put the database back; or move {disks} away to begin without these VMs",
        )


def _require_whole(connection: sqlite3.Connection, path: Path) -> None:
    """SQLite takes what is missing at the end of a file for rows of nothing, and would go on."""
    [(said,)] = connection.execute("PRAGMA quick_check(1)").fetchall()
    [(page_bytes,)] = connection.execute("PRAGMA page_size").fetchall()
    if said == "ok" and path.stat().st_size % page_bytes:
        said = "its last page is not whole"
    if said != "ok":
        raise errors.OperationFailedError(f"banger's database is damaged: {said}", hint=_DAMAGED)


def connect(path: Path) -> sqlite3.Connection:
    """A connection with every pragma set: they belong to a connection, not to the file.

    WAL with synchronous=NORMAL: a power cut may lose the last transactions but for what must last, and never
    corrupts; reconcile finds out at the next start what really runs.
    """
    with _explained():
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        with _explained():
            connection.text_factory = functools.partial(str, encoding="utf-8", errors="replace")
            connection.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def _row(vm: record.VmRecord) -> tuple[str | int, ...]:
    return (*_kept_twice(vm), vm.created_at.isoformat(), msgspec.json.encode(vm).decode())


def _kept_twice(vm: record.VmRecord) -> tuple[str | int, ...]:
    return (vm.id, vm.name, vm.slot, vm.state, vm.image_id, vm.kernel_id)


def _require_same(vm: record.VmRecord, row: Row) -> None:
    """What is kept twice is written at once. Raises ValidationError where it differs."""
    for what, one, other in zip(_COLUMNS.split(", "), _kept_twice(vm), row, strict=False):
        if one != other:
            raise msgspec.ValidationError(f"its {what} is {one!r} in one place and {other!r} in another")


@functools.lru_cache(names.MAX_SLOTS)
def _require_meaning(publish: tuple[str, ...], allow: tuple[str, ...]) -> None:
    """Raises BadRequestError for texts that nobody asked for. Looked at once: rows are read every second."""
    ports.parse_all(publish)
    for rule in allow:
        destinations.parse(rule)


def _salvaged(row: Row, why: str) -> record.Salvaged:
    """One corrupt row must not take the others down: what the columns still say.

    Whoever does not run is in state `error`. What may run counts as running: that is looked at, and what
    runs is ended in order.
    """
    vm_id, name, slot, state, image_id, kernel_id, created_at, _ = row
    may_run = state not in _ENDED
    hint = f"its disks are untouched; `banger vm delete {name}` deletes them and it"
    if may_run:
        hint = f"it runs on: `banger vm cp` brings what is in it to safety; then `banger vm delete {name}`"
    return record.Salvaged(
        id=names.VmId(vm_id),
        name=names.VmName(name),
        slot=slot,
        image_id=names.ImageId(image_id),
        kernel_id=names.KernelId(kernel_id),
        vcpus=0,
        memory_mib=0,
        disk_size_mib=0,
        network=False,
        state=resources.VmState.RUNNING if may_run else resources.VmState.ERROR,
        created_at=_time(created_at),
        last_error=errors.ErrorBody(
            code=errors.OperationFailedError.code,
            message=f"the row of {name} is corrupt: {why}",
            hint=hint,
        ),
    )


def _time(text: str) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(text)
    except ValueError:
        return datetime.datetime.fromtimestamp(0, datetime.UTC)


def _is_prefix(ref: str) -> bool:
    return len(ref) >= _SHORTEST_PREFIX and set(ref) <= set("0123456789abcdef")


def name_taken(name: str) -> errors.AlreadyExistsError:
    hint = f"choose another name, or leave it out; `banger vm show {name}`, `banger vm delete {name}`"
    return errors.AlreadyExistsError(f"there is a VM named {name} already", hint=hint)


def _refused(vm: record.VmRecord, error: sqlite3.IntegrityError) -> errors.BangerError:
    if "vms.name" in str(error):
        return name_taken(vm.name)
    return errors.ConflictError(f"the row of {vm.name} cannot be kept: {error}")
