# SPDX-License-Identifier: MIT
"""The database's schema as ordered, forward-only migrations; `user_version` says how far a file is."""

from __future__ import annotations

import contextlib
import enum
import sqlite3
from pathlib import Path
from typing import Final

from banger import artefacts
from banger.contract import errors

# Append only: a migration that has shipped never changes.
MIGRATIONS: Final[tuple[str, ...]] = (
    """
    CREATE TABLE vms (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        slot INTEGER NOT NULL UNIQUE,
        state TEXT NOT NULL,
        image_id TEXT NOT NULL,
        kernel_id TEXT NOT NULL,
        created_at TEXT NOT NULL,
        record TEXT NOT NULL
    ) STRICT
    """,
    "ALTER TABLE vms ADD COLUMN throw_away INTEGER NOT NULL DEFAULT 0",
    # An older program would take a row with this field for a corrupt one; so it must refuse the file.
    "UPDATE vms SET record = json_set(record, '$.nat', json('false')) WHERE json_valid(record)",
    "UPDATE vms SET record = json_set(record, '$.ttl_s', 0) WHERE json_valid(record)",
    "UPDATE vms SET record = json_set(record, '$.host_boot_id', '') WHERE json_valid(record)",
    "UPDATE vms SET record = json_set(record, '$.placing', '') WHERE json_valid(record)",
    """
    UPDATE vms SET record = json_set(
        json_remove(record, '$.workspace'),
        '$.workspaces',
        json(CASE json_type(record, '$.workspace')
             WHEN 'object' THEN json_array(json_extract(record, '$.workspace'))
             ELSE '[]' END)
    ) WHERE json_valid(record)
    """,
    "UPDATE vms SET record = json_set(record, '$.autostart', json('false')) WHERE json_valid(record)",
)


class Verdict(enum.IntEnum):
    """The exit status of `bangerd --check-migrations`."""

    CURRENT = 0
    WILL_MIGRATE = 1
    TOO_NEW = 2


def check(path: Path) -> Verdict:
    """Looks without changing anything: what is to be done is done to a copy in memory.

    A file that does not exist yet will be migrated. Raises OperationFailedError for a file that is no
    database, or that cannot be migrated.
    """
    if not path.exists():
        return Verdict.WILL_MIGRATE
    try:
        with (
            contextlib.closing(_open_read_only(path)) as connection,
            contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as copy,
        ):
            version = _version(connection)
            if version >= len(MIGRATIONS):
                return Verdict.CURRENT if version == len(MIGRATIONS) else Verdict.TOO_NEW
            connection.backup(copy)
            migrate(copy)
    except sqlite3.DatabaseError as error:
        raise errors.OperationFailedError(f"{path} cannot be read or migrated: {error}") from error
    return Verdict.WILL_MIGRATE


def keep(connection: sqlite3.Connection, path: Path) -> None:
    """Before a migration: a copy of the database as its program left it, for `undo`.

    Nobody else writes meanwhile: the daemon is alone, and serves nobody yet.
    """
    version = _version(connection)
    if not 0 < version < len(MIGRATIONS):
        return
    kept = _kept(path, version)
    staged = kept.with_name(f".{kept.name}.new")
    staged.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(staged, isolation_level=None)) as copy:
        connection.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")
    _publish(staged, kept)


def undo(path: Path) -> bool:
    """Puts back what was kept before another program's migrations; False when there is nothing to undo.

    Nobody may use the database meanwhile. Killed at any moment, it is the one or the other, whole. Raises
    NotFoundError when the database is newer than this program and no copy was kept, and ConflictError when
    VMs were made since: the older program would take the disks of VMs that it has no row of for litter.
    """
    if check(path) is not Verdict.TOO_NEW:
        return False
    kept = _kept(path, len(MIGRATIONS))
    if not kept.exists():
        raise errors.NotFoundError(
            f"{path} is newer than this program, and {kept} is not there",
            hint="install the banger that wrote it, or a newer one",
        )
    lost = _made_since(path, kept)
    if lost:
        raise errors.ConflictError(
            f"VMs were made since {kept} was kept, and would be lost: {', '.join(sorted(lost))}",
            hint="go on with the banger that wrote the database, or a newer one",
        )
    # A write-ahead log of the newer one beside the older one would be the end of both.
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    staged = kept.with_name(f".{kept.name}.new")
    staged.write_bytes(kept.read_bytes())
    _publish(staged, path)
    return True


def settle(path: Path) -> None:
    """Deletes what was kept for `undo`: from now on VMs are made that it lacks."""
    gone = [each for each in path.parent.glob(f"{path.name}.v*") if each.suffix.removeprefix(".v").isdigit()]
    for each in gone:
        each.unlink(missing_ok=True)
    if gone:
        artefacts.sync(path.parent)


def _made_since(path: Path, kept: Path) -> set[str]:
    """The VMs that the copy lacks: names, or ids where a newer program keeps its rows in another way."""
    known = set(_vms(kept))
    try:
        found = _vms(path)
    except sqlite3.OperationalError:
        found = {each.name: each.name for each in path.parent.glob("vms/*") if each.is_dir()}
    return {found[vm] for vm in found.keys() - known}


def _vms(path: Path) -> dict[str, str]:
    """Names by id."""
    with contextlib.closing(_open_read_only(path)) as connection:
        return dict(connection.execute("SELECT id, name FROM vms").fetchall())


def _kept(path: Path, version: int) -> Path:
    return path.with_name(f"{path.name}.v{version}")


def _publish(staged: Path, path: Path) -> None:
    """By rename, and on the disk before it returns."""
    artefacts.sync(staged)
    staged.rename(path)
    artefacts.sync(path.parent)


def migrate(connection: sqlite3.Connection) -> None:
    """Brings the file to this program's version, each migration in one transaction.

    Raises ConflictError when the file is newer than this program.
    """
    version = _version(connection)
    if version > len(MIGRATIONS):
        raise errors.ConflictError(
            f"the database has version {version}, newer than this program's {len(MIGRATIONS)}",
            hint="install the banger that wrote it, or a newer one",
        )
    for number, statement in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")


def _open_read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)
