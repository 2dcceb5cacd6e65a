"""The store in a PostgreSQL database, which several server processes share.

Rules kept here:

* nothing is set for a session: behind a pooler each transaction may meet another session of the database. So what
  begins a transaction makes the settings for that transaction alone;
* a unit takes two round trips, if it says what it reads (`Unit.ahead`): the beginning and these reads are one, all its
  writes and the commit the other. A write waits for the next read, or for the commit;
* such a unit needs no thread (`PostgresStore.attempt`): its waits are generators, as psycopg's own, which an event loop
  or a thread drives. Whatever is out of the ordinary needs one;
* an answer leaves only after its transaction is durable: each transaction sets ``synchronous_commit`` to ``on`` at
  least, and is refused where ``fsync`` or ``full_page_writes`` is off at that moment;
* every transaction is SERIALIZABLE, but that of a unit which says that it ``READS_COMMITTED``; one that PostgreSQL
  could not serialize with others runs again, until ``busy_seconds`` are over;
* a transaction whose connection is lost before the commit was sent never was, and runs again on a new connection; one
  whose connection is lost after that, or whose commit came with a notice, is never run again here: it may be
  committed, and a fail-over may lose it, because a cancelled wait for a synchronous standby succeeds with a warning;
* the database cancels a statement of a unit that takes too long; if it does not answer at all, the connection is
  closed; a migration, a check and the operations of operators have no such limit;
* the clocks of this machine and of the database are compared in every transaction: rows are dated by both;
* the database is compared with the mark of what was seen of it (``marks.py``), and a change of its timeline is noticed
  in every transaction: a server that goes on with an old primary would grant what the new one does not know;
* at most ``connections`` are open; each is made by the caller that needs it, which gets the reason if that fails;
* fewer transactions run at once while they conflict with each other (``store/_crowding.py``);
* a database without our schema is refused, and neither changed nor, unless an operator asks for it, migrated; every
  transaction looks at the version, because a newer release may have migrated meanwhile;
* a migration that our servers can live with stops none of them: it gives up what it cannot finish within a second,
  tries again, and builds indexes while others write;
* a password is in no name, error or log line.

It needs the extra ``chutes-proto[postgres]``, a database or schema of its own with encoding UTF8, and direct
connections or a pooler that keeps a transaction together.
"""

from __future__ import annotations

import contextlib
import functools
import random
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from attrs import define, evolve, field, frozen

from chutes_proto.errors import ConfigurationError, FateUnknown, RowNotAuthentic, StoreAway, StoreBusy, StoreError
from chutes_proto.io.stores.attempts import UNKNOWN, Conflict, NeedsThread
from chutes_proto.io.stores.marks import Change, MarkedStore, MarkKeeper
from chutes_proto.io.stores.sealing import seal_if_new
from chutes_proto.quote._terms import rfc3339
from chutes_proto.store._crowding import Crowding
from chutes_proto.store._custody import Custody, Session
from chutes_proto.store._guard import Guard, statements_ahead
from chutes_proto.store._run import Snapshot, run_script, unit_name, untold
from chutes_proto.store._versions import Versions
from chutes_proto.store.rows import ROWS, AuditRow, Insert, PurgeAudit
from chutes_proto.store.sql import (
    INDEX_STATE,
    READ_VERSION,
    LostFactError,
    compatible_since,
    for_driver,
    indexes,
    is_read,
    returns_rows,
)

try:
    import psycopg
    from psycopg import conninfo, errors
    from psycopg.waiting import Ready, Wait

    from chutes_proto.io.stores.exchange import Prepared, StatementError, exchange
except ImportError as _missing:
    raise ConfigurationError(
        f"a store in PostgreSQL needs psycopg, which cannot be imported ({_missing});"
        " install it with: pip install 'chutes-proto[postgres]'"
    ) from None

if TYPE_CHECKING:
    from pathlib import Path

    from psycopg.abc import PQGen

    from chutes_proto.io.stores.attempts import Attempt
    from chutes_proto.io.stores.exchange import Rows
    from chutes_proto.keys.vault import Vault
    from chutes_proto.store._run import Store, Unit
    from chutes_proto.store.rows import StoreOp
    from chutes_proto.store.sql import Values

T = TypeVar("T")

_OLDEST_SERVER: Final = 12_00_00

_DEFAULTS: Final[dict[str, str]] = {
    "connect_timeout": "2",  # for each host: those that do not answer must leave time for the one that does
    "target_session_attrs": "read-write",  # of several hosts, the one that can write
    # A dead host is noticed, both while data is sent and while an answer is awaited.
    "tcp_user_timeout": "10000",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "application_name": "chutes-proto",
}
"""Settings of a connection, unless the URL has others."""

_URL: Final = re.compile(r"postgres(ql)?://([^/@]*+@)?+[^/@?]*(/[^@?]*)?(\?.*)?", re.DOTALL)
"""No ``@`` but the one before the host: with any other, a password was not percent-encoded, and libpq would show parts
of it as names and port."""

_FILES: Final = frozenset({"passfile", "sslcert", "sslkey", "sslrootcert", "sslcrl", "sslcrldir"})
"""Options with paths, which libpq resolves from the working directory."""

_MUST_BE: Final = {"fsync": "on", "full_page_writes": "on", "server_encoding": "UTF8"}
"""Settings of the database that no transaction can choose. A reload changes the first two under open sessions."""

_SET_LOCAL: Final = {
    # A transaction that reads a whole table conflicts with every concurrent writer of that table.
    "enable_seqscan": "off",
    # To read one of the small tables without an index then counts as very expensive: PostgreSQL would compile the
    # statement each time, which takes a thousand times longer than to read the rows.
    "jit": "off",
    # A process that hangs in the middle of a transaction must not block the others for long.
    "idle_in_transaction_session_timeout": "10s",
    # The warning that a commit did not reach the standby must arrive, whatever the role or the database sets here.
    "client_min_messages": "warning",
}

_WORK: Final = 3.0
"""How many seconds a statement of a unit may take, besides ``busy_seconds`` of waiting for a lock: more than it ever
needs. The database then cancels it, and the connection is used further."""

_SILENCE: Final = 5.0
"""How many seconds an answer may take, besides ``busy_seconds``. More than `_WORK`, so that a working database has
answered by then that it cancelled; it does not cancel a COMMIT, whose outcome is unknown then. More than
``busy_seconds`` in total, so that nothing is tried again."""

_LOCK: Final = "SELECT pg_advisory_xact_lock(7163393186713182564)"  # one migration at a time

_EXPANSION_SECONDS: Final = 1.0
"""How long one attempt at a migration may hold up the servers that go on beside it."""

_MIGRATION_SECONDS: Final = 60.0
"""After how many seconds a migration makes no further attempt to get its locks."""

_HOLDERS: Final = (
    # A role that is not a monitor sees NULL for what the sessions of others do.
    "SELECT pid, usename, application_name, state, extract(epoch FROM now() - min(xact_start)),"
    " string_agg(DISTINCT relname, ', ') FROM pg_locks JOIN pg_stat_activity USING (pid)"
    " JOIN pg_class ON pg_class.oid = relation WHERE granted AND pid <> pg_backend_pid() AND relkind = 'r'"
    " AND relnamespace = current_schema()::regnamespace AND datname = current_database()"
    " GROUP BY 1, 2, 3, 4 ORDER BY min(xact_start) LIMIT 3"
)
"""The statement that lists the sessions with locks on our tables, the oldest transaction first."""

_LOCK_VERSION: Final = "LOCK TABLE fact IN ROW SHARE MODE"
"""The lock that each unit holds: a migration waits for it, and so does a unit that runs alone, but no backup."""

_LOCK_ALONE: Final = "LOCK TABLE fact IN EXCLUSIVE MODE"
"""That of a unit which runs alone, taken at once: two that first had the weaker one would wait for each other."""

_LOCK_READING: Final = "LOCK TABLE fact IN ACCESS SHARE MODE"
"""That of a long transaction which grants nothing: only a migration waits for it."""

_READ_SETTINGS: Final = (
    # `on` waits for the disks of this server and of its synchronous standbys; `remote_apply`, which waits more, stays.
    # A weaker setting is raised to `on`, because keys could be lost.
    "SELECT pg_backend_pid(), extract(epoch FROM now()),"  # noqa: S608 - names of ours
    " CASE WHEN pg_is_in_recovery() THEN 0 ELSE"
    " ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int END,"
    " set_config('synchronous_commit', CASE current_setting('synchronous_commit')"
    " WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true), "
    + ", ".join(f"current_setting('{name}')" for name in _MUST_BE)
    + "".join(f", set_config('{name}', '{value}', true)" for name, value in _SET_LOCAL.items())
)

_REPLICATION: Final = (
    "SELECT (SELECT count(*) FROM pg_stat_replication), current_setting('synchronous_standby_names') <> ''"
)
"""The statement that tells how many standbys stream, and whether a commit waits for one.

Only a monitor may see which of them is synchronous. Where one is named, a commit waits until it has the change.
"""

_UNLOGGED: Final = (
    "SELECT min(relname::text) FROM pg_class WHERE relnamespace = current_schema()::regnamespace"  # noqa: S608 - names
    f" AND relpersistence = 'u' AND relname IN {('fact', 'head', 'store_head', *(kind.TABLE for kind in ROWS))}"
)
"""The statement that tells which of our tables PostgreSQL empties after a crash, and on a standby."""

_COMPANY: Final = (
    f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{_DEFAULTS['application_name']}'"  # noqa: S608
    " AND datname = current_database() AND pid <> pg_backend_pid()"
)
"""The statement that counts the sessions of others that use our database by our name, which everybody may see."""

_TEMPORARY: Final = {
    "": "the connection to the database failed",
    "40001": "other transactions got in the way every time",
    "40P01": "other transactions got in the way every time",
    "55P03": "another transaction takes too long",
    "57014": "a statement was cancelled",
    "57P01": "the database is shutting down",
    "57P02": "the database is shutting down",
    "57P03": "the database is starting up or shutting down",
    "57P05": "the session was idle for too long",
    "25P03": "the session was idle for too long",
    "53300": "the database has no connection left",
    "08P01": "the connection pooler lost the database, or refused",
}
"""SQLSTATEs of temporary faults."""

_AWAY: Final = frozenset({"", "57P01", "57P02", "57P03", "08P01"})
"""Those of a database that answers nobody now; without one the driver says so, not the database."""

_FAULTS: Final = {
    "53100": "the database's disk is full; nothing was changed",
    "25006": "the database is read-only; nothing was changed",
    "42501": "the database's user may not do that; it must own the tables, or be granted to read and write them",
    "42P01": "a table is missing; stop the server and restore a backup",
    "XX001": "the database is damaged; stop the server and restore a backup",
    "XX002": "the database is damaged; stop the server and restore a backup",
}
"""SQLSTATEs of faults that an operator must repair."""

_AGAIN: Final = (errors.SerializationFailure, errors.DeadlockDetected, errors.UniqueViolation)
"""Errors that only concurrent transactions cause. A row that exists already may be one of another transaction of the
same moment: then the next run sees it. If it is not, the next run fails in the same way. See "Serialization Failure
Handling" in PostgreSQL's documentation."""

_NOT_PREPARED: Final = (errors.InvalidSqlStatementName, errors.DuplicatePreparedStatement)
"""Errors of a session that is not the one in which statements were prepared."""

_HELD: Final = 200
"""How many writes may wait."""

_CONFLICTS: Final = (errors.SerializationFailure, errors.DeadlockDetected)

_MAX_DUPLICATES: Final = 3

_STATEMENT_MODE: Final = "statement pooling mode"
"""Part of pgbouncer's error for a BEGIN, which is not translated and has no SQLSTATE of its own."""


class _Connection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that closes, as if it were lost, if an answer takes more than ``answer_seconds`` (None: no limit).

    The kernel does not end it if a process of the database hangs, or if a proxy has lost its other side.
    """

    answer_seconds: float | None = None
    asked_at: float = 0.0
    """When the last question was sent."""
    is_looked_at: bool = False
    """Whether the database that it leads to was compared with the mark."""
    timeline: int = 0
    """The timeline of that database in the last transaction."""
    changes: Sequence[Change] = ()
    """The changes to audit rows of the present transaction, or of the last one."""
    session: Session = Session(None, is_final=False, is_locked=False)
    """The keys of the rows in the present transaction."""
    has_begun: bool = False
    """Whether the present transaction, or the last one, was begun and found what it must."""
    is_committing: bool = False
    """Whether its commit may have been sent."""
    may_wait: bool = True
    """Whether the caller's thread may wait for an answer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prepared: Prepared = Prepared()
        self.ahead: dict[tuple[str, Values], Rows] = {}
        """The rows that statements of the present transaction returned before the unit asks for them."""
        self.held: list[_Asked] = []
        """Writes that are sent with the next read, or with the commit."""
        self.heads: dict[tuple[str, str], int] = {}
        """The versions of the heads of VMs in the present transaction, or in the last one."""

    def begin_anew(self, answer_seconds: float) -> None:
        """Forget the last transaction."""
        self.has_begun = self.is_committing = False
        self.answer_seconds = answer_seconds
        self.changes, self.heads = (), {}
        self.ahead.clear()
        self.held.clear()

    def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        """Wait as psycopg does; nothing is sent before. Raises `NeedsThread` if the thread may not wait."""
        if not self.may_wait:
            raise NeedsThread
        self.asked_at = time.monotonic()
        return self.wait_further(gen, *args, **kwargs)

    def wait_further(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        """Wait likewise, for what was asked before."""
        return super().wait(self._bounded(gen), *args, **kwargs)

    def _bounded(self, gen: PQGen[T]) -> PQGen[T]:
        try:
            wanted = next(gen)
            while True:
                # psycopg returns here several times a second; releases differ in the readiness that they then report.
                wanted = gen.send((yield wanted))
                if self.answer_seconds is not None and time.monotonic() - self.asked_at > self.answer_seconds:
                    self.close()
                    raise psycopg.OperationalError(f"no answer for {self.answer_seconds:g} seconds")
        except StopIteration as stop:
            result: T = stop.value
            return result


@frozen
class _Asked:
    """A statement of a unit: the operation that it carries out, None of the guard, and where its changes are noted."""

    op: StoreOp[Any] | None
    text: str
    values: Values
    changes: list[Change]

    @property
    def is_audit(self) -> bool:
        """Whether it adds an audit row, whose number it returns."""
        return isinstance(self.op, Insert) and isinstance(self.op.row, AuditRow)

    @property
    def query(self) -> tuple[bytes, Values]:
        returning = " RETURNING id" if self.is_audit else ""
        return _query(self.text + returning), self.values

    def note(self, rows: Rows) -> None:
        """Note a change of audit rows."""
        if isinstance(self.op, Insert) and isinstance(self.op.row, AuditRow):
            self.changes.append((rows[0][0], self.op.row))
        elif isinstance(self.op, PurgeAudit):
            self.changes.append(self.op)


@define(eq=False)
class _Attempt(Generic[T]):
    """See `Attempt`."""

    _connection: _Connection
    _steps: PQGen[T]
    _wanted: Wait = field(init=False, default=Wait.R)
    has_ended: bool = field(init=False, default=False)
    result: T = field(init=False)

    @property
    def reads(self) -> bool:
        """See `Attempt.reads`."""
        return not self.has_ended and self._wanted == Wait.R and not self._connection.closed

    def fileno(self) -> int:
        """See `Attempt.fileno`."""
        return self._connection.fileno()

    def begin(self) -> None:
        """Do what can be done before the first answer."""
        self._advance(self._steps.send, None)

    def go_on(self) -> None:
        """See `Attempt.go_on`."""
        self._advance(self._steps.send, Ready.R)

    def finish(self) -> None:
        """See `Attempt.finish`."""
        self._connection.may_wait = True
        try:
            self._connection.wait_further(self._rest())
        except BaseException as exc:  # of the wait: the connection was lost, or does not answer in time
            if self.has_ended:
                raise
            self._advance(self._steps.throw, exc)

    def close(self) -> None:
        """See `Attempt.close`."""
        self._steps.close()  # `exchange`, which waits, closes the connection then
        self.has_ended = True

    def _rest(self) -> PQGen[None]:
        while not self.has_ended:
            self._advance(self._steps.send, (yield self._wanted))

    def _advance(self, step: Callable[[Any], Wait], value: object) -> None:
        try:
            self._wanted = step(value)
        except StopIteration as stop:
            self.result = stop.value
            self.has_ended = True
        except BaseException:
            self.has_ended = True
            raise


@frozen(eq=False)
class _Beginning:
    """The statements that begin a transaction: `_READ_SETTINGS` is the one at ``settings``."""

    queries: Sequence[tuple[bytes, Values]]
    settings: int


@frozen
class Replication:
    """How many standbys stream from the database, and whether a commit waits for one; for logs and metrics."""

    streaming: int
    is_synchronous: bool = field(kw_only=True)

    @property
    def is_safe(self) -> bool:
        """Whether no fail-over is in sight that loses what was acknowledged."""
        return self.is_synchronous or not self.streaming

    def __str__(self) -> str:
        return (
            f"store: {self.streaming} standbys stream and none is synchronous: a fail-over to one that is behind loses"
            " keys; set synchronous_standby_names, or store.require_synchronous to refuse such a database"
        )


class _Slots:
    """The transactions that run at once, as many as ``crowding`` allows; the others wait, the first come first."""

    def __init__(self, crowding: Crowding) -> None:
        self.crowding = crowding
        self._lock = threading.Lock()
        self._held = 0
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self, timeout: float) -> bool:
        """Wait for a slot; return whether there was one in time."""
        turn = threading.Lock()
        _ = turn.acquire()
        with self._lock:
            self._waiting.append(turn)
            self._hand_out()
        if turn.acquire(timeout=timeout):
            return True
        with self._lock:
            if turn not in self._waiting:  # it was handed out just now
                return True
            self._waiting.remove(turn)
            return False

    def release(self, *, committed: bool, conflicted: bool) -> None:
        """Give a slot back, with what became of its transaction."""
        with self._lock:
            self._held -= 1
            if committed:
                self.crowding.committed()
            elif conflicted:
                self.crowding.conflicted()
            self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and self._held < self.crowding.allowed:
            self._held += 1
            self._waiting.popleft().release()


@define(eq=False)
class _Pool:
    """Idle connections, the latest first, and the slots of those in use."""

    slots: _Slots
    idle: list[_Connection] = field(factory=list[_Connection])

    def drop(self) -> None:
        """Close the idle connections."""
        while self.idle:
            with contextlib.suppress(IndexError):
                self.idle.pop().close()


class PostgresStore(MarkedStore):
    """Rows in the database at ``url`` (``postgresql://user@host/database``). May be used from several threads.

    The URL may have every option of libpq, such as a password file (``?passfile=/path``). At most ``connections`` are
    open at once. A transaction raises `StoreBusy` after it waited ``busy_seconds`` for a connection or for conflicting
    transactions, or if the database has not answered for a few seconds more. It raises `StoreError` while this
    machine's clock and the database's differ by more than ``clock_difference_seconds``.

    With ``migrate`` an empty database, or one of an older schema version, is brought to this release's;
    ``found_version`` is the one that it had (None: it was empty), ``schema_version`` the one that it has now,
    ``rollbacks`` the number of repeated transactions of each unit.

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
        migrate: bool = False,
        alone: bool = False,
        vault: Vault | None = None,
    ) -> None:
        self.name: str
        self._conninfo, self.name = _parse(url)
        self.found_version: int | None = None
        self.clock_skew: int | None = None
        self.rollbacks: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._busy_seconds = busy_seconds
        self._clock_difference_seconds = clock_difference_seconds
        self._answer_seconds = busy_seconds + _SILENCE
        self._require_synchronous = require_synchronous
        self.replication: Replication = Replication(0, is_synchronous=False)
        self.custody: Custody = Custody(self.name)
        if vault is not None:
            self.custody.hold(vault.unwrap)
        self._marks = MarkKeeper(self.name, mark_file, self.custody)
        if self._marks.sealed_in:
            self.custody.require_seal(self._marks.sealed_in)
        self._company = ""
        self._timeline = 0  # of the database that agreed with the mark last
        self._pool = _Pool(_Slots(Crowding(connections)))
        self._closed = False
        self._limits = (
            f"SET LOCAL lock_timeout = {int(1000 * busy_seconds)}",
            f"SET LOCAL statement_timeout = {int(1000 * (busy_seconds + _WORK))}",
        )
        # The lock comes before the reads, so that these see a migration for which the lock waited.
        self._begin = self._beginning("SERIALIZABLE", _LOCK_VERSION, then=READ_VERSION)
        self._begin_committed = self._beginning("READ COMMITTED", _LOCK_VERSION, then=READ_VERSION)
        self._begin_alone = self._beginning("SERIALIZABLE", _LOCK_ALONE, then=READ_VERSION)
        # Otherwise PostgreSQL keeps what every transaction read until a long reading has ended, and has no room for it.
        self._begin_reading = self._beginning("SERIALIZABLE READ ONLY DEFERRABLE", _LOCK_READING, then=READ_VERSION)
        try:
            if migrate:
                self.found_version = self._migrate()
            with self._connection() as connection:
                with self._transaction(connection, self._beginning("SERIALIZABLE")):
                    self.schema_version: int = self._versions(connection).require()
                    if alone and (others := _rows(connection, _COMPANY)[0][0]):
                        self._company = (
                            f"store {self.name}: {others} other sessions of chutes-proto are connected there;"
                            " stop a server that still runs, and copy again: the keys that it makes are missing"
                        )
                self._look(connection)
            if vault is not None:
                seal_if_new(self, vault)
        except BaseException as exc:
            self.close()
            if isinstance(exc, _Again):
                raise exc.fault from exc.__cause__
            raise

    def transact(self, unit: Unit[T]) -> T:
        """Run ``unit`` as one transaction; see `chutes_proto.store._run.Store`."""
        begin = self._begin_committed if unit.READS_COMMITTED else self._begin_alone if unit.ALONE else self._begin
        with self._counting_faults():
            work = partial(self._run, unit=unit)
            return self._with_retries(unit_name(unit), work, begin, self._ahead(unit))

    def attempt(self, unit: Unit[T]) -> Attempt[T]:
        """Begin to run ``unit``, if it says what it reads and a connection is free; see `Attempts`.

        A read that it did not name, and a fault after which it may run again, end that with `NeedsThread`.
        """
        if unit.ALONE or unit.READS_COMMITTED or unit.READS_FURTHER or self._marks.copy_waits or self._marks.is_due():
            raise NeedsThread
        if not (ahead := self._ahead(unit)):
            raise NeedsThread
        with contextlib.ExitStack() as held:
            connection = held.enter_context(self._connection(at_once=True))
            if not connection.is_looked_at:
                raise NeedsThread
            attempt = _Attempt(connection, self._attempted(connection, held.pop_all(), unit, ahead))
        attempt.begin()
        return attempt

    def _attempted(
        self, connection: _Connection, held: contextlib.ExitStack, unit: Unit[T], ahead: Sequence[tuple[str, Values]]
    ) -> PQGen[T]:
        """Run ``unit`` with a connection, then let go of what ``held`` has: the connection and its slot."""
        until = time.monotonic() + self._busy_seconds
        try:
            with self._counting_faults(), held:
                connection.may_wait = False
                try:
                    result = yield from self._transacted(connection, unit, ahead)
                finally:
                    connection.may_wait = True
                self._committed(connection.changes, connection.heads, sealed_in=connection.session.sealed_in)
                return result
        except _Again as exc:
            if time.monotonic() > until:
                raise exc.fault from exc.__cause__
            self._count_rollback(unit_name(unit))
            raise (Conflict if isinstance(exc.__cause__, _CONFLICTS) else NeedsThread) from exc

    def _transacted(self, connection: _Connection, unit: Unit[T], ahead: Sequence[tuple[str, Values]]) -> PQGen[T]:
        """Make one transaction of ``unit``, as `_transaction` does with a block; waits where its driver does."""
        connection.begin_anew(self._answer_seconds)
        try:
            _ = yield from self._begun(connection, self._begin, ahead)
            result = self._run(connection, unit)
            yield from self._commit(connection)
        except psycopg.Error as exc:
            yield from self._rolled_back(connection)
            raise self._meaning(connection, exc, has_ahead=True) from exc
        except BaseException:
            yield from self._rolled_back(connection)
            raise
        return result

    def _ahead(self, unit: Unit[Any]) -> Sequence[tuple[str, Values]]:
        """The statements of what ``unit`` says that it reads."""
        sent = unit.ahead()
        return statements_ahead(sent, with_heads=self.custody.is_open) if sent else ()

    @contextlib.contextmanager
    def _counting_faults(self) -> Generator[None]:
        try:
            yield
        except RowNotAuthentic as exc:
            with self._counting:
                self.custody.note(exc)
            raise

    def _count_rollback(self, of: str) -> None:
        with self._counting:
            self.rollbacks[of] += 1

    def check(self, tell: Callable[[int, int], object] = untold) -> dict[str, int]:
        """Read all rows; return their number for each table. Raises `StoreError` for damage and for another schema.

        ``tell`` takes how many rows are read, and of how many, after each table.
        """
        return self._with_retries("check", lambda connection: self._check(connection, tell), self._begin_reading)

    @contextlib.contextmanager
    def snapshot(self) -> Generator[Store]:
        """See `DurableStore.snapshot`."""
        try:
            with self._looked_at() as connection, self._transaction(connection, self._begin_reading):
                self._lift_limits(connection)
                yield Snapshot(lambda unit: self._run(connection, unit))
        except _Again as exc:
            raise exc.fault from exc.__cause__

    def check_writing(self) -> None:
        """Check that the database's user has all rights that a server needs. Raises `StoreError`."""
        self._with_retries("check", self._check_writing)

    def close(self) -> None:
        """Close idle connections; then every call raises `StoreError`. Running transactions end as usual."""
        self._closed = True
        self._pool.drop()
        self._marks.close()

    @property
    def callers(self) -> int:
        """The number of transactions that may run at once now; conflicts lower it."""
        return self._pool.slots.crowding.allowed

    @property
    def replication_warning(self) -> str:
        """Why a fail-over would lose what was acknowledged; empty where none is in sight."""
        return "" if self.replication.is_safe else str(self.replication)

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
        work: Callable[[_Connection], T],
        begin: _Beginning | None = None,
        ahead: Sequence[tuple[str, Values]] = (),
    ) -> T:
        """Do ``work`` as one transaction; repeat it after conflicts, until ``busy_seconds`` are over."""
        until = time.monotonic() + self._busy_seconds
        pause = 0.001
        duplicates = 0
        while True:
            try:
                with self._looked_at() as connection:
                    with self._transaction(connection, begin or self._begin, ahead):
                        result = work(connection)
                    self._committed(connection.changes, connection.heads, sealed_in=connection.session.sealed_in)
                    return result
            except _Again as exc:
                duplicates += isinstance(exc.__cause__, errors.UniqueViolation)
                if exc.is_ahead:
                    ahead = ()
                if time.monotonic() + pause > until or duplicates > _MAX_DUPLICATES:
                    raise exc.fault from exc.__cause__
            self._count_rollback(of)
            time.sleep(random.uniform(0, pause))  # noqa: S311 - not a secret
            pause = min(2 * pause, 0.1)

    def _check(self, connection: _Connection, tell: Callable[[int, int], object]) -> dict[str, int]:
        _ = self._versions(connection).require()
        self._versions(connection).require_indexes()
        self._lift_limits(connection)
        tables = [kind.TABLE for kind in ROWS]
        total = sum(_rows(connection, f"SELECT count(*) FROM {table}")[0][0] for table in tables)  # noqa: S608
        found: dict[str, int] = {}
        for table in tables:
            _ = tell(sum(found.values()), total)
            # As text, so that every value is read completely.
            found[table] = _rows(connection, f"SELECT count(row::text) FROM {table} AS row")[0][0]  # noqa: S608
        return found

    def _check_writing(self, connection: _Connection) -> None:
        tables = ("fact", "key_server", "what_if", "head", "store_head", *(kind.TABLE for kind in ROWS))
        rights = ("SELECT", "INSERT", "UPDATE", "DELETE")
        needed = [(table, right) for table in tables for right in rights]
        texts = (f"has_table_privilege('{table}', '{right}')" for table, right in needed)
        found = _rows(connection, f"SELECT {', '.join(texts)}")[0]
        lacking = [f"{right} on {table}" for (table, right), has in zip(needed, found, strict=True) if not has]
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise self._fault(f"{_FAULTS['42501']} (it lacks {lacking[0]}{more})")

    def _run(self, connection: _Connection, unit: Unit[T]) -> T:
        changes: list[Change] = []
        connection.changes = changes
        ahead = connection.ahead

        def run(op: StoreOp[Any] | None, text: str, values: Values) -> Rows:
            if (text, values) in ahead:
                return ahead[text, values] if is_read(text) else ahead.pop((text, values))
            asked = _Asked(op, text, values, changes)
            if op is not None and op.MAY_TAKE_LONG:
                _ = self._send(connection)
                self._lift_limits(connection)
                return self._send(connection, asked)
            if returns_rows(text):
                return self._send(connection, asked)
            for known in [known for known in ahead if is_read(known[0])]:
                del ahead[known]  # it may be different now
            connection.held.append(asked)
            return [] if len(connection.held) < _HELD else self._send(connection)

        guard = Guard(connection.session, run)
        try:
            result = run_script(unit.script(), guard.perform)
            guard.finish()
        except LostFactError as exc:
            raise self._fault(str(exc)) from None
        if not all(is_read(text) for text, _ in ahead):
            raise RuntimeError(f"{unit_name(unit)} has not done what it said that it does")
        connection.heads = guard.of_vms.versions
        return result

    def _send(self, connection: _Connection, *more: _Asked) -> Rows:
        """Carry out what is held, and more; return the rows of the last."""
        asked = [*connection.held, *more]
        connection.held.clear()
        found = connection.wait(self._exchanged(connection, asked)) if asked else []
        return found[-1] if found else []

    def _exchanged(
        self, connection: _Connection, asked: Sequence[_Asked], *last: tuple[bytes, Values]
    ) -> PQGen[list[Rows]]:
        """Carry out statements, and note their changes."""
        connection.asked_at = time.monotonic()
        try:
            found = yield from exchange(connection, connection.prepared, [*(each.query for each in asked), *last])
        except StatementError as exc:
            if isinstance(exc.error, (psycopg.DataError, UnicodeEncodeError)):
                whose = f" of {type(asked[exc.at].op).__name__}" if exc.at < len(asked) else ""
                raise self._fault(f"a value{whose} cannot be stored: {type(exc.error).__name__}") from exc.error
            raise exc.error from None
        for each, rows in zip(asked, found, strict=False):
            if each.is_audit and not rows:
                raise self._fault(
                    "it keeps no audit row, so a trigger leaves them out; remove it (`\\d audit` of psql lists them)"
                )
            each.note(rows)
        return found

    def _versions(self, connection: _Connection) -> Versions:
        return Versions(self.name, "postgresql", lambda text: _rows(connection, text))

    # --- migration ---

    def _migrate(self) -> int | None:
        """Bring the database to our schema; return the version that it had. Raises `StoreError`."""
        # A migration must see the changes of another one for which it waited.
        begin = self._beginning("READ COMMITTED")
        with contextlib.closing(self._connect()) as lock, self._transaction(lock, begin):
            self._lift_limits(lock)
            _ = _rows(lock, f"SET LOCAL idle_in_transaction_session_timeout = 0; {_LOCK}")
            with contextlib.closing(self._connect()) as connection:
                found = self._change_schema(connection, begin)
                connection.answer_seconds = None
                for name, create in indexes():
                    self._build_index(connection, name, create)
        return found

    def _change_schema(self, connection: _Connection, begin: _Beginning) -> int | None:
        """Make the transaction of a migration, until it gets its locks; return the version before."""
        until = time.monotonic() + _MIGRATION_SECONDS
        pause = 0.05
        while True:
            try:
                with self._transaction(connection, begin):
                    versions = self._versions(connection)
                    self._lift_limits(connection)
                    if (found := versions.found()) is not None and found >= compatible_since():
                        versions = evolve(versions, execute=self._within_a_second(connection))
                    return versions.migrate()
            except (StoreBusy, _Again) as exc:
                if not isinstance(exc.__cause__, (errors.LockNotAvailable, errors.QueryCanceled, *_AGAIN)):
                    raise
                if time.monotonic() + pause > until:
                    raise self._held_up(connection, begin, exc.__cause__) from exc
            time.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - not a secret; others work meanwhile
            pause = min(2 * pause, 1.0)

    def _within_a_second(self, connection: _Connection) -> Callable[[str], list[tuple[Any, ...]]]:
        """Return what runs the statements of one transaction, all of them within `_EXPANSION_SECONDS`."""
        end = time.monotonic() + _EXPANSION_SECONDS

        def execute(text: str) -> list[tuple[Any, ...]]:
            left = max(1, round(1000 * (end - time.monotonic())))
            return _rows(connection, f"SET LOCAL lock_timeout = {left}; SET LOCAL statement_timeout = {left}; {text}")

        return execute

    def _held_up(self, connection: _Connection, begin: _Beginning, cause: BaseException | None) -> StoreError:
        """Return the error of a migration that does not get its locks, or would keep them for too long.

        It has the sessions that have them.
        """
        with self._transaction(connection, begin):
            holders = _rows(connection, _HOLDERS)
        sessions = "; ".join(
            f"session {pid} of {user} ({program or 'no name'}, {state or 'its state is hidden from this role'},"
            f" in a transaction for {seconds or 0:.0f} s) has {tables}"
            for pid, user, program, state, seconds, tables in holders
        )
        if not holders and isinstance(cause, errors.QueryCanceled):
            return StoreBusy(
                f"store {self.name}: the migration was given up: its own statements take longer than a second, for"
                " which servers would wait; run the command again when the database has less to do; nothing was changed"
            )
        advice = "wait for it, or end it with SELECT pg_terminate_backend(...), and run the command again"
        found = f"{sessions}; {advice}" if holders else "no session has them now; run the command again"
        return StoreBusy(f"store {self.name}: the migration does not get the locks of its tables: {found}")

    def _build_index(self, connection: _Connection, name: str, create: str) -> None:
        """Build an index while others write; again, if a build was interrupted."""
        try:
            state = _rows(connection, INDEX_STATE.format(name=name))
            if state == [(False,)]:
                _ = _rows(connection, f"DROP INDEX CONCURRENTLY {name}")
            if state != [(True,)]:
                _ = _rows(connection, create)
        except psycopg.Error as exc:
            raise self._translated(exc) from exc

    # --- what was seen of the database ---

    @contextlib.contextmanager
    def _looked_at(self) -> Generator[_Connection]:
        """Reserve a connection to a database that is not behind the mark."""
        with self._connection() as connection:
            if not connection.is_looked_at or self._marks.is_due():
                self._look(connection)
            yield connection

    def _look(self, connection: _Connection) -> None:
        """Compare the database with the mark. Raises `StoreError` for one that is behind or not replicated as it must.

        Not in a serializable transaction: to read the newest audit rows in one conflicts with everyone who adds some.
        """
        look = f"{_REPLICATION}, ({_UNLOGGED})"
        with self._transaction(connection, self._beginning("READ COMMITTED", then=look)) as rows:
            ((streaming, has_synchronous, unlogged),) = rows[0]
            if unlogged is not None:
                raise self._fault(
                    f"the table {unlogged} is UNLOGGED, so a crash or a fail-over would empty it, and keys would be"
                    f" lost; say ALTER TABLE {unlogged} SET LOGGED"
                )
            self.replication = Replication(streaming, is_synchronous=has_synchronous)
            if self._require_synchronous and not has_synchronous:
                raise self._fault(
                    "store.require_synchronous is set, and synchronous_standby_names is empty there: a fail-over would"
                    " lose keys; name a synchronous standby"
                )
            self._marks.compare(lambda text: _rows(connection, text), connection.timeline)
        # Only now: one that is refused must not be what the other connections are held to.
        self._timeline = connection.timeline
        connection.is_looked_at = True

    # --- connections and transactions ---

    @contextlib.contextmanager
    def _connection(self, *, at_once: bool = False) -> Generator[_Connection]:
        """Reserve a connection; ``at_once`` it raises `NeedsThread` if none is free."""
        if self._closed:
            raise self._fault("it was closed")
        if not self._pool.slots.acquire(timeout=0 if at_once else self._busy_seconds):
            raise NeedsThread if at_once else StoreBusy(f"store {self.name}: other transactions take too long")
        committed = conflicted = False
        try:
            try:
                connection = self._pool.idle.pop()
            except IndexError:
                if at_once:
                    raise NeedsThread from None
                connection = self._connect()
            try:
                yield connection
                committed = True
            except _Again as exc:
                conflicted = isinstance(exc.__cause__, _CONFLICTS)
                raise
            finally:
                if connection.closed:
                    self._pool.drop()  # the same fault has most likely ended them all
                elif self._closed or connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
                    connection.close()
                else:
                    self._pool.idle.append(connection)
        finally:
            self._pool.slots.release(committed=committed, conflicted=conflicted)

    def _connect(self) -> _Connection:
        try:
            # Statements have PostgreSQL's own marks: psycopg takes long to find others in one of a thousand rows.
            connection = _Connection.connect(self._conninfo, autocommit=True, cursor_factory=psycopg.RawCursor)
        except psycopg.Error as exc:
            text = " ".join(str(exc).split())
            if "no password supplied" in text:
                text += "; give a password file of mode 0600, with a line for this host, port and database"
            raise StoreAway(f"store {self.name}: no connection to the database: {text}") from None
        connection.answer_seconds = self._answer_seconds
        if connection.info.server_version < _OLDEST_SERVER:
            connection.close()
            raise self._fault(f"PostgreSQL {_OLDEST_SERVER // 10_000} or newer is needed")
        return connection

    def _beginning(self, level: str, *statements: str, then: str = "") -> _Beginning:
        before = (f"BEGIN ISOLATION LEVEL {level}", *self._limits, *statements)
        texts = (*before, _READ_SETTINGS, *((then,) if then else ()))
        return _Beginning([(text.encode(), ()) for text in texts], len(before))

    @contextlib.contextmanager
    def _transaction(
        self, connection: _Connection, begin: _Beginning, ahead: Sequence[tuple[str, Values]] = ()
    ) -> Generator[list[Rows]]:
        """Begin, and commit the work of the block, or roll back if it raises; yields the rows that ``begin`` asks for.

        ``ahead`` are statements that the block will ask for.
        """
        connection.begin_anew(self._answer_seconds)
        try:
            yield connection.wait(self._begun(connection, begin, ahead))
            connection.wait(self._commit(connection))
        except psycopg.Error as exc:
            self._roll_back(connection)
            raise self._meaning(connection, exc, has_ahead=bool(ahead)) from exc
        except BaseException:
            self._roll_back(connection)
            raise

    def _begun(
        self, connection: _Connection, begin: _Beginning, ahead: Sequence[tuple[str, Values]]
    ) -> PQGen[list[Rows]]:
        """Begin; see `_transaction`."""
        asked_at, began_at, least_head = time.time(), time.monotonic(), self._marks.head
        asked = [(_query(text), values) for text, values in ahead]
        found = yield from self._exchanged(connection, (), *begin.queries, *asked)
        connection.has_begun = True
        ((first,), *more) = found[begin.settings :]
        connection.ahead.update(zip(ahead, more[len(more) - len(ahead) :], strict=True))
        backend, clock, timeline, _, *settings = first[: 4 + len(_MUST_BE)]
        if not timeline:
            raise self._standby()
        self._check_settings(connection, backend, settings)
        self._check_clock(asked_at, float(clock), time.time())
        if begin in (self._begin, self._begin_committed, self._begin_alone, self._begin_reading):
            _ = self._versions(connection).check(more[0])
            session = self.custody.session(more[0][0][2], lambda text: _rows(connection, text))
            connection.session = evolve(session, least_head=least_head, began_at=began_at)
            if timeline != self._timeline:  # another server than the one that was compared last
                connection.is_looked_at = False
                raise _Again(self._fault("the database's timeline has changed"))
        connection.timeline = timeline
        return more

    def _meaning(self, connection: _Connection, exc: psycopg.Error, *, has_ahead: bool) -> StoreError | _Again:
        """Return what a fault of the present transaction means, which was rolled back."""
        begun = connection.has_begun
        if connection.closed and connection.is_committing:
            return FateUnknown(f"store {self.name}: the connection was lost at the commit; {UNKNOWN}")
        if isinstance(exc, _NOT_PREPARED):  # a pooler led to another session, and did not say so
            connection.prepared.is_own = False
        # A standby has no SERIALIZABLE; and a statement that was prepared before a column changed its type fails so.
        is_unknown = isinstance(exc, errors.FeatureNotSupported)
        is_standby = not begun and is_unknown
        if is_unknown and connection.prepared.names:
            connection.close()
        fault = self._standby() if is_standby else self._translated(exc)
        is_again = connection.closed or isinstance(exc, (*_AGAIN, *_NOT_PREPARED))
        # A fault of what is read ahead is met where the unit asks for it, after the version was looked at.
        is_ahead = has_ahead and not (begun or is_again or is_standby or exc.sqlstate in _TEMPORARY)
        return _Again(fault, is_ahead=is_ahead) if is_again or is_ahead else fault

    def _check_clock(self, before: float, clock: float, after: float) -> None:
        """Raise `StoreError` if ``clock``, the database's time at some moment between the others, is too far off."""
        self.clock_skew = round((before + after) / 2 - clock)
        difference = max(clock - after, before - clock)
        if difference > self._clock_difference_seconds:
            times = f"{rfc3339(int(clock))}, and this machine's says {rfc3339(int(after))}"
            raise self._fault(
                f"the database's clock says {times}; they may differ by {self._clock_difference_seconds:g} seconds;"
                " set the wrong one right"
            )

    def _check_settings(self, connection: _Connection, backend: int, found: Sequence[str]) -> None:
        """Raise `StoreError` for a database that may lose keys; ``found`` are the values of `_MUST_BE`."""
        for (setting, wanted), value in zip(_MUST_BE.items(), found, strict=True):
            if value != wanted:
                raise self._fault(f"{setting} is {value!r} there and must be {wanted!r}, or keys may be lost")
        # If a pooler answered when the connection was made, the next transaction may meet another session, without the
        # prepared statements of this one. Not every pooler carries them over.
        if backend != connection.info.backend_pid:
            connection.prepare_threshold = None
            connection.prepared.is_own = False
        elif connection.prepared.is_own is None:
            connection.prepared.is_own = True

    def _commit(self, connection: _Connection) -> PQGen[None]:
        """Send what is held, and commit. Raises `FateUnknown`, and closes the connection, if the server sends a notice.

        After a statement that fails the database carries out none, and so does not commit.
        """
        connection.is_committing = True
        notices: list[str] = []

        def note(notice: errors.Diagnostic) -> None:
            notices.append(str(notice.message_primary))

        held = [*connection.held]
        connection.held.clear()
        connection.add_notice_handler(note)
        try:
            _ = yield from self._exchanged(connection, held, (b"COMMIT", ()))
        finally:
            connection.remove_notice_handler(note)
        # Any notice counts: their texts are translated, and a commit that succeeds has none.
        if notices:
            connection.close()
            what = f"store {self.name}: the database warned at the commit ({notices[0]})"
            raise FateUnknown(f"{what}; {UNKNOWN}, and a fail-over may lose it")

    def _lift_limits(self, connection: _Connection) -> None:
        """Remove the time limits of this transaction, and of its statements."""
        _ = _rows(connection, "SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0")
        connection.answer_seconds = None

    def _roll_back(self, connection: _Connection) -> None:
        with contextlib.suppress(psycopg.Error):  # of the wait itself: the connection was lost
            connection.wait(self._rolled_back(connection))

    def _rolled_back(self, connection: _Connection) -> PQGen[None]:
        connection.asked_at = time.monotonic()
        try:  # not prepared: the session may be another one, which is why it is rolled back
            _ = yield from exchange(connection, Prepared(), [(b"ROLLBACK", ())])
        except (psycopg.Error, StatementError):
            connection.close()

    def _translated(self, exc: psycopg.Error) -> StoreError:
        """Return our error for PostgreSQL's; with only the first line of its text, because others quote rows."""
        state = exc.sqlstate or ""
        lines = str(exc).splitlines()
        text = exc.diag.message_primary or (lines[0] if lines else type(exc).__name__)
        if _STATEMENT_MODE in text:
            return self._fault(f"{text}; set pool_mode of the connection pooler to transaction or session")
        if fault := _TEMPORARY.get(state):
            kind = StoreAway if state in _AWAY else StoreBusy
            return kind(f"store {self.name}: {fault} ({text})")
        return self._fault(f"{_FAULTS.get(state, 'PostgreSQL refused')} ({text})")

    def _standby(self) -> StoreAway:
        """Return the error where a pooler leads to a standby, as it may for seconds while the primary changes."""
        return StoreAway(f"store {self.name}: it leads to a standby, which only reads")

    def _fault(self, what: str) -> StoreError:
        return StoreError(f"store {self.name}: {what}")


class _Again(Exception):
    """A transaction that left no trace and may be run again; ``fault`` is raised when no time is left.

    ``is_ahead``: with nothing read ahead, where the fault may lie.
    """

    def __init__(self, fault: StoreError, *, is_ahead: bool = False) -> None:
        super().__init__(fault)
        self.fault = fault
        self.is_ahead = is_ahead


@functools.lru_cache(256)
def _query(text: str) -> bytes:
    return for_driver(text, "postgresql").encode()


def _rows(connection: _Connection, text: str) -> list[tuple[Any, ...]]:
    """Run one or several constant statements; return their rows in order."""
    cursor = connection.execute(text.encode(), prepare=False)
    rows: list[tuple[Any, ...]] = []
    while True:
        rows += () if cursor.rownumber is None else cursor.fetchall()
        if not cursor.nextset():
            return rows


def name_of(url: str) -> str:
    """Return the name of the database at ``url``, without a password. Raises `ConfigurationError`."""
    return _parse(url)[1]


def has_secret(url: str) -> bool:
    """Return whether ``url`` has a secret to log in with, in any spelling. Raises `ConfigurationError`."""
    _ = _parse(url)
    given = (option for option in psycopg.pq.Conninfo.parse(url.encode()) if option.val)
    # libpq marks with * what is a password, but not the SCRAM keys, which are as good as one.
    return any(option.dispchar == b"*" or option.keyword.startswith(b"scram_") for option in given)


def _parse(url: str) -> tuple[str, str]:
    """Return libpq's form of ``url``, and its name: user, host, port and database, without a password."""
    try:
        if not _URL.fullmatch(url):
            raise ValueError(url)
        given: dict[str, Any] = conninfo.conninfo_to_dict(url)
        if not re.fullmatch(r"[0-9,]*", str(given.get("port", ""))):
            raise ValueError(url)
        full = conninfo.make_conninfo("", **{**_DEFAULTS, **given, "client_encoding": "UTF8"})
    except (psycopg.Error, ValueError):  # their text may quote the password
        raise ConfigurationError(
            'not a PostgreSQL URL; say "postgresql://user@host/database", and percent-encode a password:'
            " %40 for @, %2F for /, %3F for ?, %25 for %"
        ) from None
    named = {name: str(given[name]) for name in _FILES & given.keys()}
    if relative := sorted(name for name, path in named.items() if path not in ("", "system") and path[0] != "/"):
        raise ConfigurationError(f"{', '.join(relative)}: say the whole path, from / on")
    user = f"{given['user']}@" if "user" in given else ""
    port = f":{given['port']}" if "port" in given else ""
    return full, f"postgresql://{user}{given.get('host', '')}{port}/{given.get('dbname', '')}"
