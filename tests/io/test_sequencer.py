"""The sequencer beside a store: frozen, killed or doubled it loses nothing, and it signs no log that was changed."""

from __future__ import annotations

import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from attrs import evolve, frozen

from chutes_proto.errors import LogError, StoreError
from chutes_proto.io.server.sequencer import BATCH, GATHER_SECONDS, LOOK_SECONDS, Sequencer, sequencing
from chutes_proto.io.stores.address import DurableStore, StorePlace
from chutes_proto.io.stores.marks import checkpoint_path
from chutes_proto.io.stores.postgres import PostgresStore
from chutes_proto.store._rows import (
    AuditRow,
    Insert,
    InsertAll,
    Put,
    ReadLog,
    ReadLossDecided,
    ReadTile,
    ReadTimes,
)
from chutes_proto.store._run import Ask, Script, Unit
from chutes_proto.testing.store_suite._parts import NOW, VAULT, boot
from chutes_proto.tlog.notes import Checkpoint, Note, Signature, Signer
from chutes_proto.units.log import SALT_SIZE, ReadLogKeys, SequenceLog
from chutes_proto.units.operator import StoreRestored
from tests.store.test_custody import run
from tests.waiting import wait_until

ORIGIN = "keys.example/audit"


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> StorePlace:
    address: str = "sqlite:keys.db" if request.param == "sqlite" else request.getfixturevalue("empty_schema")
    place = StorePlace(address, tmp_path, vault=VAULT)
    place.open(make=True).close()
    return place


@pytest.fixture
def store(place: StorePlace) -> Iterator[DurableStore]:
    with closing(place.open()) as store:
        yield store


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = checkpoint_path(tmp_path / "store.mark")
    assert found is not None
    return found


def row(writer: int, number: int) -> AuditRow:
    return AuditRow(NOW, "operator", f"writer {writer}", "done", str(number))


def log(store: DurableStore) -> list[AuditRow]:
    found = list(store.transact(Ask(ReadLog(0, 100_000))))
    assert [row.idx for row in found] == [*range(len(found))]
    return found


def held(file: Path) -> Checkpoint:
    return Checkpoint.of(Note.parse(file.read_bytes()))


def test_doubled_sequencers_lose_and_reorder_nothing(place: StorePlace) -> None:
    writers, each = 4, 60
    with closing(place.open()) as one, closing(place.open()) as other:

        def write(writer: int) -> None:
            for number in range(each):
                (one, other)[writer % 2].transact(Ask(Insert(row(writer, number))))

        with (
            sequencing(one, lambda: VAULT, ORIGIN, None),
            sequencing(other, lambda: VAULT, "another.example/log", None),
            ThreadPoolExecutor(writers) as threads,
        ):
            list(threads.map(write, range(writers)))
        found = [row for row in log(one) if row.event != "log key made"]  # if a sequencer had caught up meanwhile
    assert len(found) == writers * each
    for writer in range(writers):
        assert [int(row.reason) for row in found if row.event == f"writer {writer}"] == [*range(each)]


def test_a_row_of_the_moment_in_which_it_is_stopped_is_sequenced(
    store: DurableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is committed after the sequencer has read, and before it has looked whether it shall end."""
    sequencer = Sequencer(store, lambda: VAULT, ORIGIN, None)
    sequence, rows = sequencer.sequence, [row(0, 1)]

    def sequence_and_stop() -> None:
        sequence()
        while rows:
            store.transact(Ask(Insert(rows.pop())))
            sequencer.stop()

    monkeypatch.setattr(sequencer, "sequence", sequence_and_stop)
    store.transact(Ask(Insert(row(0, 0))))
    sequencer.run()
    assert [row.reason for row in log(store)] == ["0", "1"]


@frozen
class Stopped(Unit[None]):
    """Sequences, and then does something before the transaction would be committed."""

    then: Callable[[], object]

    READS_COMMITTED = True

    def script(self) -> Script[None]:
        yield from SequenceLog(bytes(range(256)), ORIGIN).script()
        self.then()
        yield from ReadTimes()


def test_a_sequencer_that_dies_within_its_transaction_changes_nothing(place: StorePlace, store: DurableStore) -> None:
    store.transact(Ask(Insert(row(0, 0))))

    def die() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.transact(Stopped(die))
    assert log(store) == []
    if isinstance(store, PostgresStore):  # its connection is cut; the unit runs again on another one
        cut = iter([True])

        def end() -> None:
            if next(cut, False):
                with psycopg.connect(place.address, autocommit=True) as admin:
                    admin.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_class ON pg_class.oid = relation"
                        " WHERE relname = 'log_tile' AND pid <> pg_backend_pid()"
                    )

        store.transact(Stopped(end))
    else:
        store.transact(SequenceLog(bytes(SALT_SIZE), ORIGIN))
    assert [each.reason for each in log(store)] == ["0"]


def test_units_go_on_while_a_sequencer_is_frozen(empty_schema: str, tmp_path: Path) -> None:
    place = StorePlace(empty_schema, tmp_path, vault=VAULT)
    with closing(place.open(make=True)) as store:
        store.transact(SequenceLog(bytes(SALT_SIZE), ORIGIN))
        store.transact(Ask(Insert(row(0, 0))))
        inside, leave = threading.Event(), threading.Event()

        def freeze() -> None:
            inside.set()
            assert leave.wait(60)

        with ThreadPoolExecutor() as threads:
            frozen = threads.submit(store.transact, Stopped(freeze))
            assert inside.wait(60)
            store.transact(Ask(Insert(row(0, 1))))
            assert store.transact(SequenceLog(bytes(SALT_SIZE))) == 0  # at once
            leave.set()
            frozen.result(60)
        assert store.transact(SequenceLog(bytes(SALT_SIZE))) == 1
        assert store.rollbacks.total() == 0
        assert [each.reason for each in log(store)] == ["0", "1"]


def test_rows_of_others_wait_for_less_than_a_second() -> None:
    """Those of a process that died, which wakes nobody; the rest of the second is for the transaction itself."""
    assert LOOK_SECONDS + GATHER_SECONDS <= 0.9


def test_a_checkpoint_is_outside_within_seconds(store: DurableStore, file: Path) -> None:
    with sequencing(store, lambda: VAULT, ORIGIN, file):
        store.transact(boot("first"))
        wait_until(lambda: file.exists() and held(file).size == 2)
        assert file.stat().st_mode & 0o777 == 0o644
    assert held(file).origin == ORIGIN
    assert [each.event for each in log(store)] == ["boot", "log key made"]
    assert store.notes == []


def test_a_changed_log_is_neither_continued_nor_signed(place: StorePlace, store: DurableStore, file: Path) -> None:
    sequencer = Sequencer(store, lambda: VAULT, ORIGIN, file)
    assert sequencer.checkpoint() is None
    for number in range(5):
        store.transact(Ask(Insert(row(0, number))))
    sequencer.sequence()
    note = sequencer.checkpoint()
    sequencer.sequence()
    assert note is not None
    assert file.read_bytes() == str(note).encode()
    newer = sequencer.checkpoint()
    assert sequencer.checkpoint() == newer
    assert held(file).size == 6
    tile = store.transact(Ask(ReadTile(0, 0)))
    assert tile is not None
    changed = evolve(tile, hashes=bytes(32) + tile.hashes[32:])
    store.transact(Ask(Put(changed)))
    store.transact(Ask(Insert(row(0, 5))))
    sequencer.sequence()
    assert [note for note in store.notes if "tile/0/000.p/6 was damaged, and was made again" in note]
    assert sequencer.checkpoint() != newer
    assert held(file).size == 7
    store.transact(Ask(Put(changed)))
    run(
        place, "UPDATE audit SET vm_version = 9 WHERE idx = 0"
    )  # which the mark does not have: it would refuse the store
    # An operator's decision of before the key was made explains nothing.
    store.transact(StoreRestored(1, "root"))
    for act in (sequencer.sequence, sequencer.checkpoint):
        with pytest.raises(LogError):
            act()
    with sequencing(store, lambda: VAULT, ORIGIN, file):
        wait_until(lambda: any("different roots" in note for note in store.notes))
        store.transact(Ask(Insert(row(0, 6))))
        wait_until(lambda: not store.audited.is_set())
    assert len(log(store)) == held(file).size == 7
    assert len([note for note in store.notes if note.startswith("audit log: ")]) == 2, "not one for each size"


def test_a_checkpoint_file_that_cannot_be_is_told_and_the_log_goes_on(store: DurableStore, tmp_path: Path) -> None:
    with sequencing(store, lambda: VAULT, ORIGIN, tmp_path / ("x" * 300)):
        for number in range(2):
            store.transact(Ask(Insert(row(0, number))))
            wait_until(lambda: any("File name too long" in note for note in store.notes))
            wait_until(lambda number=number: [each.reason for each in log(store)][-1:] == [str(number)])  # type: ignore[misc]


def test_rows_are_looked_for_again_after_a_fault_of_the_store(
    place: StorePlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chutes_proto.io.server.sequencer.COVERED_SECONDS", 0.0)
    with closing(evolve(place, mark_file=tmp_path / "store.mark").open()) as store:
        store.keep_mark()
        sequencer = Sequencer(store, lambda: VAULT, ORIGIN, None)
        store.transact(Ask(Insert(row(0, 0))))
        edit(place, "ALTER TABLE audit RENAME TO away")
        with pytest.raises(StoreError):
            sequencer.watch()
        edit(place, "ALTER TABLE away RENAME TO audit")
        edit(place, "UPDATE audit SET idx = -1")
        sequencer.watch()
        assert len([note for note in store.notes if "was committed" in note]) == 1


def test_a_committed_row_that_does_not_get_into_the_log_is_told(
    place: StorePlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark has the newest 64 rows alone."""
    monkeypatch.setattr("chutes_proto.io.server.sequencer.COVERED_SECONDS", 0.0)
    with closing(evolve(place, mark_file=tmp_path / "store.mark").open()) as store:
        store.keep_mark()
        sequencer = Sequencer(store, lambda: VAULT, ORIGIN, None)
        for number in range(3):
            store.transact(Ask(Insert(row(0, number))))
        sequencer.sequence()
        sequencer.watch()
        assert [note for note in store.notes if "was committed" in note] == []
        store.transact(Ask(Insert(row(0, 3))))
        for number in range(4, 70):
            store.transact(Ask(Insert(row(0, number))))
        edit(place, "DELETE FROM audit WHERE reason = '3'")
        edit(place, "UPDATE audit SET reason = 'x' WHERE reason = '4'")
        sequencer.sequence()
        sequencer.watch()
        told = [note for note in store.notes if "was committed, and is not in the log, or is another one" in note]
        assert len(told) == 2
        sequencer.watch()
        assert store.take_acknowledged(0.0) == []


STOPS = {
    "sqlite": ["CREATE TRIGGER stop BEFORE UPDATE OF idx ON audit WHEN NEW.idx >= 0 BEGIN SELECT RAISE(IGNORE); END"],
    "postgresql": [
        "CREATE FUNCTION stopped() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
        "CREATE TRIGGER stop BEFORE UPDATE OF idx ON audit FOR EACH ROW WHEN (NEW.idx >= 0) EXECUTE FUNCTION stopped()",
    ],
}
"""A sequencer that changes rows then changes none, and finds its store busy for ever."""


def test_a_stopped_log_is_told_and_its_rows_are_watched_all_the_same(
    place: StorePlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chutes_proto.io.server.sequencer.COVERED_SECONDS", 0.0)
    with closing(evolve(place, mark_file=tmp_path / "store.mark").open()) as store:
        store.keep_mark()
        before = store.notes
        with sequencing(store, lambda: VAULT, ORIGIN, None):
            for statement in STOPS["sqlite" if place.path is not None else "postgresql"]:
                edit(place, statement)
            for number in range(2):
                store.transact(Ask(Insert(row(0, number))))
            wait_until(lambda: store.log_warning and store.audit_waits > 0)
            assert [*store.notes] == [store.log_warning, *before]
            edit(place, "UPDATE audit SET idx = -1 WHERE reason = '1'")  # the mark would refuse a store without it
            wait_until(lambda: any("was committed, and is not in the log" in note for note in store.notes))
            edit(place, "DROP TRIGGER stop" + ("" if place.path is not None else " ON audit"))
            wait_until(lambda: not store.log_warning and store.audit_waits == 0)
        assert [each.reason for each in log(store)] == ["0"]
        assert len([note for note in store.notes if "was committed" in note]) == 1


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_rows_of_a_type_that_cannot_be_end_no_sequencer(
    place: StorePlace, store: DurableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite takes any value for a column."""
    monkeypatch.setattr("chutes_proto.io.server.sequencer.COVERED_SECONDS", 0.0)
    store.transact(Ask(Insert(row(0, 0))))
    sequencer = Sequencer(store, lambda: VAULT, ORIGIN, None)
    sequencer.sequence()
    with sequencing(store, lambda: VAULT, ORIGIN, None):
        edit(place, "UPDATE log_state SET size = 'x'")
        store.transact(Ask(Insert(row(0, 1))))
        wait_until(lambda: any("log_state is not authentic" in note for note in store.notes))
        wait_until(lambda: store.log_warning)


def test_a_defect_ends_no_sequencer_and_is_told_where(store: DurableStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise TypeError("a text that may be a secret")

    monkeypatch.setattr("chutes_proto.io.server.sequencer.SequenceLog.script", fail)
    with sequencing(store, lambda: VAULT, ORIGIN, None):
        wait_until(lambda: any("a defect, or the database was changed" in note for note in store.notes))
    (told,) = [note for note in store.notes if "a defect" in note]
    assert re.match(r"audit log: TypeError at .*\.py:[0-9]+ < ", told)
    assert "secret" not in told


def edit(place: StorePlace, statement: str) -> None:
    if place.path is not None:
        with closing(sqlite3.connect(place.path)) as connection, connection:
            connection.execute(statement)
    else:
        with psycopg.connect(place.address, autocommit=True) as admin:
            admin.execute(statement.encode())


def test_a_damaged_last_tile_stops_nothing(store: DurableStore, file: Path) -> None:
    sequencer = Sequencer(store, lambda: VAULT, ORIGIN, file)
    for number in range(3):
        store.transact(Ask(Insert(row(0, number))))
    sequencer.sequence()
    assert sequencer.checkpoint() is not None
    tile = store.transact(Ask(ReadTile(0, 0)))
    assert tile is not None
    store.transact(Ask(Put(evolve(tile, hashes=b""))))
    sequencer.sequence()
    assert sequencer.checkpoint() is not None
    assert [note for note in store.notes if "tile/0/000.p/" in note] != []
    file.unlink()
    store.transact(Ask(Put(evolve(tile, hashes=b""))))
    store.transact(Ask(Insert(row(0, 4))))
    with pytest.raises(LogError, match="has 0 bytes"):
        sequencer.sequence()


def test_a_log_that_lost_entries_goes_on_under_a_new_key(tmp_path: Path, file: Path) -> None:
    place = StorePlace("sqlite:keys.db", tmp_path, vault=VAULT)
    backup = tmp_path / "backup.db"
    with closing(place.open()) as store:
        sequencer = Sequencer(store, lambda: VAULT, ORIGIN, file)
        store.transact(boot("first"))
        sequencer.sequence()
        assert sequencer.checkpoint() is not None
        with closing(sqlite3.connect(tmp_path / "keys.db")) as source, closing(sqlite3.connect(backup)) as target:
            source.backup(target)
        store.transact(boot("lost"))
        sequencer.sequence()
        signed = sequencer.checkpoint()
        assert held(file).size == 3
    for end in ("", "-wal", "-shm"):
        (tmp_path / f"keys.db{end}").unlink(missing_ok=True)
    backup.rename(tmp_path / "keys.db")
    with closing(place.open()) as store:
        sequencer = Sequencer(store, lambda: VAULT, ORIGIN, file)
        sequencer.sequence()
        with pytest.raises(LogError, match="a log of 2 entries does not extend one of 3"):
            sequencer.checkpoint()
        store.transact(StoreRestored(1 << 40, "root"))
        sequencer.sequence()
        with pytest.raises(LogError, match="two logs of 3 entries have different roots"):
            sequencer.checkpoint(writes=False)
        assert file.read_bytes() == str(signed).encode(), "who only reads puts nothing aside"
        found = sequencer.checkpoint()
        assert found is not None
        assert signed is not None
        assert held(file).size == 3
        assert found.signatures[0].identifier != signed.signatures[0].identifier
        assert (tmp_path / "store.mark.checkpoint.3").read_bytes() == str(signed).encode()
        assert any("entries some were lost" in note for note in store.notes)


def test_a_decision_of_before_excuses_no_entries_that_were_lost_since(store: DurableStore, file: Path) -> None:
    """An operator decides without a loss, too, as after a clock that was ahead; then the key of the log stays."""
    sequencer = Sequencer(store, lambda: VAULT, ORIGIN, file)
    store.transact(Ask(Insert(row(0, 0))))
    sequencer.sequence()
    assert sequencer.checkpoint() is not None
    store.transact(StoreRestored(decided := int(time.time()) + 1, "a clock was ahead"))
    sequencer.sequence()
    (key,) = store.transact(ReadLogKeys(VAULT))
    later = str(key.sign(Checkpoint(ORIGIN, 99, bytes(32)).text))
    file.write_text(later)
    os.utime(file, (decided + 60, decided + 60))
    for _ in range(2):
        with pytest.raises(LogError, match="does not extend one of 99"):
            sequencer.checkpoint()
    assert file.read_text() == later
    assert store.transact(ReadLogKeys(VAULT)) == (key,)


def test_a_key_that_was_made_since_a_decision_signs_no_less_than_it_has_signed(store: DurableStore, file: Path) -> None:
    """The file is an older one by its time alone, as a restored one is."""
    store.transact(StoreRestored(1, "before the log began"))
    sequencer = Sequencer(store, lambda: VAULT, ORIGIN, file)
    store.transact(Ask(Insert(row(0, 0))))
    sequencer.sequence()
    assert sequencer.checkpoint() is not None
    (key,) = store.transact(ReadLogKeys(VAULT))
    file.write_text(str(key.sign(Checkpoint(ORIGIN, 99, bytes(32)).text)))
    os.utime(file, (0, 0))
    with pytest.raises(LogError, match="does not extend one of 99"):
        sequencer.checkpoint()


def test_all_servers_sign_with_the_key_that_one_made_after_a_loss(store: DurableStore, tmp_path: Path) -> None:
    """Each server has a file of its own; one was stopped meanwhile."""
    one, two, three = servers = [Sequencer(store, lambda: VAULT, ORIGIN, tmp_path / str(number)) for number in range(3)]

    def signed(sequencer: Sequencer) -> Signature:
        store.transact(Ask(Insert(row(0, 0))))
        sequencer.sequence()
        note = sequencer.checkpoint()
        assert note is not None
        return note.signatures[0]

    (old,) = {signed(each).identifier for each in servers}
    # What the first and the third server have seen is lost: a checkpoint of more than there is stands for it.
    key = store.transact(ReadLogKeys(VAULT))[0]
    lost = key.sign(Checkpoint(ORIGIN, 99, bytes(32)).text)
    for number in (0, 2):
        (tmp_path / str(number)).write_bytes(str(lost).encode())
    store.transact(StoreRestored(int(time.time()) + 1, "root"))
    wait_until(lambda: store.transact(Ask(ReadLossDecided())) < int(time.time()))
    new = signed(one).identifier
    assert new != old
    assert signed(two).identifier == new, "the log extends its checkpoint, but the old key has signed what is lost"
    again = Sequencer(store, lambda: VAULT, ORIGIN, tmp_path / "2")
    assert signed(again).identifier == new
    assert signed(three).identifier == new
    assert (tmp_path / "2.99").read_bytes() == str(lost).encode()
    assert len(store.transact(ReadLogKeys(VAULT))) == 2


def test_two_workers_put_one_checkpoint_aside(store: DurableStore, file: Path) -> None:
    other = Sequencer(store, lambda: VAULT, ORIGIN, file)

    class Overtaken(Sequencer):
        def _key(self, lost_at: int = 0) -> Signer | None:
            if lost_at:
                assert other.checkpoint() is not None
            return super()._key(lost_at)

    store.transact(Ask(Insert(row(0, 0))))
    other.sequence()
    assert other.checkpoint() is not None
    lost = store.transact(ReadLogKeys(VAULT))[0].sign(Checkpoint(ORIGIN, 99, bytes(32)).text)
    file.write_bytes(str(lost).encode())
    store.transact(StoreRestored(1 << 40, "root"))
    assert Overtaken(store, lambda: VAULT, ORIGIN, file).checkpoint() is not None
    assert (file.parent / f"{file.name}.99").read_bytes() == str(lost).encode()


def test_a_server_that_ends_leaves_the_rest_of_many_rows_to_others(store: DurableStore) -> None:
    store.transact(Ask(InsertAll((row(0, 0),) * (BATCH + 1))))
    ending = Sequencer(store, lambda: VAULT, ORIGIN, None)
    ending.stop()
    ending.sequence()
    assert len(log(store)) == BATCH
    Sequencer(store, lambda: VAULT, ORIGIN, None).sequence()
    assert len(log(store)) == BATCH + 1


def test_a_file_that_is_not_the_logs_checkpoint_is_left_alone(store: DurableStore, file: Path) -> None:
    store.transact(Ask(Insert(row(0, 0))))
    sequencer = Sequencer(store, lambda: VAULT, ORIGIN, file)
    sequencer.sequence()
    file.write_bytes(b"something else\n")
    with pytest.raises(LogError, match=r"not a note: .*move the file away"):
        sequencer.checkpoint()
    assert file.read_bytes() == b"something else\n"


def test_a_store_that_fails_is_asked_again(tmp_path: Path, file: Path) -> None:
    place = StorePlace("sqlite:keys.db", tmp_path, vault=VAULT)
    with closing(place.open()) as store, sequencing(store, lambda: VAULT, ORIGIN, file):
        moved = (tmp_path / "keys.db").rename(tmp_path / "elsewhere.db")
        store.audited.set()
        with pytest.raises(StoreError):
            store.transact(Ask(ReadTimes()))
        moved.rename(tmp_path / "keys.db")
        store.transact(Ask(Insert(row(0, 0))))
        wait_until(file.exists)
