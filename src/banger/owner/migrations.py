# SPDX-License-Identifier: MIT
"""The database's schema as ordered, forward-only migrations; `user_version` says how far a file is."""

from __future__ import annotations

import contextlib
import enum
import sqlite3
from pathlib import Path
from typing import Final

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
)


class Verdict(enum.IntEnum):
    """The exit status of `bangerd --check-migrations`."""

    CURRENT = 0
    WILL_MIGRATE = 1
    TOO_NEW = 2


def check(path: Path) -> Verdict:
    """Looks without changing anything; a file that does not exist yet will be migrated.

    Raises OperationFailedError for a file that is no database.
    """
    if not path.exists():
        return Verdict.WILL_MIGRATE
    try:
        with contextlib.closing(_open_read_only(path)) as connection:
            version = _version(connection)
    except sqlite3.DatabaseError as error:
        raise errors.OperationFailedError(f"{path} cannot be read: {error}") from error
    if version == len(MIGRATIONS):
        return Verdict.CURRENT
    return Verdict.WILL_MIGRATE if version < len(MIGRATIONS) else Verdict.TOO_NEW


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
