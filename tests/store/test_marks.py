"""A store that went back is noticed by what a server saw of it, and refused until an operator says what happened."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from chutes_proto.errors import ConfigurationError, StoreAway, StoreError
from chutes_proto.io.files import write_file
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.health import read_health
from chutes_proto.io.server.sequencer import Sequencer
from chutes_proto.io.server.setup import make_setup
from chutes_proto.io.stores import marks
from chutes_proto.io.stores.address import DurableStore, StorePlace
from chutes_proto.io.stores.marks import MarkKeeper, checkpoint_path
from chutes_proto.io.stores.postgres import PostgresStore
from chutes_proto.keys.vault import NONCE_SIZE
from chutes_proto.secret import Secret
from chutes_proto.server import ServerConfig
from chutes_proto.store._custody import Custody
from chutes_proto.store._mark import Entry as Row
from chutes_proto.store._mark import Mark, View, find_loss
from chutes_proto.store._rows import AuditRow, InsertAll, ReadAudit, ReadLog, Vm
from chutes_proto.store._run import Ask
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.testing.store_suite._parts import NOW, VAULT, boot
from chutes_proto.tlog.notes import Checkpoint, Signer
from chutes_proto.units.log import SEED_SIZE, OpenLogKey, SequenceLog
from chutes_proto.units.operator import PurgeAudits, StoreRestored
from tests.postgres import Cluster
from tests.store.test_postgres import ask
from tests.store.test_postgres_standby import STREAMING, make_synchronous
from tests.waiting import wait_until

DAY = 86_400


@contextmanager
def keeping(place: StorePlace) -> Iterator[DurableStore]:
    """A store as a server has it open."""
    with closing(place.open()) as store:
        store.keep_mark()
        yield store


def grant(store: DurableStore, *names: str) -> None:
    for number, name in enumerate(names):
        store.transact(boot(name, now=NOW + number))


def refused(call: Callable[[], object], text: str) -> None:
    for _ in range(2):
        with pytest.raises(StoreError, match=text) as caught:
            call()
        assert type(caught.value) is StoreError


# --- SQLite ---


@pytest.fixture
def place(tmp_path: Path) -> StorePlace:
    return StorePlace("sqlite:keys.db", tmp_path, mark_file=tmp_path / "store.mark", vault=VAULT)


def put_back(path: Path, backup: bytes) -> None:
    """As `.restore` of sqlite3 does, through SQLite, under whoever has the file open."""
    older = path.with_name("older")
    older.write_bytes(backup)
    with closing(sqlite3.connect(older)) as source, closing(sqlite3.connect(path)) as target:
        source.backup(target)


def backup_of(path: Path) -> bytes:
    copy = path.with_name("copy")
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    return copy.read_bytes()


def test_an_older_file_is_refused_by_a_running_and_by_a_starting_server(place: StorePlace) -> None:
    path = place.base / "keys.db"
    with keeping(place) as running:
        assert running.notes == [f"store.mark_file: {place.mark_file} did not exist; a mark of the store begins now"]
        grant(running, "1", "2")
        backup = backup_of(path)
        grant(running, "3", "4")
        put_back(path, backup)
        missing = r"it lacks 2 audit rows from 20\d\d-.*Z to 20\d\d-.*Z \(ids 3 to 4\); it was restored, or"
        refused(lambda: running.transact(boot("5")), missing)
    content = path.read_bytes()
    refused(place.open, missing)
    assert path.read_bytes() == content
    with closing(StorePlace(place.address, place.base, vault=VAULT).open()) as operator:  # as its command opens it
        operator.transact(StoreRestored(NOW + 10, "disk failure"))
    with keeping(place) as again:
        assert again.notes == [note for note in again.notes if note.endswith("; an operator has decided to go on")]
        again.transact(boot("6", now=NOW + 100))
    with keeping(place) as once_more:
        assert once_more.notes == []


def test_a_loss_of_more_than_a_mark_has_is_not_told_as_its_whole(place: StorePlace) -> None:
    """The times say which VMs to look at, so the operator has to know that there may be more."""
    with keeping(place) as running:
        grant(running, "1", "2")
        backup = backup_of(place.base / "keys.db")
        grant(running, *(str(number) for number in range(3, 100)))
        put_back(place.base / "keys.db", backup)
        said = r"it lacks 64 audit rows from \S+ to \S+ \(ids 36 to 99\), the oldest of this mark, so it may lack"
        older = r"others before them, too; the newest before them that it has is 2 of 20\S+Z;"
        refused(lambda: running.transact(boot("x")), f"{said} {older}")


def test_the_file_is_written_once_a_second_and_by_no_request(
    place: StorePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[threading.Thread, float]] = []

    def write(path: Path, data: bytes, mode: int) -> None:
        written.append((threading.current_thread(), time.monotonic()))
        write_file(path, data, mode=mode)

    with keeping(place) as running:
        monkeypatch.setattr(marks, "write_file", write)
        for number in range(3):
            before = len(written)
            grant(running, f"{number} first", f"{number} second", f"{number} third")
            _ = wait_until(lambda: len(written) > before)  # noqa: B023
    assert threading.current_thread() not in {thread for thread, _ in written}
    assert len({thread for thread, _ in written}) == 1
    times = [at for _, at in written][:3]  # one more may follow at the end
    assert all(later - earlier > 0.9 * marks.LOOK_SECONDS for earlier, later in pairwise(times))


def test_an_older_decision_does_not_excuse_a_new_loss(place: StorePlace) -> None:
    with keeping(place) as running:
        running.transact(StoreRestored(NOW - 100))
        backup = backup_of(place.base / "keys.db")
        grant(running, "1")
        put_back(place.base / "keys.db", backup)
        refused(lambda: running.transact(boot("2")), "it lacks audit row 2 of")


def test_another_row_in_place_of_one_that_was_seen_is_a_loss(place: StorePlace) -> None:
    """An old primary that goes on by itself gives the same numbers again."""
    with keeping(place) as running:
        grant(running, "1")
        backup = backup_of(place.base / "keys.db")
        grant(running, "2")
    put_back(place.base / "keys.db", backup)
    with closing(StorePlace(place.address, place.base, vault=VAULT).open()) as elsewhere:
        grant(elsewhere, "3", "4", "5")
    refused(place.open, "it lacks audit row 2 of")


@pytest.mark.parametrize("column", ["at", "id"])
def test_a_forged_row_is_in_no_mark_that_could_not_be_read_again(place: StorePlace, column: str) -> None:
    """Who writes the database would make every server refuse its own mark, and be told to move it away."""
    with keeping(place) as running:
        grant(running, "1", "2")
        running.transact(Ask(InsertAll((AuditRow(NOW, "vm", "forged", "granted"),))))
    with closing(sqlite3.connect(place.base / "keys.db", isolation_level=None)) as attacker:
        _ = attacker.execute(f"UPDATE audit SET {column} = -5 WHERE event = 'forged'")
    assert place.mark_file is not None
    place.mark_file.unlink()
    with keeping(place) as running:
        grant(running, "3")
    with keeping(place) as again:
        grant(again, "4")
    assert len(Mark.from_bytes(place.mark_file.read_bytes()).entries) == 4


@pytest.mark.parametrize("number", ["-5", "'another'", "1.5", "x'00'"])
def test_a_forged_number_of_a_store_is_in_no_mark_that_could_not_be_read_again(place: StorePlace, number: str) -> None:
    """Who moves such a file away forgets all that it has seen."""
    evolve(place, mark_file=None).open(make=True).close()
    with closing(sqlite3.connect(place.base / "keys.db")) as file, file:
        _ = file.execute(f"UPDATE fact SET value = {number} WHERE name = 'store_id'")
    for label in ("first", "second"):
        with closing(place.open()) as store:
            store.keep_mark()
            store.transact(boot(label))
            assert "somebody changed the number of the store" in store.mark_warning
    assert place.mark_file is not None
    assert not place.mark_file.exists()


def test_a_purge_of_old_rows_is_no_loss(place: StorePlace) -> None:
    with keeping(place) as running:
        running.transact(Ask(InsertAll((AuditRow(NOW, "vm", "old", "granted"),) * 300)))
        grant(running, "1")
    with closing(StorePlace(place.address, place.base, vault=VAULT).open()) as operator:
        operator.transact(SequenceLog(bytes(16 * 400)))
        purge = PurgeAudits(NOW + 400 * DAY, NOW + 2, "old", carry_out=True)
        assert operator.transact(purge).count == 256
        assert [row.idx for row in operator.transact(Ask(ReadLog(0, 1)))] == [256]
    with keeping(place):
        pass
    with closing(StorePlace(place.address, place.base, vault=VAULT).open()) as operator:
        assert operator.transact(SequenceLog(bytes(16))) == 1
    delete(place, 302)  # a younger one is gone, and an older one is left
    refused(place.open, "it lacks audit row 302 of")


def test_a_log_that_was_rewritten_is_refused_by_the_checkpoint_beside_the_mark(place: StorePlace) -> None:
    """The rows that the mark has are all there; older ones, their entries and tiles are others."""
    path = place.base / "keys.db"
    file = checkpoint_path(place.mark_file)
    assert file is not None

    def tile_with(change: Callable[[bytes], bytes]) -> None:
        with closing(sqlite3.connect(path)) as connection, connection:
            (hashes,) = connection.execute("SELECT hashes FROM log_tile WHERE level = 0 AND tile = 1").fetchone()
            connection.execute("UPDATE log_tile SET hashes = ? WHERE level = 0 AND tile = 1", (change(hashes),))

    with keeping(place) as running:
        sequencer = Sequencer(
            running, lambda: VAULT, "o", file, lambda note: running.hold_checkpoint(Checkpoint.of(note))
        )
        running.transact(Ask(InsertAll((AuditRow(NOW, "vm", "old", "granted"),) * 300)))
        sequencer.sequence()
        assert sequencer.checkpoint() is not None
        running.transact(boot("1"))
        tile_with(lambda hashes: bytes(32) + hashes[32:])
        rewritten = (
            "its audit log was rewritten: it is not as the checkpoint of 300 entries has it; find what was changed"
        )
        wait_until(lambda: MarkKeeper.is_due(running._marks))  # type: ignore[attr-defined]
        refused(lambda: running.transact(boot("2")), rewritten)
    refused(place.open, rewritten)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE log_state SET size = 299")
    refused(place.open, "its audit log has 299 entries, and a checkpoint of 300 was signed")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE log_state SET size = 300")
    tile_with(lambda hashes: hashes[:-32])
    with keeping(place) as again:
        assert again.notes == [], "a damaged tile is the sequencer's"
    tile_with(lambda hashes: hashes + bytes(32))
    with closing(StorePlace(place.address, place.base, vault=VAULT).open()) as operator:
        operator.transact(StoreRestored(int(time.time()) + 1, "tampered"))
    with keeping(place) as again:
        assert any("rewritten" in note and "an operator has decided to go on" in note for note in again.notes)
        again.transact(Ask(InsertAll((AuditRow(NOW, "vm", "new", "granted"),))))
    file.write_bytes(b"not a checkpoint")
    with keeping(place):
        pass


def test_a_worker_that_starts_while_another_signs_the_first_checkpoint_misses_it_later_alone(
    place: StorePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "FIRST_CHECKPOINT_SECONDS", 86_400)  # however slow this machine is
    place = evolve(place, vault=VAULT)
    with keeping(place) as first:
        grant(first, "1")
        first.transact(SequenceLog(bytes(16), "o"))
        assert first.transact(OpenLogKey(int(time.time()), VAULT, Secret(bytes(SEED_SIZE + NONCE_SIZE))))
        with keeping(place) as second:
            assert second.notes == []
            monkeypatch.setattr(MarkKeeper, "is_due", lambda _: True)
            grant(second, "2")
            assert second.notes == []
            monkeypatch.setattr(marks, "FIRST_CHECKPOINT_SECONDS", 0)
            grant(second, "3", "4")
            (told,) = second.notes
            assert "is missing beside the mark" in told
    with closing(sqlite3.connect(place.base / "keys.db")) as connection, connection:
        connection.execute("UPDATE keyring SET created_at = 'never' WHERE kind = 'audit'")
    with keeping(place) as again:
        assert "is missing beside the mark" in again.notes[0]


def test_a_checkpoint_that_is_missing_beside_a_mark_or_not_signed_is_told(
    place: StorePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attacker who writes the files of a server removes the checkpoint, and has a log set back below it."""
    place = evolve(place, vault=VAULT)
    file = checkpoint_path(place.mark_file)
    assert file is not None
    assert place.mark_file is not None
    with keeping(place) as running:
        grant(running, "1")
        sequencer = Sequencer(running, lambda: VAULT, "o", file)
        sequencer.sequence()
        note = sequencer.checkpoint()
        assert note is not None
    with keeping(place) as again:
        assert again.notes == []
    other = Signer("o", Secret(bytes(32))).sign(note.text)
    for content in (str(other).encode(), b"not a checkpoint"):
        file.write_bytes(content)
        with keeping(place) as again:
            (told,) = again.notes
            assert told.startswith(f"audit log: {file}: ")
            assert told.endswith("; if the log is right, move the file away")
    file.unlink()
    file.mkdir()
    with keeping(place) as again:
        (told,) = again.notes
        assert (told.startswith(f"audit log: {file}: "), told.count(str(file))) == (True, 1)
    file.rmdir()
    file.write_bytes(b"not a checkpoint")
    whole = backup_of(place.base / "keys.db")
    for damage in ("wrapped = 5", "wrapped = x'00'", "kek_id = 'unknown'"):
        with closing(sqlite3.connect(place.base / "keys.db")) as connection, connection:
            connection.execute(f"UPDATE keyring SET {damage} WHERE kind = 'audit'")
        with keeping(place) as again:
            assert again.notes == [], "the sequencer tells of a key that does not open"
    put_back(place.base / "keys.db", whole)
    file.unlink()
    monkeypatch.setattr(marks, "FIRST_CHECKPOINT_SECONDS", 0)  # the key of the log is not as old yet
    mark = Mark.from_bytes(place.mark_file.read_bytes())
    place.mark_file.write_bytes(evolve(mark, entries=(), head=0, head_mac="").to_bytes())
    with keeping(place) as again:
        (told,) = again.notes
        assert told.startswith(f"audit log: {file} is missing beside the mark")
    place.mark_file.unlink()
    with keeping(place) as again:
        (told,) = again.notes
        assert "did not exist; a mark of the store begins now" in told


def test_a_purge_of_rows_that_were_committed_in_another_order_is_no_loss(place: StorePlace) -> None:
    """As in PostgreSQL, where the row with the lower number may be committed last, and so come later in the log."""
    with keeping(place) as running:
        running.transact(Ask(InsertAll((AuditRow(NOW, "vm", "old", "granted"),) * 300)))
        grant(running, "1")
    with closing(StorePlace(place.address, place.base, vault=VAULT).open()) as operator:
        operator.transact(SequenceLog(bytes(16 * 400)))
        with closing(sqlite3.connect(place.base / "keys.db")) as connection, connection:
            for number, index in ((256, None), (257, 255), (256, 256)):
                connection.execute("UPDATE audit SET idx = ? WHERE id = ?", (index, number))
        assert operator.transact(PurgeAudits(NOW + 400 * DAY, NOW + 2, "old", carry_out=True)).count == 256
    with keeping(place):
        pass


def delete(place: StorePlace, number: int) -> None:
    with closing(sqlite3.connect(place.base / "keys.db")) as connection, connection:
        connection.execute("DELETE FROM audit WHERE id = ?", (number,))


@pytest.mark.parametrize("damage", [b"", b"{}", b"\0" * 99, b'{"form": "chutes-proto mark 1"}', b"cut", b"more"])
def test_a_file_that_is_not_a_whole_mark_is_refused_and_left_alone(place: StorePlace, damage: bytes) -> None:
    with keeping(place) as store:
        grant(store, "1")
    assert place.mark_file is not None
    whole = place.mark_file.read_bytes()
    content = {b"cut": whole[:-20], b"more": whole.replace(b'"store"', b'"stork"')}.get(damage, damage)
    place.mark_file.write_bytes(content)
    refused(place.open, "mark_file .*: not a mark of a store, or not all of it; if the store is right, move the file")
    assert place.mark_file.read_bytes() == content
    assert Mark.from_bytes(whole).to_bytes() == whole
    os.truncate(place.mark_file, 1 << 30)
    refused(place.open, f"mark_file {place.mark_file}: has more than [0-9]+ bytes, .*; if the store is right, move")


@contextmanager
def unreadable(file: Path) -> Generator[None]:
    """A file of another user, as after a copy to another machine by root."""
    file.chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may read everything
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_mark_of_another_user_is_not_to_be_moved_away(place: StorePlace) -> None:
    """It is whole, and only it knows what it saw."""
    with keeping(place) as running:
        grant(running, "1")
    assert place.mark_file is not None
    with unreadable(place.mark_file):
        refused(place.open, r"Permission denied.*; give it, and its folder, to the user of the server$")


@pytest.mark.parametrize(
    "changed",
    [{"timeline": -1}, {"epoch": "1"}, {"head": 1.5}, {"decided_at": 1 << 63}, {"entries": (Row(True, NOW, "a"),)}],
)
def test_the_numbers_of_a_mark_are_numbers_of_a_store(changed: dict[str, Any]) -> None:
    mark = Mark(7, 0, (Row(5, NOW, "a"),), epoch=1)
    assert Mark.from_bytes(mark.to_bytes()) == mark
    with pytest.raises(ConfigurationError, match="not a mark of a store"):
        Mark.from_bytes(evolve(mark, **changed).to_bytes())


def test_a_file_that_cannot_be_looked_for_is_refused(place: StorePlace) -> None:
    refused(evolve(place, mark_file=place.base / ("long" * 99)).open, "mark_file .*: .*File name too long")
    loop = place.base / "loop"
    loop.symlink_to(loop)
    refused(evolve(place, mark_file=loop).open, "mark_file .*: .*a loop of links")


def test_a_file_that_cannot_be_written_is_noted_until_it_can(tmp_path: Path) -> None:
    write_server(tmp_path, SimulatedPlatform(bytes(32)), int(time.time()))
    setup = make_setup(ServerConfig.load(tmp_path / "server.toml"))
    folder, away = tmp_path / "state", tmp_path / "away"
    folder.mkdir()
    with keeping(StorePlace("sqlite:marked.db", tmp_path, mark_file=folder / "store.mark", vault=VAULT)) as running:

        def check() -> tuple[str, str]:
            return next((each.state, each.detail) for each in read_health(setup, running).findings)

        _ = folder.rename(away)  # as a disk that is full: root may write what is read-only
        grant(running, "1")
        _ = wait_until(lambda: check()[0] == "note")
        assert check()[1].startswith(f"store.mark_file: {folder}/store.mark: cannot be written")
        assert check()[1] in running.notes
        _ = away.rename(folder)
        _ = wait_until(lambda: check()[0] == "ok")
        assert not [note for note in running.notes if "written" in note]


def test_the_mark_of_another_store_is_refused_and_left_alone(place: StorePlace) -> None:
    with keeping(place) as store:
        grant(store, "1")
    assert place.mark_file is not None
    content = place.mark_file.read_bytes()
    other = evolve(place, address="sqlite:other.db")
    assert other.path is not None
    for look in (other.is_made, other.open):
        refused(look, "it does not exist, so it is not the store of this mark; the mark is in .*store.mark")
    assert not other.path.exists()
    other.path.touch()
    refused(other.open, "it is empty, so it is not the store of this mark; .*; name the right store, or restore its")
    assert other.path.read_bytes() == b""
    with keeping(evolve(other, mark_file=None)):
        pass
    refused(other.open, "it is not the store of this mark; the mark is in .*store.mark")
    assert place.mark_file.read_bytes() == content


# --- PostgreSQL ---


def test_an_empty_database_is_not_that_of_a_mark(place: StorePlace, empty_schema: str) -> None:
    with keeping(place) as store:
        grant(store, "1")
    empty = evolve(place, address=empty_schema)
    refused(empty.open, "it is empty, so it is not the store of this mark; .*; name the right store, or restore its")
    refused(evolve(empty, mark_file=None).open, "it is empty, as only a new one may be; run `chutes-proto store init`")


@pytest.fixture
def clusters(postgres_programs: Path) -> Iterator[tuple[Cluster, Cluster]]:
    """A primary, and its standby, which is asynchronous."""
    with ExitStack() as stack:
        primary = Cluster(postgres_programs, None, STREAMING)
        stack.callback(primary.remove)
        PostgresStore(primary.url(), make=True, vault=VAULT).close()
        standby = Cluster(postgres_programs, primary, STREAMING)
        stack.callback(standby.remove)
        yield primary, standby


def test_a_fail_over_that_lost_grants_and_an_old_primary_are_refused(
    clusters: tuple[Cluster, Cluster], tmp_path: Path
) -> None:
    primary, standby = clusters
    both = primary.url(host=f"{primary.folder},{standby.folder}")
    place = StorePlace(both, tmp_path, mark_file=tmp_path / "store.mark", vault=VAULT)
    with keeping(place) as store:
        assert isinstance(store, PostgresStore)
        grant(store, "1", "2")
        _ = wait_until(lambda: ask(standby.url(), "SELECT count(*) FROM audit") == [(2,)])
        standby.stop()
        grant(store, "3")  # acknowledged, and the standby never hears of it
        primary.stop(signal.SIGQUIT)
        standby.start()
        ask(standby.url(), "SELECT pg_promote()")
        lost = "it lacks audit row 3 of .*; the mark in .* is of timeline 1; mend the fail-over, or go on without them"
        _ = wait_until(lambda: is_refused(store, "it lacks audit row 3"))
        refused(lambda: store.transact(boot("4")), lost)
    refused(place.open, lost)
    with closing(PostgresStore(standby.url(), vault=VAULT)) as operator:
        operator.transact(StoreRestored(NOW + 5, "the standby was behind"))
    with keeping(place) as store:
        assert Mark.from_bytes(written(place)).timeline == 2
        # The old primary comes back, and is writable; the new one is away.
        standby.stop()
        primary.start()
        _ = wait_until(lambda: is_refused(store, "it is on timeline 1, and timeline 2 was seen: an old primary"))
    refused(place.open, "an old primary and it lacks|an old primary; it was restored")
    with closing(PostgresStore(primary.url(), vault=VAULT)) as old:
        assert len(old.transact(Ask(ReadAudit(0, 9)))) == 3  # nothing was added to it
    primary.stop()
    standby.start()
    with keeping(place):
        pass


def test_an_old_primary_is_refused_while_others_compare_the_new_one(
    clusters: tuple[Cluster, Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a connection that was compared before the fail-over, whichever other one was refused meanwhile."""
    primary, standby = clusters
    with closing(PostgresStore(primary.url(host=f"{standby.folder},{primary.folder}"), vault=VAULT)) as store:
        idle, marks = store._pool.idle, store._marks
        with store._looked_at(), store._looked_at():
            pass
        refused_first, compared_before = idle
        idle.clear()
        ask(standby.url(), "SELECT pg_promote()")
        grant(store, "1")
        _ = wait_until(marks.is_due)
        compare = marks.compare

        def with_others(ask: Callable[[str], list[tuple[object, ...]]], timeline: int) -> None:
            monkeypatch.setattr(marks, "compare", compare)
            idle[:] = [refused_first]
            with pytest.raises(StoreError, match="an old primary"):
                grant(store, "2")
            compare(ask, timeline)
            idle[:] = [compared_before]
            with pytest.raises(StoreError, match="an old primary"):
                grant(store, "3")

        monkeypatch.setattr(marks, "compare", with_others)
        grant(store, "4")
        refused_first.close()
    assert ask(primary.url(), "SELECT * FROM audit") == []


def test_a_standby_behind_a_pooler_is_away_as_one_that_is_connected_to(clusters: tuple[Cluster, Cluster]) -> None:
    primary, standby = clusters
    url = standby.url(target_session_attrs="any")
    with pytest.raises(StoreAway, match="it leads to a standby"):
        PostgresStore(url, vault=VAULT)
    with closing(PostgresStore(primary.url(), vault=VAULT)) as store:
        led_elsewhere = type(store._pool.idle[0]).connect(url, autocommit=True)
        store._pool.idle.append(led_elsewhere)
        with pytest.raises(StoreAway, match="it leads to a standby"):
            grant(store, "1")
        store._pool.idle.remove(led_elsewhere)
        led_elsewhere.close()
        grant(store, "1")


def is_refused(store: DurableStore, text: str) -> bool:
    try:
        store.transact(Ask(ReadAudit(0, 1)))
    except StoreError as exc:
        return text in str(exc)
    return False


def written(place: StorePlace) -> bytes:
    assert place.mark_file is not None
    return place.mark_file.read_bytes()


def test_standbys_of_which_none_is_synchronous_are_told_or_refused(
    clusters: tuple[Cluster, Cluster], tmp_path: Path
) -> None:
    primary, _ = clusters
    write_server(tmp_path, SimulatedPlatform(bytes(32)), int(time.time()))
    setup = make_setup(ServerConfig.load(tmp_path / "server.toml"))

    def check(store: PostgresStore) -> tuple[str, str]:
        """What a health check, and so the metrics, say of the store."""
        return next((each.state, each.detail) for each in read_health(setup, store).findings if each.what == "store")

    url = primary.url()
    _ = wait_until(lambda: ask(url, "SELECT 1 FROM pg_stat_replication WHERE state = 'streaming'"))
    with closing(PostgresStore(url, vault=VAULT)) as store:
        assert store.replication.streaming == 1
        (note,) = store.notes
        assert note.startswith("store: 1 standbys stream and none is synchronous: a fail-over")
        assert check(store) == ("note", note.removeprefix("store: "))
    refused(
        lambda: PostgresStore(url, require_synchronous=True, vault=VAULT), "synchronous_standby_names is empty there"
    )
    make_synchronous(url)
    with closing(PostgresStore(url, require_synchronous=True, vault=VAULT)) as store:
        assert store.notes == []
        assert check(store)[0] == "ok"
        grant(store, "1")
        ask(url, "ALTER SYSTEM RESET synchronous_standby_names")
        ask(url, "SELECT pg_reload_conf()")
        _ = wait_until(lambda: is_refused(store, "synchronous_standby_names is empty there"))


# --- the comparison ---


def test_the_mark_of_a_store_alone_lets_no_other_one_in(place: StorePlace) -> None:
    """Before it is compared, and whoever has no key yet."""
    with keeping(evolve(place, vault=VAULT)) as store:
        grant(store, "1")
    custody = Custody("keys")
    _ = MarkKeeper("keys", place.mark_file, custody)
    refused(
        lambda: custody.session(None, lambda _: ()), "it says that its rows are of epoch 0, and they were of epoch 1"
    )


def test_a_slow_look_at_an_old_primary_does_not_take_the_mark_back(place: StorePlace) -> None:
    with closing(place.open()) as store:
        grant(store, "1")
    with closing(sqlite3.connect(place.base / "keys.db")) as database:
        marks = MarkKeeper("keys", None, Custody("keys"))

        def rows(text: str) -> list[tuple[object, ...]]:
            return database.execute(text).fetchall()

        def rows_after_a_fail_over(text: str) -> list[tuple[object, ...]]:
            marks.compare(rows, 2)
            return rows(text)

        marks.compare(rows, 1)
        marks.compare(rows_after_a_fail_over, 1)
        refused(lambda: marks.compare(rows, 1), "an old primary")


def test_an_old_row_is_not_missed_where_no_older_one_is_left() -> None:
    mark = Mark(7, 0, (Row(5, NOW, "a"), Row(6, NOW, "b")))
    purged = View(7, 0, 0, (Row(9, NOW + 2 * DAY, "c"),), has_older=False)
    assert find_loss(mark, purged, NOW + 2 * DAY) is None
    for view, now in (
        (purged, NOW + DAY),  # too young for a purge
        (evolve(purged, has_older=True), NOW + 2 * DAY),
        (evolve(purged, entries=()), NOW + 2 * DAY),  # a purge adds a row
    ):
        loss = find_loss(mark, view, now)
        assert loss is not None
        assert not loss.is_accepted
        assert find_loss(mark, evolve(view, decided_at=NOW), now) == evolve(loss, is_accepted=True)


def test_a_row_of_a_clock_that_was_ahead_does_not_outlast_a_decision() -> None:
    ahead = Row(6, NOW + 9 * DAY, "b")
    view = View(7, 0, NOW, (ahead,), has_older=True)
    loss = find_loss(Mark(7, 0, (Row(5, NOW, "a"), ahead)), view, NOW)
    assert loss is not None
    assert loss.is_accepted


def test_a_decision_counts_for_rows_that_a_clock_has_dated_into_the_future() -> None:
    ahead = Mark(7, 0, (Row(5, NOW, "a"), Row(6, NOW + 9 * DAY, "b")), decided_at=NOW - DAY)
    older = View(7, 0, NOW - DAY, (Row(5, NOW, "a"),), has_older=True)
    for decided_at, now, is_accepted in (
        (NOW + 1, NOW + 1, True),
        (NOW - DAY, NOW + 1, False),  # it was seen with the rows
        (NOW + 1, NOW + 10 * DAY, False),  # the clock was right
    ):
        loss = find_loss(ahead, evolve(older, decided_at=decided_at), now)
        assert loss is not None
        assert loss.is_accepted is is_accepted


def test_an_operator_decides_on_what_a_clock_that_was_ahead_has_dated(place: StorePlace) -> None:
    """Rows, key of the log and checkpoint have a time that is to come; a decision by the right clock counts."""
    place = evolve(place, vault=VAULT)
    file = checkpoint_path(place.mark_file)
    assert file is not None
    ahead = int(time.time()) + DAY
    with keeping(place) as running:
        grant(running, "1")
        running.transact(SequenceLog(bytes(16), "o"))
        assert running.transact(OpenLogKey(ahead, VAULT, Secret(bytes(SEED_SIZE + NONCE_SIZE))))
        backup = backup_of(place.base / "keys.db")
        running.transact(boot("2", now=ahead))
        sequencer = Sequencer(running, lambda: VAULT, "o", file)
        sequencer.sequence()
        assert sequencer.checkpoint() is not None
    os.utime(file, (ahead, ahead))
    put_back(place.base / "keys.db", backup)
    refused(place.open, "it lacks audit row")
    with closing(evolve(place, mark_file=None).open()) as operator:
        operator.transact(StoreRestored(int(time.time()), "a clock was ahead"))
    for _ in range(2):
        with keeping(place) as again:
            again.transact(Ask(InsertAll((AuditRow(NOW, "vm", "new", "granted"),))))
            sequencer = Sequencer(again, lambda: VAULT, "o", file)
            sequencer.sequence()
            assert sequencer.checkpoint() is not None


def test_of_very_many_findings_the_newest_are_kept() -> None:
    marks = MarkKeeper("keys", None, Custody("keys"))
    for number in range(1100):
        marks.add_note(f"row {number}")
    assert (marks.notes[0], marks.notes[-1], len(marks.notes)) == ("row 100", "row 1099", 1000)


def test_a_row_has_the_digest_that_files_of_marks_have_already() -> None:
    granted = AuditRow(NOW, "vm", "boot", "granted", "first claim", Vm("5Gé", "vm-1"), "b1", "r1", keys="root/1")
    assert Row.of(7, granted) == (7, NOW, "cc32236a7f78923a7b07cd191b47e3b2")
    assert Row.of(8, AuditRow(NOW, "operator", "store sealed", "done")) == (8, NOW, "ef4d844a7876bc43b7240e49e02d1ebe")
    changed = Row.of(8, AuditRow(float(NOW), "operator", "store sealed", "done"))  # type: ignore[arg-type]
    assert changed.digest != "ef4d844a7876bc43b7240e49e02d1ebe"
