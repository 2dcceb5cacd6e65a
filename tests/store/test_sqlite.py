"""The SQLite store and its file: private, durable, refused when it is not ours, clear when something is wrong."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from attrs import frozen

from chutes_proto.errors import StoreBusy, StoreError
from chutes_proto.io.stores.sealing import find_faults
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.store._rows import AuditRow, BootRow, Insert, ReadTimes, Scan, SetHorizon
from chutes_proto.store._run import Ask, Script, Unit
from chutes_proto.testing.store_suite._parts import NOW, VAULT, VM, Interrupted, Interruption, boot, dump, sync


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(path, vault=VAULT)
    yield store
    store.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_are_private_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        with closing(SqliteStore(path, vault=VAULT)) as store:
            store.transact(boot("first"))
            assert {mode(file) for file in path.parent.iterdir()} == {0o600}
            assert len(list(path.parent.iterdir())) == 3
    finally:
        os.umask(before)


@frozen
class Watched(Unit[list[str]]):
    """Do the work of a unit, and return the files that this process has open then."""

    unit: Unit[object]

    def script(self) -> Script[list[str]]:
        _ = yield from self.unit.script()
        return [str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]


def test_no_row_goes_to_a_temporary_file(path: Path) -> None:
    with closing(SqliteStore(path, vault=VAULT)) as store:
        store.transact(boot("first"))
        files = store.transact(Watched(boot("second")))
    assert str(path) in files
    assert [file for file in files if "etilqs" in file] == []  # SQLite's own name for them, spelt backwards


def test_a_boot_takes_few_statements_and_changes_few_pages(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the evidence that a server keeps, whose pages depend on its size, and the comparison of each second."""
    monkeypatch.setattr("chutes_proto.io.stores.marks.LOOK_SECONDS", 3600.0)
    with closing(SqliteStore(path, vault=VAULT)) as store:
        first, second = (boot(label, now=NOW + at) for at, label in enumerate(("first", "second")))
        store.transact(first)
        store.transact(sync(first, "body", "storage", "tdx-cache"))
        store.empty_log(rewrite=False)
        connection = store._connection
        assert connection is not None
        statements: list[str] = []
        connection.set_trace_callback(statements.append)
        store.transact(second)
        store.transact(sync(second, "body", "storage", "tdx-cache"))
        pages = (path.parent / f"{path.name}-wal").stat().st_size // (4096 + 24)
    assert len(statements) <= 32, statements
    assert pages <= 36, pages


def test_a_head_is_read_once_until_another_process_or_an_error_changes_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that is not the stored one any more would refuse a VM, or accept rows that were set back."""
    units = [boot(str(number), now=NOW + number) for number in range(7)]

    def broken() -> None:
        raise StoreError("it was moved")

    with closing(SqliteStore(path, vault=VAULT)) as store, closing(SqliteStore(path, vault=VAULT)) as other:

        def heads_read(unit: Unit[object]) -> int:
            statements: list[str] = []
            assert store._connection is not None
            store._connection.set_trace_callback(statements.append)
            store.transact(unit)
            return len([text for text in statements if text.startswith("SELECT known.version")])

        assert heads_read(units[0]) == 1
        assert heads_read(sync(units[0], "body", "storage")) == 0
        other.transact(units[1])
        assert heads_read(sync(units[1], "body", "storage")) == 1
        with pytest.raises(Interruption):
            store.transact(Interrupted(units[2], 6))
        assert heads_read(units[3]) == 1
        with monkeypatch.context() as patched, pytest.raises(StoreError, match="moved"):
            patched.setattr(store, "_check_file", broken)
            store.transact(units[4])
        assert heads_read(units[5]) == 1
        assert heads_read(units[6]) == 0
        assert not list(find_faults(store))


def test_commits_reach_the_disk(store: SqliteStore, path: Path) -> None:
    connection = store._connection
    assert connection is not None
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)


def test_rows_are_there_after_closing_and_after_dying(path: Path) -> None:
    with closing(SqliteStore(path, vault=VAULT)) as store:
        granted = boot("first")
        root = store.transact(granted).root
    script = (
        "import os, sys; from chutes_proto.io.stores.sqlite import SqliteStore;"
        "from chutes_proto.testing.store_suite._parts import *;"
        "SqliteStore(sys.argv[1], vault=VAULT).transact(sync(boot('first'), 'body', 'storage')); os._exit(9)"
    )
    died = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert died.returncode == 9
    with closing(SqliteStore(path, vault=VAULT)) as store:
        store.check()
        answer = store.transact(sync(granted, "body", "storage"))
        assert answer.replayed
        assert store.transact(boot("second")).root == root


def test_many_may_make_the_file_at_once(path: Path) -> None:
    stores: list[SqliteStore] = []
    threads = [threading.Thread(target=lambda: stores.append(SqliteStore(path, vault=VAULT))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 8
    stores[0].transact(Ask(SetHorizon(7)))
    assert {store.transact(Ask(ReadTimes())).horizon for store in stores} == {7}
    for store in stores:
        store.close()


def test_an_empty_file_becomes_a_store(path: Path) -> None:
    path.touch()
    with closing(SqliteStore(path, vault=VAULT)) as store:
        assert store.transact(Ask(ReadTimes())).horizon == 0


@pytest.mark.parametrize(
    "statement", ["CREATE TABLE guests (name TEXT)", "CREATE TABLE fact (name TEXT, value BIGINT)"]
)
def test_another_programs_database_is_refused_and_left_alone(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="another program's database"):
        SqliteStore(path, vault=VAULT)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_what_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    content = b"passphrases of the year\n" * 400
    path.write_bytes(content)
    with pytest.raises(StoreError, match="not an SQLite database"):
        SqliteStore(path, vault=VAULT)
    assert path.read_bytes() == content


def test_a_place_that_cannot_hold_a_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot be opened; is its directory there"):
        SqliteStore(tmp_path / "missing" / "keys.db", vault=VAULT)
    with pytest.raises(StoreError, match="cannot be opened"):
        SqliteStore(tmp_path, vault=VAULT)


def test_a_full_disk_is_said_and_nothing_changes(store: SqliteStore) -> None:
    connection = store._connection
    assert connection is not None
    granted = boot("first")
    store.transact(granted)
    before = dump(store)
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")

    @frozen
    class Flood(Unit[None]):
        def script(self) -> Script[None]:
            for _ in range(1000):
                yield from Insert(AuditRow(NOW, "vm", "flood", "granted", reason="x" * 1000))

    with pytest.raises(StoreError, match="disk is full") as caught:
        store.transact(Flood())
    assert not isinstance(caught.value, StoreBusy)
    assert dump(store) == before
    connection.execute("PRAGMA max_page_count = 100000")
    assert not store.transact(sync(granted, "body", "storage")).replayed


def test_a_disk_that_is_full_at_the_start_is_not_taken_for_a_log_that_is_gone(path: Path) -> None:
    """The log is empty then, too: SQLite has just made it, and has no space for its index."""
    SqliteStore(path, vault=VAULT).close()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(
            StoreError, match=r"keys\.db: reading or writing it failed; if its disk is full, make space"
        ):
            SqliteStore(path, vault=VAULT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    SqliteStore(path, vault=VAULT).close()


def test_a_read_only_file_is_said(store: SqliteStore) -> None:
    connection = store._connection
    assert connection is not None
    connection.execute("PRAGMA query_only = 1")
    with pytest.raises(StoreError, match="read-only"):
        store.transact(boot("first"))
    connection.execute("PRAGMA query_only = 0")
    store.transact(boot("first"))


def open_and_check(path: Path) -> None:
    with closing(SqliteStore(path, vault=VAULT)) as store:
        store.check()


def test_damage_is_said(path: Path) -> None:
    with closing(SqliteStore(path, vault=VAULT)) as store:
        for index in range(40):
            store.transact(boot(str(index)))
    content = bytearray(path.read_bytes())
    content[4096 * 2 :] = b"\xa5" * len(content[4096 * 2 :])
    path.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        open_and_check(path)


def test_a_check_finds_a_single_bit(path: Path) -> None:
    """In a row or in its index: no statement fails at it, but who looks by that index does not find the row."""
    with closing(SqliteStore(path, vault=VAULT)) as store:
        store.transact(boot("first"))
        (row,) = store.transact(Ask(Scan(BootRow)))
    content = path.read_bytes()
    places = [found.start() for found in re.finditer(re.escape(row.token_digest), content)]
    assert len(places) == 2
    for at in places:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(StoreError, match="damaged"):
            open_and_check(path)


def test_a_check_finds_what_points_nowhere(path: Path, store: SqliteStore) -> None:
    store.check()
    granted = boot("first")
    store.transact(granted)
    store.transact(sync(granted, "body", "storage"))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM boot")
    told = "a row of the table boot is missing, which one of the table boot_volume names: .*restore a backup"
    with pytest.raises(StoreError, match=told):
        store.check()


def test_a_file_that_is_gone_takes_no_more_keys(store: SqliteStore, path: Path) -> None:
    store.transact(boot("first"))
    path.rename(path.with_name("moved.db"))
    for _ in range(2):
        with pytest.raises(StoreError, match="moved, removed or replaced"):
            store.transact(boot("second"))
    path.write_bytes(b"")
    with pytest.raises(StoreError, match="moved, removed or replaced"):
        store.check()
    path.unlink()
    path.with_name("moved.db").rename(path)
    assert [row.boot_id for row in store.transact(Ask(Scan(BootRow)))] == [boot("first").boot_id]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_log_that_is_gone_takes_no_more_keys(store: SqliteStore, path: Path, is_replaced: bool) -> None:
    log = path.with_name(f"{path.name}-wal")
    store.transact(boot("first"))
    with closing(SqliteStore(path, vault=VAULT)) as other:  # another worker
        log.unlink()
        if is_replaced:
            log.write_bytes(b"")
        for each in (store, other, store):
            with pytest.raises(StoreError, match=r"its log, keys\.db-wal, was moved, removed or replaced while in use"):
                each.transact(boot("second"))
        if not is_replaced:
            with pytest.raises(StoreError, match=r"its log, keys\.db-wal, was moved.*disk I/O error"):
                open_and_check(path)  # as a command, which had nothing open
    store.close()
    with closing(SqliteStore(path, vault=VAULT)) as again:
        assert [row.boot_id for row in again.transact(Ask(Scan(BootRow)))] == [boot("first").boot_id]
        again.transact(boot("third"))
        log.rename(path.with_name("moved"))
        with pytest.raises(StoreError, match=r"its log, keys\.db-wal, was moved.*disk I/O error"):
            open_and_check(path)  # what is read first is not in the log
        log.unlink()
        path.with_name("moved").rename(log)


def test_an_index_of_the_log_that_is_gone_takes_no_more_keys(store: SqliteStore, path: Path) -> None:
    """Otherwise a command says that a VM is revoked, and the server's next commit overwrites that."""
    store.transact(boot("first"))
    path.with_name(f"{path.name}-shm").unlink()
    store_there = f"SqliteStore(Path({str(path)!r}), vault=VAULT)"
    text = f"from tests.store.test_sqlite import *; {store_there}.transact(boot('of a command'))"
    _ = subprocess.run([sys.executable, "-c", f"{text}; os._exit(0)"], check=True)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"the index of its log, keys\.db-shm, was moved, removed or replaced"):
            store.transact(boot("second"))
    copy = path.with_name("after a kill")  # a process that is killed leaves file and log as they are
    for end in ("", "-wal"):
        _ = subprocess.run(["cp", f"{path}{end}", f"{copy}{end}"], check=True)
    with closing(SqliteStore(copy, vault=VAULT)) as again:
        found = {row.boot_id for row in again.transact(Ask(Scan(BootRow)))}
    assert found == {boot("first").boot_id, boot("of a command").boot_id}


def test_another_process_at_work_is_busy(path: Path) -> None:
    with (
        closing(SqliteStore(path, busy_seconds=0.05, vault=VAULT)) as store,
        closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreBusy, match="another transaction takes too long"):
            store.transact(boot("first"))
        other.execute("ROLLBACK")
        store.transact(boot("first"))


def test_a_check_keeps_nobody_from_writing(path: Path) -> None:
    with (
        closing(SqliteStore(path, busy_seconds=0.05, vault=VAULT)) as store,
        closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        store.transact(boot("first"))
        other.execute("BEGIN IMMEDIATE")
        other.execute("DELETE FROM boot")
        assert store.check()["boot"] == 1
        other.execute("COMMIT")
        assert store.check()["boot"] == 0


def test_a_file_at_work_elsewhere_is_busy_when_opened(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreBusy, match="another transaction takes too long"):
            SqliteStore(path, busy_seconds=0.05, vault=VAULT)
        other.execute("ROLLBACK")
    SqliteStore(path, vault=VAULT).close()


def test_another_thread_at_work_is_busy(path: Path) -> None:
    with closing(SqliteStore(path, busy_seconds=0.05, vault=VAULT)) as store:
        inside, leave = threading.Event(), threading.Event()

        @frozen
        class Slow(Unit[None]):
            def script(self) -> Script[None]:
                yield from SetHorizon(1)
                inside.set()
                assert leave.wait(60)

        thread = threading.Thread(target=lambda: store.transact(Slow()))
        thread.start()
        assert inside.wait(60)
        with pytest.raises(StoreBusy, match="other transactions take too long"):
            store.transact(Ask(ReadTimes()))
        leave.set()
        thread.join()
        assert store.transact(Ask(ReadTimes())).horizon == 1


def test_a_closed_store_says_so(path: Path) -> None:
    store = SqliteStore(path, vault=VAULT)
    store.close()
    store.close()
    for call in (store.check, lambda: store.transact(boot("first"))):
        with pytest.raises(StoreError, match="was closed"):
            call()


def test_a_connection_that_cannot_roll_back_is_replaced(store: SqliteStore, path: Path) -> None:
    @frozen
    class Breaks(Unit[None]):
        def script(self) -> Script[None]:
            yield from SetHorizon(9)
            assert store._connection is not None
            store._connection.close()
            raise LookupError

    with pytest.raises(LookupError):
        store.transact(Breaks())
    assert store.transact(Ask(ReadTimes())).horizon == 0
    with pytest.raises(LookupError):
        store.transact(Breaks())
    path.unlink()
    for _ in range(2):
        with pytest.raises(StoreError, match="moved, removed or replaced"):
            store.transact(Ask(ReadTimes()))
    assert not path.exists()


def test_a_file_that_was_emptied_is_damaged(store: SqliteStore, path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite%'").fetchall():
            with contextlib.suppress(sqlite3.OperationalError):
                connection.execute(f"DROP TABLE {name}")
    with pytest.raises(StoreError, match="damaged"):
        store.check()


def test_what_sql_cannot_hold_is_the_stores_error(store: SqliteStore) -> None:
    with pytest.raises(StoreError, match="cannot be stored"):
        store.transact(Ask(Insert(AuditRow(2**63, "vm", "boot", "granted"))))
    with pytest.raises(StoreError, match="cannot be stored"):
        store.transact(Ask(Insert(AuditRow(0, "vm", "\ud800", "granted"))))
    assert store.transact(Ask(Scan(AuditRow))) == ()
    assert VM.name


def test_too_old_a_library_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(StoreError, match="too old"):
        SqliteStore(path, vault=VAULT)
    assert not path.exists()


def test_a_path_without_a_write_ahead_log_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda _, **options: connect(":memory:", **options))
    with pytest.raises(StoreError, match="does not accept journal_mode = wal"):
        SqliteStore(path, vault=VAULT)
