"""The store in one SQLite file.

Rules kept here:

* an answer leaves only after its transaction is on the disk: write-ahead log, ``synchronous=FULL``, and never a file
  that was moved away or replaced under us, nor with such a log;
* one writer at a time, from its first read on (``BEGIN IMMEDIATE``): serializable, and no script runs twice;
* units that wait while another is written share the next commit: one of their threads runs all of them, one after the
  other, each within a savepoint if there are several. An error of a script undoes that unit alone; if the commit fails,
  all of them fail, and a refusal that another of these units caused is replaced by that failure;
* the file is private (0600) from its first byte, and what a unit writes goes to no temporary one; an existing file of
  another kind or schema version is refused, and not changed;
* with ``alone`` the file is locked for this process as long as it is open: a copy must not miss what a server grants
  meanwhile;
* SQLite's errors become `StoreBusy` (retry later) or `StoreError` (an operator must act), with the file's name.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from attrs import define, field

from chutes_proto.errors import StoreAway, StoreBusy, StoreError
from chutes_proto.io.files import is_there, make_file
from chutes_proto.io.stores import MAKE_SPACE
from chutes_proto.io.stores.marks import Change, MarkedStore, MarkKeeper
from chutes_proto.io.stores.sealing import seal_if_new
from chutes_proto.store._custody import Custody, Session
from chutes_proto.store._guard import Guard
from chutes_proto.store._rows import ROWS, AuditRow, Insert, PurgeAudit
from chutes_proto.store._run import Snapshot, Store, Unit, run_script, untold
from chutes_proto.store._sql import READ_VERSION, LostFactError, Values, for_driver
from chutes_proto.store._versions import Versions
from chutes_proto.store._vm_groups import Remembered

if TYPE_CHECKING:
    from chutes_proto.keys.vault import Vault
    from chutes_proto.store._rows import StoreOp

T = TypeVar("T")

_OLDEST_SQLITE = (3, 35)  # the first with RETURNING

_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}

_UNWRITTEN = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}
"""After these faults a file may still be read, and not be written."""

_SPACE: Final = 256 << 10
"""More bytes than the transactions of a commit write, mostly: with so much space it is tried again."""

_FAULTS = {
    sqlite3.SQLITE_BUSY: "another transaction takes too long",
    sqlite3.SQLITE_LOCKED: "another transaction takes too long",
    sqlite3.SQLITE_FULL: f"the disk is full; this transaction changed nothing; {MAKE_SPACE}",
    sqlite3.SQLITE_READONLY: "it is read-only, or its directory is; the server must be able to write both",
    sqlite3.SQLITE_PERM: "this user may not open it",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; is its directory there, and may this user write it?",
    sqlite3.SQLITE_CORRUPT: "it is damaged; stop the server, keep the file, and restore a backup",
    sqlite3.SQLITE_NOTADB: "it is not an SQLite database, or it is damaged; it was left as it is",
    sqlite3.SQLITE_IOERR: f"reading or writing it failed; if its disk is full, {MAKE_SPACE}",
}

_SETTINGS: tuple[tuple[str, str | int], ...] = (
    ("journal_mode", "wal"),
    ("synchronous", 2),  # FULL
    ("fullfsync", 1),  # where fsync does not reach the disk without it
    ("foreign_keys", 1),
    ("trusted_schema", 0),
    ("secure_delete", 1),  # a key that is erased is overwritten
)

_STEPS_A_ROW: Final = 78
"""About so many steps of SQLite's machine check a row and its entries in indexes."""
_STEPS_A_CALL: Final = 200_000

_CALLERS: Final = 40
"""How many units wait for a writer: all of them share the next commit."""

_MAKING = threading.Lock()

_ALONE: Final = Unit[Any]()
"""The unit of a caller that wants to be the writer for other work than a unit."""


def _locked() -> threading.Lock:
    lock = threading.Lock()
    _ = lock.acquire()
    return lock


@define(eq=False)
class _Job:
    """A unit that waits for a writer, and its outcome: ``result``, or ``fault``, which is raised in its caller.

    ``turn`` is released once: when its caller becomes the writer, or when another writer has finished the unit.
    """

    unit: Unit[Any]
    turn: threading.Lock = field(factory=_locked)
    others: list[_Job] = field(factory=list["_Job"])
    """Those that came with it, for the same commit."""
    result: Any = None
    fault: BaseException | None = None
    changes: list[Change] = field(factory=list[Change])
    """Its changes to audit rows."""
    heads: dict[tuple[str, str], int] = field(factory=dict[tuple[str, str], int])
    """The versions of its heads."""


class SqliteStore(MarkedStore):
    """Rows in the SQLite file at ``path``, which is made if it does not exist. May be used from several threads.

    ``busy_seconds`` is how long one transaction waits for another, of this process or of another one, before it raises
    `StoreBusy`. ``is_new`` tells whether the file was made, ``commits`` is the number of commits. With ``alone`` nobody
    else has the file open, a server that does nothing neither, or `StoreBusy` is raised.
    A file that is behind the mark in ``mark_file``, or behind what this object has seen of it, is refused. Rows are
    authenticated with the key that ``vault`` opens, and a new store is sealed with it. Raises `StoreError` for a file
    that cannot be a store.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        busy_seconds: float = 5.0,
        alone: bool = False,
        mark_file: Path | None = None,
        vault: Vault | None = None,
    ) -> None:
        self.path: Path = Path(path).resolve()
        self.name: str = str(self.path)
        self.commits: int = 0
        self.callers: int = _CALLERS
        self.rollbacks: Counter[str] = Counter()  # always empty: one transaction writes at a time
        self.is_new: bool = False
        self.clock_skew: int | None = None
        self.custody: Custody = Custody(self.name)
        if vault is not None:
            self.custody.hold(vault.unwrap)
        self._marks = MarkKeeper(self.name, mark_file, self.custody)
        self._alone = alone
        self._busy_seconds = busy_seconds
        self._lock = threading.Lock()  # guards the next two
        self._writer: _Job | None = None
        self._waiting: list[_Job] = []
        self._connection: sqlite3.Connection | None = None
        self._checked_at: tuple[int] | None = None  # the changes that others had made to the file
        self._tables_at: tuple[int] | None = None  # the changes of the schema when all tables were there
        self._keys: Session | None = None  # as they were then
        self._heads: Remembered = {}  # of VMs, as stored: nobody else has changed them since then
        self._closed = False
        self._unwritten = False  # a write has failed, and its disk may still take none
        self._inode: tuple[int, int] | None = None
        self._log_path: Path = self.path.with_name(f"{self.path.name}-wal")
        self._index_path: Path = self.path.with_name(f"{self.path.name}-shm")
        self._log_inode: tuple[int, int] | None = None
        self._index_inode: tuple[int, int] | None = None
        if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
            raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old for the store; install 3.35 or newer")
        with self._my_turn(_Job(_ALONE)):
            self._connection = self._open()
            try:
                with self._transaction("BEGIN") as connection:
                    self._marks.compare(partial(_ask, connection), 0)
            except BaseException:
                self._drop()
                raise
        if vault is not None:
            try:
                seal_if_new(self, vault)
            except BaseException:
                self.close()
                raise

    def transact(self, unit: Unit[T]) -> T:
        """Run ``unit`` as one transaction; see `chutes_proto.store._run.Store`."""
        job = _Job(unit)
        self._carry_out(job)
        if job.fault is not None:
            raise job.fault
        result: T = job.result
        return result

    def transact_all(self, units: Sequence[Unit[Any]]) -> list[tuple[Any, BaseException | None]]:
        """Run ``units`` as `transact` does, in their order and one commit; return each one's result and exception."""
        first, *others = jobs = [_Job(unit) for unit in units]
        first.others = others
        try:
            self._carry_out(first)
        except BaseException as exc:  # noqa: BLE001 - there was no turn in time, or it was interrupted
            for job in jobs:
                job.fault = job.fault or exc
        return [(job.result, job.fault) for job in jobs]

    def check(self, tell: Callable[[int, int], object] = untold) -> dict[str, int]:
        """Read the whole file in one snapshot, while others write; return the number of rows of each table.

        ``tell`` takes about how many rows are checked, and how many there are. Raises `StoreError` for damage, another
        schema, or a file that was removed.
        """
        with self._my_turn(_Job(_ALONE)), self._transaction("BEGIN") as connection:
            if self._versions(connection).found() is None:
                raise self._fault(_FAULTS[sqlite3.SQLITE_CORRUPT])
            self._versions(connection).require()
            texts = ((kind.TABLE, f"SELECT count(*) FROM {kind.TABLE}") for kind in ROWS)  # noqa: S608 - names of ours
            counts: dict[str, int] = {table: connection.execute(text).fetchone()[0] for table, text in texts}
            with self._steps_told(connection, sum(counts.values()), tell):
                (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
                if verdict != "ok":
                    raise self._fault(_FAULTS[sqlite3.SQLITE_CORRUPT])
                if (lost := connection.execute("PRAGMA foreign_key_check").fetchone()) is not None:
                    raise self._fault(
                        f"a row of the table {lost[2]} is missing, which one of the table {lost[0]} names: somebody"
                        " deleted it beside the servers; stop the server, keep the file, and restore a backup"
                    )
            return counts

    @contextlib.contextmanager
    def _steps_told(
        self, connection: sqlite3.Connection, rows: int, tell: Callable[[int, int], object]
    ) -> Generator[None]:
        """Tell of how many of so many rows the block has done the work, by the steps that it took."""
        steps = 0

        def count() -> None:
            nonlocal steps
            steps += _STEPS_A_CALL
            _ = tell(min(steps // _STEPS_A_ROW, rows), rows)

        connection.set_progress_handler(count, _STEPS_A_CALL)
        try:
            yield
        finally:
            connection.set_progress_handler(None, 0)

    @contextlib.contextmanager
    def snapshot(self) -> Generator[Store]:
        """See `DurableStore.snapshot`."""
        with self._my_turn(_Job(_ALONE)), self._transaction("BEGIN") as connection, _only_reading(connection):
            self._versions(connection).require()
            session = self._session(connection)

            def run(unit: Unit[T]) -> T:
                job = _Job(unit)
                _ = self._run(connection, job, session, {}, is_alone=False)
                if job.fault is not None:
                    raise job.fault
                result: T = job.result
                return result

            yield Snapshot(run)

    def check_writing(self) -> None:
        """Begin a transaction that writes, and end it, on a disk with space for one: this one writes nothing.

        Raises `StoreError` for a file that can only be read, too.
        """
        with self._my_turn(_Job(_ALONE)), self._transaction():
            self._require_space()

    def empty_log(self, *, rewrite: bool) -> None:
        """Move the log into the file and empty it; with ``rewrite`` write the whole file again, without free pages.

        Raises `StoreError`, and `StoreBusy` where another process does not let it.
        """
        with self._my_turn(_Job(_ALONE)), self._translated():
            if self._connection is None:
                self._connection = self._open()
            if rewrite:  # by way of a temporary copy of the whole file
                _ = self._connection.execute("PRAGMA temp_store = file")
                _ = self._connection.execute("VACUUM")
                _ = self._connection.execute("PRAGMA temp_store = memory")
            busy = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            if busy:
                raise StoreBusy(f"store {self.name}: another process reads its log; run the command again")

    def close(self) -> None:
        """Close the file; afterwards every call raises `StoreError`. Waits for a running transaction."""
        with self._my_turn(_Job(_ALONE), may_wait=True):
            self._closed = True
            self._drop()
        self._marks.close()

    @property
    def replication_warning(self) -> str:
        """Empty: a file has no standby."""
        return ""

    @property
    def notes(self) -> list[str]:
        """Findings that an operator should know, about the mark."""
        return [*filter(None, (self.mark_warning, self.log_warning)), *self._marks.notes]

    def _check_mark(self, connection: sqlite3.Connection) -> None:
        """Compare the file with the mark: all of it once a second, and else its newest row."""
        ask = partial(_ask, connection)
        if self._marks.is_due() or not self._marks.has_newest(ask):
            self._marks.compare(ask, 0)

    # --- turns ---

    @contextlib.contextmanager
    def _my_turn(self, job: _Job, *, may_wait: bool = False) -> Generator[bool]:
        """Wait to be the writer, and be it inside; yield False if another writer has done ``job`` meanwhile."""
        with self._lock:
            self._waiting.append(job)
            if self._writer is None:
                self._call_next()
        try:
            if not job.turn.acquire(timeout=-1 if may_wait else self._busy_seconds):
                with self._lock:
                    if job in self._waiting:
                        self._waiting.remove(job)
                        raise StoreBusy(f"store {self.name}: other transactions take too long")
                _ = job.turn.acquire()  # a writer has begun it, and its outcome must be known
            yield self._writer is job
        finally:
            with self._lock:
                if self._writer is job:
                    self._call_next()
                elif job in self._waiting:  # interrupted
                    self._waiting.remove(job)

    def _call_next(self) -> None:
        self._writer = self._waiting.pop(0) if self._waiting else None
        if self._writer is not None:
            self._writer.turn.release()

    def _take(self, job: _Job) -> list[_Job]:
        """Take the writer's own unit, and all that wait."""
        with self._lock:
            units = [other for other in self._waiting if other.unit is not _ALONE]
            self._waiting = [other for other in self._waiting if other.unit is _ALONE]
        return [each for taken in (job, *units) for each in (taken, *taken.others)]

    def _carry_out(self, job: _Job) -> None:
        with self._my_turn(job) as mine:
            if mine:
                self._write(job)
        for each in (job, *job.others):
            if each.fault is not None:
                with self._lock:
                    self.custody.note(each.fault)

    def _write(self, job: _Job) -> None:
        """Run ``job`` and all units that wait, in one transaction."""
        jobs: list[_Job] = []
        try:
            with self._transaction() as connection:
                session = self._checked(connection)
                jobs = self._take(job)
                for each in jobs:
                    if self._run(connection, each, session, self._heads, is_alone=len(jobs) == 1):
                        session = self._session(connection)
            heads = {vm: version for each in jobs for vm, version in each.heads.items()}
            changes = (change for each in jobs for change in each.changes)
            self._committed(changes, heads, session.key)
        except BaseException as exc:
            self._checked_at = None
            self.custody.forget_keys()
            jobs = jobs or self._take(job)
            seen = False
            for each in jobs:  # a fault counts if no unit before it, which is now undone, can have caused it
                seen |= each.fault is None
                if seen:
                    reason = exc.args if isinstance(exc, StoreError) else (f"store {self.name}: interrupted",)
                    each.fault = (type(exc) if isinstance(exc, StoreError) else StoreError)(*reason)
            if not isinstance(exc, StoreError):
                raise
        finally:
            for each in jobs[1:]:
                each.turn.release()

    def _checked(self, connection: sqlite3.Connection) -> Session:
        """Check schema and mark, unless nobody else has changed the file since then; return the keys of the rows."""
        changes: tuple[int] = connection.execute("PRAGMA data_version").fetchone()  # by others than this connection
        if self._keys is not None and changes == self._checked_at and not self._marks.is_due():
            return self._keys
        if changes != self._checked_at:
            self._heads.clear()
        session = self._session(connection)
        self._check_mark(connection)
        self._checked_at = changes
        return session

    def _session(self, connection: sqlite3.Connection) -> Session:
        """Check the schema, which somebody may have changed meanwhile; return the keys of the rows."""
        versions = self._versions(connection)
        changes: tuple[int] = connection.execute("PRAGMA schema_version").fetchone()
        if changes != self._tables_at:
            versions.require_tables()
            self._tables_at = changes
        found = versions.execute(READ_VERSION)
        versions.check(found)
        session = self.custody.session(found[0][1], versions.execute)
        self._keys = session if session.key is not None else None  # its KEK may be named later
        return session

    def _run(
        self,
        connection: sqlite3.Connection,
        job: _Job,
        session: Session,
        heads: Remembered,
        *,
        is_alone: bool,
    ) -> bool:
        """Run one unit; undo its changes if it raises. Raises only an error that undid more than this unit.

        ``heads`` are those that are known. One that ``is_alone`` in its transaction needs no savepoint: to undo it ends
        the transaction, and an empty one is begun for the commit. Returns whether the next unit needs a new session.
        """
        cursor = connection.cursor()

        def run(op: StoreOp[Any] | None, text: str, values: Values) -> list[tuple[Any, ...]]:
            try:
                rows: list[tuple[Any, ...]] = cursor.execute(_query(text), values).fetchall()
            except (OverflowError, UnicodeEncodeError) as exc:
                raise self._fault(f"a value of {type(op).__name__} cannot be stored: {type(exc).__name__}") from exc
            if isinstance(op, Insert) and isinstance(op.row, AuditRow):
                job.changes.append((cursor.lastrowid or 0, op.row))
            elif isinstance(op, PurgeAudit):
                job.changes.append(op)
            return rows

        guard = Guard(session, run, heads)
        if not is_alone:
            _ = connection.execute("SAVEPOINT unit")
        try:
            try:
                job.result = run_script(job.unit.script(), guard.perform)
                guard.finish()
            except sqlite3.Error as exc:
                raise self._translation(exc) from exc
            except LostFactError as exc:
                raise self._fault(str(exc)) from None
        except BaseException as exc:
            job.fault = exc
            job.changes.clear()
            if not connection.in_transaction:  # SQLite itself rolls everything back after some faults
                raise
            _ = connection.execute("ROLLBACK" if is_alone else "ROLLBACK TO unit")
            if is_alone:
                _ = connection.execute("BEGIN")
        if not is_alone:
            _ = connection.execute("RELEASE unit")
        if job.fault is None:
            guard.of_vms.remember()
            job.heads = guard.versions
        return guard.changed_state and job.fault is None

    # --- the file ---

    @contextlib.contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Generator[sqlite3.Connection]:
        """Begin, and commit the work of the block; roll back if it raises."""
        if self._closed:
            raise self._fault("it was closed")
        if self._connection is None:
            self._connection = self._open()
        connection = self._connection
        try:
            if self._unwritten:
                self._require_space()
            _ = connection.execute(begin)
            yield connection
            self._check_file()
            _ = connection.execute("COMMIT")  # which fails if SQLite itself has ended the transaction
            self.commits += 1
        except BaseException as exc:
            self._roll_back(connection)
            if isinstance(exc, sqlite3.Error):
                raise self._translation(exc) from exc
            raise

    def _require_space(self) -> None:
        """Require that the disk takes data, as after a write that failed: on a full one reading, and so a look, works.

        No page of the store would tell it: what the failed write has got of the log is left for the next one.
        """
        try:
            with tempfile.TemporaryFile(dir=self.path.parent) as file:
                _ = file.write(os.urandom(_SPACE))  # which no file system compresses
                file.flush()
        except OSError as exc:
            raise self._fault(f"its disk takes no data ({exc.strerror}); {MAKE_SPACE}") from exc
        self._unwritten = False

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            if connection.in_transaction:
                _ = connection.execute("ROLLBACK")
        except sqlite3.Error:
            self._drop()

    def _drop(self) -> None:
        connection, self._connection, self._checked_at = self._connection, None, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def _open(self) -> sqlite3.Connection:
        with self._translated():
            self._find_file()
            connection = sqlite3.connect(
                self.path, timeout=self._busy_seconds, isolation_level=None, check_same_thread=False
            )
            connection.text_factory = _text
            try:
                self._prepare_with_retries(connection)
            except BaseException:
                connection.close()
                raise
            self._log_inode, self._index_inode = _inode_of(self._log_path), _inode_of(self._index_path)
            return connection

    def _find_file(self) -> None:
        """Make the file if there is none, and remember its inode: it must be the same when it is opened again."""
        if self._inode is not None:
            self._check_file()
            return
        try:
            # Before it is made: it would be in the way of the right one.
            if not is_there(self.path):
                self._marks.refuse_new("it does not exist")
            elif self.path.stat().st_size == 0:
                self._marks.refuse_new("it is empty")
            self._make_file()
            found = self.path.stat()
        except OSError as exc:
            raise self._fault(f"{_FAULTS[sqlite3.SQLITE_CANTOPEN]} ({exc.strerror})") from exc
        self._inode = found.st_dev, found.st_ino

    def _make_file(self) -> None:
        # Closing any descriptor of a file drops all locks that this process holds on it (POSIX), SQLite's too. So the
        # descriptor must be closed before another thread can have opened the file, and none is opened if it is there.
        with _MAKING:
            make_file(self.path, 0o600)

    def _prepare_with_retries(self, connection: sqlite3.Connection) -> None:
        """Prepare; retry, because SQLite does not wait when two processes switch a new file to the write-ahead log."""
        until = time.monotonic() + self._busy_seconds
        while True:
            try:
                return self._prepare(connection)
            except sqlite3.OperationalError as exc:
                if _code_of(exc) not in _BUSY or time.monotonic() > until:
                    raise
            time.sleep(0.01)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        versions = self._versions(connection)
        if self._alone:  # every open connection holds a shared lock, and this one asks for the exclusive one
            _ = connection.execute("PRAGMA locking_mode = exclusive").fetchone()
        if versions.found() is not None:
            versions.require()  # before any change: the file may be another program's
        for setting, wanted in _SETTINGS:
            _ = connection.execute(f"PRAGMA {setting} = {wanted}").fetchone()
            found = connection.execute(f"PRAGMA {setting}").fetchone()
            if found != (wanted,):
                raise self._fault(f"SQLite does not accept {setting} = {wanted} there; is it on a local disk?")
        _ = connection.execute("BEGIN IMMEDIATE")
        try:
            self.is_new = versions.make()
            _ = connection.execute("COMMIT")
        except BaseException:
            self._roll_back(connection)
            raise
        # A savepoint, of units that share a transaction, keeps the pages that they change, and of more than 16 it makes
        # a file in a directory for temporary ones, although the store has the rows.
        _ = connection.execute("PRAGMA temp_store = memory")

    def _versions(self, connection: sqlite3.Connection) -> Versions:
        return Versions(self.name, "sqlite", lambda text: connection.execute(text).fetchall())

    def _check_file(self) -> None:
        """Check that the path leads to the open file: commits to a file without a name are lost at the next start.

        So are those in its log, unless it is closed before: that writes them to the file. It is not closed here: other
        processes may go on with it. Without the index of the log, a process that begins does not see where we write:
        each overwrites what the other has committed.
        """
        if _inode_of(self.path) != self._inode:
            raise self._fault("it was moved, removed or replaced while in use; restart the server when it is back")
        if self._connection is not None and _inode_of(self._log_path) != self._log_inode:
            raise self._fault(self._log_is_away)
        if self._connection is not None and _inode_of(self._index_path) != self._index_inode:
            raise self._fault(
                f"the index of its log, {self._index_path.name}, was moved, removed or replaced while in use; kill"
                " the server by SIGKILL, so that it discards nothing that others wrote to the log, and start it again"
            )

    @property
    def _log_is_away(self) -> str:
        return (
            f"its log, {self._log_path.name}, was moved, removed or replaced while in use; stop the server, which"
            " writes to the file what the log has, and start it again"
        )

    def _fault(self, what: str) -> StoreError:
        return StoreError(f"store {self.name}: {what}")

    @contextlib.contextmanager
    def _translated(self) -> Generator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise self._translation(exc) from exc

    def _translation(self, exc: sqlite3.Error) -> StoreError:
        code = _code_of(exc)
        self._unwritten |= code in _UNWRITTEN
        text = _FAULTS.get(code, "SQLite refused")
        if getattr(exc, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_SHORT_READ:
            text = self._log_is_away  # the index, which a server has, says that there is more to be read
        if self._alone and code in _BUSY:
            text = "another process has it open; stop all servers and other commands that use it"
        kind = StoreAway if code in _BUSY else StoreError  # another process has it, and lets nobody in
        return kind(f"store {self.name}: {text} ({exc})")


def _ask(connection: sqlite3.Connection, text: str, values: Values = ()) -> list[tuple[Any, ...]]:
    return connection.execute(text, values).fetchall()


@contextlib.contextmanager
def _only_reading(connection: sqlite3.Connection) -> Generator[None]:
    """Let SQLite refuse to write in the block."""
    _ = connection.execute("PRAGMA query_only = 1")
    try:
        yield
    finally:
        _ = connection.execute("PRAGMA query_only = 0")


def _inode_of(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _text(data: bytes) -> str | bytes:
    """A stored text; bytes if it is not UTF-8, which is a value of another type, and so a fault of its row alone."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


@lru_cache(128)
def _query(text: str) -> str:
    return for_driver(text, "sqlite")


def _code_of(exc: sqlite3.Error) -> int:
    """Return SQLite's primary result code; 0 for errors of Python's module."""
    code: int = getattr(exc, "sqlite_errorcode", 0)
    return code & 0xFF
