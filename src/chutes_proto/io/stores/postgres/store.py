"""The store in PostgreSQL: units as transactions, repeated after conflicts, and what is asked of the whole database."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from attrs import field, frozen
from psycopg import errors

from chutes_proto.errors import RowNotAuthentic
from chutes_proto.io.stores.marks import Change, MarkedStore, MarkKeeper
from chutes_proto.io.stores.postgres.connection import Asked, Connection, rows_of
from chutes_proto.io.stores.postgres.faults import FAULTS, Again, fault_of
from chutes_proto.io.stores.postgres.pool import Pool
from chutes_proto.io.stores.postgres.transactions import Beginning, Database
from chutes_proto.io.stores.postgres.url import DEFAULTS, parse
from chutes_proto.io.stores.sealing import seal_if_new
from chutes_proto.store._crowding import Crowding
from chutes_proto.store._custody import Custody
from chutes_proto.store._guard import Guard, statements_ahead
from chutes_proto.store._rows import ROWS
from chutes_proto.store._run import Snapshot, run_script, unit_name, untold
from chutes_proto.store._schema import missing_table, tables
from chutes_proto.store._sql import LostFactError, is_read, returns_rows

if TYPE_CHECKING:
    from pathlib import Path

    from chutes_proto.io.stores.postgres.exchange import Rows
    from chutes_proto.keys.vault import Vault
    from chutes_proto.store._rows import StoreOp
    from chutes_proto.store._run import Store, Unit
    from chutes_proto.store._sql import Values

T = TypeVar("T")

_REPLICATION: Final = (
    "SELECT (SELECT count(*) FROM pg_stat_replication WHERE application_name <> 'pg_basebackup'),"
    " current_setting('synchronous_standby_names') <> ''"
)
"""The statement that tells how many standbys stream, and whether a commit waits for one.

Only a monitor may see which of them is synchronous. Where one is named, a commit waits until it has the change.
"""

_NONE_STREAMS: Final = (
    "no standby streams, and synchronous_standby_names names one: until it does, no commit ends, and no boot is"
    " granted; start it"
)

_UNLOGGED: Final = (
    "SELECT min(relname::text) FROM pg_class WHERE relnamespace = current_schema()::regnamespace"  # noqa: S608 - names
    f" AND relpersistence = 'u' AND relname IN {tables()}"
)
"""The statement that tells which of our tables PostgreSQL empties after a crash, and on a standby."""

_COMPANY: Final = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"  # noqa: S608
    f" AND application_name IN ('{DEFAULTS['application_name']}', current_setting('application_name'))"
)
"""The statement that counts the other sessions of our database that have our name, the default or the URL's.

Everybody may see names; a server whose URL says a third one is not found.
"""

_LOCK_MAKING: Final = "SELECT pg_advisory_xact_lock(7163393186713182564)"
"""The lock of the one process that makes the schema at a time."""

_HELD: Final = 200
"""How many writes may wait."""

_MAX_DUPLICATES: Final = 3


@frozen
class Replication:
    """How many standbys stream from the database, and whether a commit waits for one; for logs and metrics."""

    streaming: int
    is_synchronous: bool = field(kw_only=True)

    @property
    def warning(self) -> str:
        """Why a fail-over would lose what was acknowledged, or why nothing is; empty where neither is in sight."""
        if self.missing:
            return f"store: {self.missing}"
        if self.is_synchronous or not self.streaming:
            return ""
        return (
            f"store: {self.streaming} standbys stream and none is synchronous: a fail-over to one that is behind loses"
            " keys; set synchronous_standby_names, or store.require_synchronous to refuse such a database"
        )

    @property
    def missing(self) -> str:
        """Why no commit ends, where it is for a missing standby; else empty."""
        return _NONE_STREAMS if self.is_synchronous and not self.streaming else ""


class PostgresStore(MarkedStore):
    """Rows in the database at ``url`` (``postgresql://user@host/database``). May be used from several threads.

    The URL may have every option of libpq, such as a password file (``?passfile=/path``). At most ``connections`` are
    open at once. A transaction raises `StoreBusy` after it waited ``busy_seconds`` for a connection or for conflicting
    transactions, or if the database has not answered for a few seconds more. It raises `StoreError` while this
    machine's clock and the database's differ by more than ``clock_difference_seconds``.

    With ``make`` an empty database gets the schema; ``is_new`` tells whether it was made so. ``rollbacks`` is the
    number of repeated transactions of each unit.

    A database that is behind the mark in ``mark_file``, or behind what this object has seen of it, is refused; with
    ``require_synchronous`` so is one without a synchronous standby. ``replication`` is what was found last. With
    ``alone`` it is noted (`notes`) if others of us are connected to the database: they may be servers. Rows are
    authenticated with the key that ``vault`` opens, and a new store is sealed with it.

    Raises `ConfigurationError` for any other text, and `StoreError` for a database that cannot be a store.
    """

    def __init__(
        self,
        url: str,
        *,
        connections: int = 16,
        busy_seconds: float = 5.0,
        clock_difference_seconds: float = 5.0,
        require_synchronous: bool = False,
        mark_file: Path | None = None,
        make: bool = False,
        alone: bool = False,
        vault: Vault | None = None,
    ) -> None:
        self.name: str
        conninfo, self.name = parse(url)
        self.is_new: bool = False
        self.rollbacks: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._busy_seconds = busy_seconds
        self._require_synchronous = require_synchronous
        self.replication: Replication = Replication(0, is_synchronous=False)
        self.custody: Custody = Custody(self.name)
        if vault is not None:
            self.custody.hold(vault.unwrap)
        self._marks = MarkKeeper(self.name, mark_file, self.custody)
        self._company = ""
        self._database = Database(
            conninfo,
            self.name,
            self.custody,
            self._marks,
            busy_seconds=busy_seconds,
            clock_difference_seconds=clock_difference_seconds,
        )
        self._pool = Pool(self._database, Crowding(connections), busy_seconds)
        try:
            if make:
                with closing(self._database.connect()) as connection:
                    self.is_new = self._make(connection)
            with self._pool.reserve() as connection:
                with self._database.transaction(connection, self._database.beginning("SERIALIZABLE")):
                    versions = self._database.versions(connection)
                    if versions.found() is None:
                        self._marks.refuse_new("it is empty")
                    versions.require()
                    if alone and (others := rows_of(connection, _COMPANY)[0][0]):
                        self._company = (
                            f"store {self.name}: {others} other sessions of chutes-proto are connected there;"
                            " stop a server that still runs, and copy again: the keys that it makes are missing"
                        )
                self._look(connection)
            if vault is not None:
                seal_if_new(self, vault)
        except BaseException as exc:
            self.close()
            if isinstance(exc, Again):
                raise exc.fault from exc.__cause__
            raise

    def _make(self, connection: Connection) -> bool:
        """Make the schema in an empty database; return whether it was."""
        # One that waited for another process sees what that has made.
        with self._database.transaction(connection, self._database.beginning("READ COMMITTED", _LOCK_MAKING)):
            self._database.lift_limits(connection)
            return self._database.versions(connection).make()

    def transact(self, unit: Unit[T]) -> T:
        """Run ``unit`` as one transaction; see `chutes_proto.store._run.Store`."""
        database = self._database
        begin = (
            database.read_committed if unit.READS_COMMITTED else database.alone if unit.ALONE else database.serializable
        )
        sent = unit.ahead()
        ahead = statements_ahead(sent, with_heads=self.custody.is_open) if sent else ()
        try:
            return self._with_retries(unit_name(unit), partial(self._run, unit=unit), begin, ahead)
        except RowNotAuthentic as exc:
            with self._counting:
                self.custody.note(exc)
            raise

    def check(self, tell: Callable[[int, int], object] = untold) -> dict[str, int]:
        """Read all rows; return their number for each table. Raises `StoreError` for damage and for another schema.

        ``tell`` takes how many rows are read, and of how many, after each table.
        """
        return self._with_retries("check", lambda connection: self._check(connection, tell), self._database.reading)

    @contextlib.contextmanager
    def snapshot(self) -> Generator[Store]:
        """See `DurableStore.snapshot`."""
        try:
            with self._looked_at() as connection, self._database.transaction(connection, self._database.reading):
                self._database.lift_limits(connection)
                yield Snapshot(lambda unit: self._run(connection, unit))
        except Again as exc:
            raise exc.fault from exc.__cause__

    def check_writing(self) -> None:
        """Check that a server can write: the rights of the database's user, and that the disk takes data.

        Raises `StoreError`.
        """
        self._with_retries("check", self._check_writing)

    def close(self) -> None:
        """Close idle connections; then every call raises `StoreError`. Running transactions end as usual."""
        self._pool.close()
        self._marks.close()

    @property
    def clock_skew(self) -> int | None:
        """See `DurableStore.clock_skew`."""
        return self._database.clock_skew

    @property
    def callers(self) -> int:
        """The number of transactions that may run at once now; conflicts lower it."""
        return self._pool.allowed

    @property
    def replication_warning(self) -> str:
        """See `Replication.warning`."""
        return self.replication.warning

    @property
    def notes(self) -> list[str]:
        """Findings that an operator should know, about the replication and the mark."""
        return [
            *filter(None, (self.replication_warning, self._company, self.mark_warning, self.log_warning)),
            *self._marks.notes,
        ]

    @property
    def retries(self) -> int:
        """The number of transactions that were repeated."""
        return self.rollbacks.total()

    def _with_retries(
        self,
        of: str,
        work: Callable[[Connection], T],
        begin: Beginning | None = None,
        ahead: Sequence[tuple[str, Values]] = (),
    ) -> T:
        """Do ``work`` as one transaction; repeat it after conflicts, until ``busy_seconds`` are over."""
        until = time.monotonic() + self._busy_seconds
        pause = 0.001
        duplicates = 0
        while True:
            try:
                with self._looked_at() as connection:
                    with self._database.transaction(connection, begin or self._database.serializable, ahead):
                        result = work(connection)
                    self._committed(connection.changes, connection.heads, connection.session.key)
                    return result
            except Again as exc:
                duplicates += isinstance(exc.__cause__, errors.UniqueViolation)
                if exc.is_ahead:
                    ahead = ()
                if time.monotonic() + pause > until or duplicates > _MAX_DUPLICATES:
                    raise exc.fault from exc.__cause__
            with self._counting:
                self.rollbacks[of] += 1
            time.sleep(random.uniform(0, pause))  # noqa: S311 - not a secret
            pause = min(2 * pause, 0.1)

    def _check(self, connection: Connection, tell: Callable[[int, int], object]) -> dict[str, int]:
        self._database.versions(connection).require()
        self._database.lift_limits(connection)
        tables = [kind.TABLE for kind in ROWS]
        total = sum(rows_of(connection, f"SELECT count(*) FROM {table}")[0][0] for table in tables)  # noqa: S608
        found: dict[str, int] = {}
        for table in tables:
            _ = tell(sum(found.values()), total)
            # As text, so that every value is read completely.
            found[table] = rows_of(connection, f"SELECT count(row::text) FROM {table} AS row")[0][0]  # noqa: S608
        return found

    def _check_writing(self, connection: Connection) -> None:
        rights = ("SELECT", "INSERT", "UPDATE", "DELETE")
        needed = [(table, right) for table in tables() for right in rights]
        texts = (f"has_table_privilege('{table}', '{right}')" for table, right in needed)
        is_read_only, *found = rows_of(
            connection, f"SELECT current_setting('transaction_read_only') = 'on', {', '.join(texts)}"
        )[0]
        if is_read_only:
            raise fault_of(self.name, FAULTS["25006"])
        lacking = [f"{right} on {table}" for (table, right), has in zip(needed, found, strict=True) if not has]
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise fault_of(self.name, f"{FAULTS['42501']} (it lacks {lacking[0]}{more})")
        self._database.require_space(connection)

    def _run(self, connection: Connection, unit: Unit[T]) -> T:
        changes: list[Change] = []
        connection.changes = changes
        ahead = connection.ahead

        def run(op: StoreOp[Any] | None, text: str, values: Values) -> Rows:
            if (text, values) in ahead:
                return ahead[text, values] if is_read(text) else ahead.pop((text, values))
            asked = Asked(op, text, values, changes)
            if op is not None and op.MAY_TAKE_LONG:
                _ = self._database.send(connection)
                self._database.lift_limits(connection)
                return self._database.send(connection, asked)
            if returns_rows(text):
                return self._database.send(connection, asked)
            for known in [known for known in ahead if is_read(known[0])]:
                del ahead[known]  # it may be different now
            connection.held.append(asked)
            return [] if len(connection.held) < _HELD else self._database.send(connection)

        guard = Guard(connection.session, run)
        try:
            result = run_script(unit.script(), guard.perform)
            guard.finish()
        except LostFactError as exc:
            raise fault_of(self.name, str(exc)) from None
        if not all(is_read(text) for text, _ in ahead):
            raise RuntimeError(f"{unit_name(unit)} has not done what it said that it does")
        connection.heads = guard.versions
        return result

    # --- what was seen of the database ---

    @contextlib.contextmanager
    def _looked_at(self) -> Generator[Connection]:
        """Reserve a connection to a database that is not behind the mark."""
        with self._pool.reserve() as connection:
            if not connection.is_looked_at or self._marks.is_due() or self._database.is_full:
                self._look(connection)
            yield connection

    def _look(self, connection: Connection) -> None:
        """Compare the database with the mark. Raises `StoreError` for one that is behind or not replicated as it must.

        So it does for one that lacks a table.
        Not in a serializable transaction: to read the newest audit rows in one conflicts with everyone who adds some.
        """
        look = f"{_REPLICATION}, ({_UNLOGGED}), ({missing_table('postgresql')})"
        with self._database.transaction(connection, self._database.beginning("READ COMMITTED", then=look)) as rows:
            ((streaming, has_synchronous, unlogged, missing),) = rows[0]
            if missing is not None:
                raise self._database.versions(connection).lacks(missing)
            if unlogged is not None:
                raise fault_of(
                    self.name,
                    f"the table {unlogged} is UNLOGGED, so a crash or a fail-over would empty it, and keys could be"
                    f" lost; say ALTER TABLE {unlogged} SET LOGGED",
                )
            self.replication = Replication(streaming, is_synchronous=has_synchronous)
            self._database.hint = f"; {why}" if (why := self.replication.missing) else ""
            if self._require_synchronous and not has_synchronous:
                raise fault_of(
                    self.name,
                    "store.require_synchronous is set, and synchronous_standby_names is empty there: a fail-over would"
                    " lose keys; name a synchronous standby",
                )
            self._marks.compare(lambda text: rows_of(connection, text), connection.timeline)
            if self._database.is_full:
                self._database.require_space(connection)
        # Only now: one that is refused must not be what the other connections are held to.
        self._database.timeline = connection.timeline
        connection.is_looked_at = True
