"""The migration of a database in PostgreSQL to this release's schema, beside servers at work if they can live with it.

One runs at a time. It gives up what it cannot finish within a second, tries again, and builds indexes while others
write. One that does not get its locks names the sessions that have them.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from typing import Any, Final

import psycopg
from attrs import evolve
from psycopg import errors

from chutes_proto.errors import StoreBusy, StoreError
from chutes_proto.io.stores.postgres.connection import Connection, rows_of
from chutes_proto.io.stores.postgres.faults import AGAIN, Again, translated
from chutes_proto.io.stores.postgres.locks import HOLDERS, described
from chutes_proto.io.stores.postgres.transactions import Beginning, Database
from chutes_proto.store._schema import INDEX_STATE, compatible_since, indexes

_LOCK: Final = "SELECT pg_advisory_xact_lock(7163393186713182564)"  # one migration at a time

_EXPANSION_SECONDS: Final = 1.0
"""How long one attempt at a migration may hold up the servers that go on beside it."""

_MIGRATION_SECONDS: Final = 60.0
"""After how many seconds a migration makes no further attempt to get its locks."""


def migrate_schema(database: Database) -> int | None:
    """Bring the database to our schema; return the version that it had. Raises `StoreError`."""
    # A migration must see the changes of another one for which it waited.
    begin = database.beginning("READ COMMITTED")
    with contextlib.closing(database.connect()) as lock, database.transaction(lock, begin):
        database.lift_limits(lock)
        _ = rows_of(lock, f"SET LOCAL idle_in_transaction_session_timeout = 0; {_LOCK}")
        with contextlib.closing(database.connect()) as connection:
            found = _change_schema(database, connection, begin)
            connection.answer_seconds = None
            for name, create in indexes():
                _build_index(database, connection, name, create)
    return found


def _change_schema(database: Database, connection: Connection, begin: Beginning) -> int | None:
    """Make the transaction of a migration, until it gets its locks; return the version before."""
    until = time.monotonic() + _MIGRATION_SECONDS
    pause = 0.05
    while True:
        try:
            with database.transaction(connection, begin):
                versions = database.versions(connection)
                database.lift_limits(connection)
                if (found := versions.found()) is not None and found >= compatible_since():
                    versions = evolve(versions, execute=_within_a_second(connection))
                return versions.migrate()
        except (StoreBusy, Again) as exc:
            if not isinstance(exc.__cause__, (errors.LockNotAvailable, errors.QueryCanceled, *AGAIN)):
                raise
            if time.monotonic() + pause > until:
                raise _held_up(database, connection, begin, exc.__cause__) from exc
        time.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - not a secret; others work meanwhile
        pause = min(2 * pause, 1.0)


def _within_a_second(connection: Connection) -> Callable[[str], list[tuple[Any, ...]]]:
    """Return what runs the statements of one transaction, all of them within `_EXPANSION_SECONDS`."""
    end = time.monotonic() + _EXPANSION_SECONDS

    def execute(text: str) -> list[tuple[Any, ...]]:
        left = max(1, round(1000 * (end - time.monotonic())))
        return rows_of(connection, f"SET LOCAL lock_timeout = {left}; SET LOCAL statement_timeout = {left}; {text}")

    return execute


def _held_up(database: Database, connection: Connection, begin: Beginning, cause: BaseException | None) -> StoreError:
    """Return the error of a migration that does not get its locks, or would keep them for too long.

    It has the sessions that have them.
    """
    with database.transaction(connection, begin):
        sessions = described(rows_of(connection, HOLDERS))
    if not sessions and isinstance(cause, errors.QueryCanceled):
        return StoreBusy(
            f"store {database.name}: the migration was given up: its own statements take longer than a second, for"
            " which servers would wait; run the command again when the database has less to do; nothing was changed"
        )
    advice = "wait for it, or end it with SELECT pg_terminate_backend(...), and run the command again"
    found = f"{sessions}; {advice}" if sessions else "no session has them now; run the command again"
    return StoreBusy(f"store {database.name}: the migration does not get the locks of its tables: {found}")


def _build_index(database: Database, connection: Connection, name: str, create: str) -> None:
    """Build an index while others write; again, if a build was interrupted."""
    try:
        state = rows_of(connection, INDEX_STATE.format(name=name))
        if state == [(False,)]:
            _ = rows_of(connection, f"DROP INDEX CONCURRENTLY {name}")
        if state != [(True,)]:
            _ = rows_of(connection, create)
    except psycopg.Error as exc:
        raise translated(database.name, exc) from exc
