"""Transactions in PostgreSQL: their settings, their beginning and end, and the statements between.

Rules kept here:

* what begins a transaction makes its settings. It raises where the database has others that may lose keys, another
  time, another schema version, or another timeline than the one that was compared with the mark;
* the statements that are held, and the commit, are one round trip;
* whatever is raised before the commit was sent is rolled back, and only that may be run again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Final

import psycopg
from attrs import evolve, frozen
from psycopg import errors

from chutes_proto.errors import FateUnknown, StoreError
from chutes_proto.io.stores.postgres.connection import Asked, Connection, query_of, rows_of
from chutes_proto.io.stores.postgres.exchange import Prepared, StatementError, exchange
from chutes_proto.io.stores.postgres.faults import (
    AGAIN,
    NOT_PREPARED,
    TEMPORARY,
    Again,
    fault_of,
    not_connected,
    standby,
    translated,
)
from chutes_proto.io.stores.postgres.locks import STRANGERS, described
from chutes_proto.quote._terms import rfc3339
from chutes_proto.store._sql import READ_VERSION
from chutes_proto.store._turns import UNKNOWN
from chutes_proto.store._versions import Versions

if TYPE_CHECKING:
    from psycopg.abc import PQGen

    from chutes_proto.io.stores.marks import MarkKeeper
    from chutes_proto.io.stores.postgres.exchange import Rows
    from chutes_proto.store._custody import Custody
    from chutes_proto.store._sql import Values

_OLDEST_SERVER: Final = 12_00_00

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

_LOCK_VERSION: Final = "LOCK TABLE fact IN ROW SHARE MODE"
"""The lock that each unit holds: a unit that runs alone waits for it, and no backup does."""

_LOCK_ALONE: Final = "LOCK TABLE fact IN EXCLUSIVE MODE"
"""That of a unit which runs alone, taken at once: two that first had the weaker one would wait for each other."""

_LOCK_READING: Final = "LOCK TABLE fact IN ACCESS SHARE MODE"
"""That of a long transaction which grants nothing: no unit waits for it."""

_TAKE_SPACE: Final = (
    # A temporary file, as large as the one that SQLite's store tries, beside the tables. It leaves nothing behind, and
    # no WAL: where that finds no space, PostgreSQL ends.
    "SELECT set_config('work_mem', '64kB', true), set_config('temp_tablespaces', coalesce((SELECT quote_ident(spcname)"
    " FROM pg_class JOIN pg_tablespace AS place ON place.oid = reltablespace WHERE pg_class.oid = 'audit'::regclass"
    " AND has_tablespace_privilege(place.oid, 'CREATE')), ''), true);"
    " SELECT count(*) FROM generate_series(1, 20000)"
)
"""The statements that fail where the disk of our tables is full, on which reading, and a row more in a page, works."""

_READ_SETTINGS: Final = (
    # `on` waits for the disks of this server and of its synchronous standbys; `remote_apply`, which waits more, stays.
    # A weaker setting is raised to `on`, because keys could be lost.
    "SELECT pg_backend_pid(), extract(epoch FROM now()),"  # noqa: S608 - names of ours
    " CASE WHEN pg_is_in_recovery() THEN 0 ELSE"
    " ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int END,"
    " set_config('synchronous_commit', CASE current_setting('synchronous_commit')"
    " WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true), current_setting('search_path'), "
    + ", ".join(f"current_setting('{name}')" for name in _MUST_BE)
    + "".join(f", set_config('{name}', '{value}', true)" for name, value in _SET_LOCAL.items())
)


@frozen(eq=False)
class Beginning:
    """The statements that begin a transaction: `_READ_SETTINGS` is the one at ``settings``."""

    queries: Sequence[tuple[bytes, Values]]
    settings: int
    reads_version: bool
    """Whether the statement after that one reads the schema version, and the store is one that units use."""


class Database:
    """The database that ``conninfo`` leads to, called ``name``: connections to it, and transactions on them.

    A lock is awaited for ``busy_seconds``, and the clocks may differ by ``clock_difference_seconds``. ``custody`` has
    the keys of the store, ``marks`` its mark.
    """

    def __init__(
        self,
        conninfo: str,
        name: str,
        custody: Custody,
        marks: MarkKeeper,
        *,
        busy_seconds: float,
        clock_difference_seconds: float,
    ) -> None:
        self.name: str = name
        self.clock_skew: int | None = None
        """This machine's clock minus the database's, in the last transaction."""
        self.timeline: int = 0
        """The timeline of the database that agreed with the mark last."""
        self.is_full: bool = False
        """Whether a write found the disk full, and `require_space` has found no space since."""
        self.hint: str = ""
        """Added to the text of a fault where transactions wait for each other, or a commit is not answered."""
        self._conninfo = conninfo
        self._custody, self._marks = custody, marks
        self._clock_difference_seconds = clock_difference_seconds
        self._clocks_told: tuple[float, str] | None = None
        self._answer_seconds = busy_seconds + _SILENCE
        self._limits = (
            f"SET LOCAL lock_timeout = {int(1000 * busy_seconds)}",
            f"SET LOCAL statement_timeout = {int(1000 * (busy_seconds + _WORK))}",
        )
        # The lock comes before the reads, so that these see what a unit has written for which the lock waited.
        self.serializable: Beginning = self.beginning("SERIALIZABLE", _LOCK_VERSION, then=READ_VERSION)
        self.read_committed: Beginning = self.beginning("READ COMMITTED", _LOCK_VERSION, then=READ_VERSION)
        self.alone: Beginning = self.beginning("SERIALIZABLE", _LOCK_ALONE, then=READ_VERSION)
        # Otherwise PostgreSQL keeps what every transaction read until a long reading has ended, and has no room for it.
        self.reading: Beginning = self.beginning("SERIALIZABLE READ ONLY DEFERRABLE", _LOCK_READING, then=READ_VERSION)

    def connect(self) -> Connection:
        """Make a connection. Raises `StoreError`."""
        try:
            # Statements have PostgreSQL's own marks: psycopg takes long to find others in one of a thousand rows.
            connection = Connection.connect(self._conninfo, autocommit=True, cursor_factory=psycopg.RawCursor)
        except psycopg.Error as exc:
            raise not_connected(self.name, exc) from None
        connection.answer_seconds = self._answer_seconds
        if connection.info.server_version < _OLDEST_SERVER:
            connection.close()
            raise fault_of(self.name, f"PostgreSQL {_OLDEST_SERVER // 10_000} or newer is needed")
        return connection

    def versions(self, connection: Connection) -> Versions:
        """The schema version of the database, within a transaction."""
        return Versions(self.name, "postgresql", lambda text: rows_of(connection, text))

    def beginning(self, level: str, *statements: str, then: str = "") -> Beginning:
        """Begin at an isolation level, with statements before the settings, and one after them that returns rows."""
        before = (f"BEGIN ISOLATION LEVEL {level}", *self._limits, *statements)
        texts = (*before, _READ_SETTINGS, *((then,) if then else ()))
        return Beginning([(text.encode(), ()) for text in texts], len(before), then == READ_VERSION)

    @contextlib.contextmanager
    def transaction(
        self, connection: Connection, begin: Beginning, ahead: Sequence[tuple[str, Values]] = ()
    ) -> Generator[list[Rows]]:
        """Begin, and commit the work of the block, or roll back if it raises; yields the rows that ``begin`` asks for.

        ``ahead`` are statements that the block will ask for.
        """
        connection.begin_anew(self._answer_seconds)
        try:
            yield self._begun(connection, begin, ahead)
            self._commit(connection)
        except psycopg.Error as exc:
            who = self._roll_back(connection, exc)
            raise self._meaning(connection, exc, who, has_ahead=bool(ahead)) from exc
        except BaseException:
            _ = self._roll_back(connection)
            raise

    def _begun(self, connection: Connection, begin: Beginning, ahead: Sequence[tuple[str, Values]]) -> list[Rows]:
        """Begin; see `transaction`."""
        asked_at, began_at, least_head = time.time(), time.monotonic(), self._marks.head
        asked = [(query_of(text), values) for text, values in ahead]
        found = self._exchanged(connection, (), *begin.queries, *asked)
        connection.has_begun = True
        ((first,), *more) = found[begin.settings :]
        connection.ahead.update(zip(ahead, more[len(more) - len(ahead) :], strict=True))
        backend, clock, timeline, _, path, *settings = first[: 5 + len(_MUST_BE)]
        if not timeline:
            raise standby(self.name)
        self._check_schema(connection, path)
        self._check_settings(connection, backend, settings)
        self._check_clock(asked_at, float(clock), time.time())
        if begin.reads_version:
            self.versions(connection).check(more[0])
            session = self._custody.session(more[0][0][1], lambda text: rows_of(connection, text))
            connection.session = evolve(session, least_head=least_head, began_at=began_at)
            if timeline != self.timeline:  # another server than the one that was compared last
                connection.is_looked_at = False
                raise Again(fault_of(self.name, "the database's timeline has changed"))
        connection.timeline = timeline
        return more

    def _check_settings(self, connection: Connection, backend: int, found: Sequence[str]) -> None:
        """Raise `StoreError` for a database that may lose keys; ``found`` are the values of `_MUST_BE`."""
        for (setting, wanted), value in zip(_MUST_BE.items(), found, strict=True):
            if value != wanted:
                raise fault_of(self.name, f"{setting} is {value!r} there and must be {wanted!r}, or keys may be lost")
        # If a pooler answered when the connection was made, the next transaction may meet another session, without the
        # prepared statements of this one. Not every pooler carries them over.
        if backend != connection.info.backend_pid:
            connection.prepare_threshold = None
            connection.prepared.is_own = False
        elif connection.prepared.is_own is None:
            connection.prepared.is_own = True

    def _check_schema(self, connection: Connection, found: str) -> None:
        """Raise `StoreError` for a session with another ``search_path`` than the connection was told that it has.

        A pooler may accept one in the URL, and confuse the sessions of two, because PostgreSQL before 18 does not
        report it: pgbouncer 1.26 does.
        """
        told = connection.info.parameter_status("search_path")
        if told is not None and found != told:
            raise fault_of(
                self.name,
                f"the connection pooler gave out a session whose search_path is {found!r}, not {told!r}; take"
                " search_path out of the URL, and give the store a database of its own or set the schema for its role",
            )

    def _check_clock(self, before: float, clock: float, after: float) -> None:
        """Raise `StoreError` if ``clock``, the database's time at some moment between the others, is too far off."""
        self.clock_skew = round((before + after) / 2 - clock)
        most = self._clock_difference_seconds
        if max(clock - after, before - clock) <= most:
            self._clocks_told = None
            return
        # A server logs each new text as a new fault: so the times stay until they differ by another number of seconds.
        told = self._clocks_told
        if told is None or abs(told[0] - (clock - after)) > most:
            times = f"{rfc3339(int(clock))}, and this machine's says {rfc3339(int(after))}"
            text = f"the database's clock says {times}; they may differ by {most:g} seconds; set the wrong one right"
            told = self._clocks_told = (clock - after, text)
        raise fault_of(self.name, told[1])

    def send(self, connection: Connection, *more: Asked) -> Rows:
        """Carry out what is held, and more; return the rows of the last."""
        asked = [*connection.held, *more]
        connection.held.clear()
        found = self._exchanged(connection, asked) if asked else []
        return found[-1] if found else []

    def _exchanged(self, connection: Connection, asked: Sequence[Asked], *last: tuple[bytes, Values]) -> list[Rows]:
        """Carry out statements, and note their changes."""
        # One generator: an interrupted wait cancels the statement, and psycopg must see its own error of that.
        return connection.wait(self._exchanging(connection, asked, last))

    def _exchanging(
        self, connection: Connection, asked: Sequence[Asked], last: Sequence[tuple[bytes, Values]]
    ) -> PQGen[list[Rows]]:
        try:
            found = yield from exchange(connection, connection.prepared, [*(each.query for each in asked), *last])
        except StatementError as exc:
            if isinstance(exc.error, errors.DivisionByZero) and exc.at < len(asked) and asked[exc.at].is_audit:
                raise fault_of(
                    self.name,
                    "it keeps no audit row, or gives it a number below 1: a trigger, or the sequence of the numbers,"
                    " was changed; put it right (`\\d audit` and `TABLE audit_id_seq` of psql show them)",
                ) from exc.error
            if isinstance(exc.error, (psycopg.DataError, UnicodeEncodeError)):
                whose = f" of {type(asked[exc.at].op).__name__}" if exc.at < len(asked) else ""
                raise fault_of(self.name, f"a value{whose} cannot be stored: {type(exc.error).__name__}") from exc.error
            raise exc.error from None
        for each, rows in zip(asked, found, strict=False):
            each.note(rows)
        return found

    def require_space(self, connection: Connection) -> None:
        """Require within a transaction that the disk takes data. Raises `psycopg.errors.DiskFull`."""
        _ = rows_of(connection, _TAKE_SPACE)
        self.is_full = False

    def lift_limits(self, connection: Connection) -> None:
        """Remove the time limits of this transaction, and of its statements."""
        _ = rows_of(connection, "SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0")
        connection.answer_seconds = None

    def _commit(self, connection: Connection) -> None:
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
            _ = self._exchanged(connection, held, (b"COMMIT", ()))
        finally:
            connection.remove_notice_handler(note)
        # Any notice counts: their texts are translated, and a commit that succeeds has none.
        if notices:
            connection.close()
            what = f"store {self.name}: the database warned at the commit ({notices[0]})"
            raise FateUnknown(f"{what}; {UNKNOWN}, and a fail-over may lose it")

    def _roll_back(self, connection: Connection, exc: BaseException | None = None) -> str:
        """Roll back; return who locks our tables, if that is the fault."""
        statements: list[tuple[bytes, Values]] = [(b"ROLLBACK", ())]
        if isinstance(exc, errors.LockNotAvailable):
            statements.append((STRANGERS.encode(), ()))
        try:  # not prepared: the session may be another one, which is why it is rolled back
            found = connection.wait(exchange(connection, Prepared(), statements))
        except (psycopg.Error, StatementError):
            connection.close()
            return ""
        return described(found[-1])

    def _meaning(self, connection: Connection, exc: psycopg.Error, who: str, *, has_ahead: bool) -> StoreError | Again:
        """Return what a fault of the present transaction means, which was rolled back. ``who`` locks our tables."""
        begun = connection.has_begun
        self.is_full |= isinstance(exc, errors.DiskFull)
        if connection.closed and connection.is_committing:
            return FateUnknown(f"store {self.name}: the connection was lost at the commit; {UNKNOWN}{self.hint}")
        if isinstance(exc, NOT_PREPARED):  # a pooler led to another session, and did not say so
            connection.prepared.is_own = False
        # A standby has no SERIALIZABLE; and a statement that was prepared before a column changed its type fails so.
        is_unknown = isinstance(exc, errors.FeatureNotSupported)
        is_standby = not begun and is_unknown
        if is_unknown and connection.prepared.names:
            connection.close()
        hint = self.hint + (f"; {who}; wait for it, or end it with SELECT pg_terminate_backend(...)" if who else "")
        fault = standby(self.name) if is_standby else translated(self.name, exc, hint)
        is_again = connection.closed or isinstance(exc, (*AGAIN, *NOT_PREPARED))
        # A fault of what is read ahead is met where the unit asks for it, after the version was looked at.
        is_ahead = has_ahead and not (begun or is_again or is_standby or exc.sqlstate in TEMPORARY)
        return Again(fault, is_ahead=is_ahead) if is_again or is_ahead else fault
