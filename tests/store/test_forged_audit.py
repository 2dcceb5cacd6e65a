"""Audit rows that a writer of the database makes, or changes, before they have a place in the log: none is an entry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from attrs import evolve

from chutes_proto.errors import LogError, RowNotAuthentic, StoreError
from chutes_proto.io.log_files import check_stored, purged_below
from chutes_proto.io.server.scrub import scrub_log
from chutes_proto.io.server.sequencer import Sequencer, sequencing
from chutes_proto.io.stores.address import DurableStore, StorePlace
from chutes_proto.io.stores.sealing import find_faults
from chutes_proto.store._rows import (
    AuditRow,
    AuditWanted,
    Insert,
    InsertAll,
    LogStateRow,
    LogTileRow,
    PurgeAudit,
    Read,
    ReadAudit,
    ReadLog,
    ReadTile,
    Scan,
)
from chutes_proto.store._run import Ask
from chutes_proto.testing.store_suite._parts import NOW, VAULT
from chutes_proto.tlog.merkle import leaf_hash, root_hash, verify_inclusion
from chutes_proto.tlog.notes import Checkpoint, Note
from chutes_proto.tlog.tiles import reader
from chutes_proto.units.contents import Fill, pages
from chutes_proto.units.log import SALT_SIZE, ProveEntry, ReadCheckpoint, SequenceLog, leaf_of, purged_text
from chutes_proto.units.operator import PurgeAudits, Purged
from tests.store.memory import SealedStore
from tests.store.test_custody import A, granted, run
from tests.waiting import wait_until

in_a_file = pytest.mark.parametrize("place", ["sqlite"], indirect=True)

COLUMNS = "at, actor, event, decision, reason, keys, peer_address"


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> StorePlace:
    address: str = "sqlite:keys.db" if request.param == "sqlite" else request.getfixturevalue("empty_schema")
    return StorePlace(address, tmp_path, vault=VAULT)


@pytest.fixture
def store(place: StorePlace) -> Iterator[DurableStore]:
    with closing(place.open(make=True)) as store:
        yield store


def row(number: int) -> AuditRow:
    return AuditRow(NOW, "operator", "event", "done", str(number))


def forge(place: StorePlace, event: str = "boot", keys: str = "", **more: object) -> None:
    """Insert a row as a database writer does."""
    names = "".join(f", {name}" for name in more)
    values = "".join(f", {value}" for value in more.values())
    run(
        place,
        f"INSERT INTO audit ({COLUMNS}{names}) VALUES ({NOW}, 'operator', '{event}', 'done', '', '{keys}', ''{values})",
    )


def literal(place: StorePlace, value: bytes) -> str:
    return f"X'{value.hex()}'" if place.path else f"'\\x{value.hex()}'"


def sequenced(store: DurableStore) -> list[str]:
    """The events of the log after a server has sequenced; the one that tells of forged rows waits for the next time."""
    sequencer = Sequencer(store, lambda: VAULT, "keys.example/audit", None)
    sequencer.sequence()
    sequencer.sequence()
    found = store.transact(Ask(ReadLog(0, 1000)))
    assert [each.idx for each in found] == [*range(len(found))]
    return [each.event for each in found]


def found_by_verify(store: DurableStore) -> list[str]:
    size = len(store.transact(Ask(ReadLog(0, 1000))))
    return [str(each) for each in check_stored(store, size, [], lambda *_: None).findings]


def test_a_forged_row_is_no_entry_and_an_entry_tells_of_it(place: StorePlace, store: DurableStore) -> None:
    store.transact(Ask(Insert(row(0))))
    forge(place)
    forge(place, mac="x'01'" if place.path else r"'\x01'")
    store.transact(Ask(Insert(row(1))))
    assert [(fault.table, fault.why.split()[1]) for fault in find_faults(store)] == [("audit", "has"), ("audit", "MAC")]
    shown = store.transact(Ask(ReadAudit(0, 9)))
    forged = [number for number, each in shown if each.is_forged]
    assert len(forged) == 2
    assert sequenced(store) == ["event", "event", "rows forged"]
    (told,) = [each for each in store.transact(Ask(ReadLog(0, 9))) if each.event == "rows forged"]
    assert told.keys == f"audit rows {forged[0]}, {forged[1]}"
    assert [number for number, each in store.transact(Ask(ReadAudit(0, 9))) if each.is_forged] == forged, "they stay"
    assert store.custody.faults == {"audit": 2}
    assert [note for note in store.notes if f"the rows {forged[0]}, {forged[1]} were forged" in note]
    assert found_by_verify(store) == [
        "entry 2: it tells of audit rows that were forged, or changed before they got a place"
    ]
    assert [finding for _, finding in scrub_log(store) if finding] == [], "the log itself is whole"
    assert not list(find_faults(store))


CHANGES = ("reason = 'x'", "mac = NULL", "vm_version = 7", "evidence = '{}'", "at = at + 1", "decision = 'granted'")


def test_a_row_that_is_changed_before_its_turn_is_no_entry(place: StorePlace) -> None:
    with closing(place.open(make=True)) as store:
        store.transact(granted("first", A, 0))
        store.transact(Ask(Insert(row(0))))
        for number, _ in enumerate(CHANGES):
            store.transact(Ask(Insert(evolve(row(number), event="changed"))))
    run(place, "UPDATE audit SET vm_version = 7 WHERE event = 'boot'")
    for number, change in enumerate(CHANGES):
        run(place, f"UPDATE audit SET {change} WHERE event = 'changed' AND reason = '{number}'")
    with closing(place.open()) as store:  # the process that wrote them would notice by its mark, too
        assert sequenced(store) == ["event", "rows forged"]
        assert store.custody.faults == {"audit": 1 + len(CHANGES)}
        store.transact(granted("second", A, 100))  # the version that was forged is not the log's
        assert sequenced(store) == ["event", "rows forged", "boot"]


def test_a_forged_purge_excuses_nothing(place: StorePlace) -> None:
    with closing(place.open(make=True)) as store:
        store.transact(Ask(InsertAll(tuple(map(row, range(300))))))
        assert len(sequenced(store)) == 300
    text = purged_text(256, 256)
    forge(place, "audit purged", text)
    run(place, "DELETE FROM audit WHERE idx < 256")
    run(place, "DELETE FROM log_tile WHERE level = 0 AND tile = 0")
    with closing(place.open()) as store:
        for _ in range(2):  # before it is set apart, and after
            assert purged_below(store) == 0
            assert [finding for _, finding in scrub_log(store) if finding]
            report = check_stored(store, 300, [], lambda *_: None)
            assert "no entry says that it was purged" in report.findings[0].what
            store.transact(SequenceLog(bytes(SALT_SIZE)))
        forge(place, "audit purged", text, idx=5000)
        assert purged_below(store) == 0


@in_a_file
def test_a_purge_counts_at_once_and_is_not_hidden_by_forged_ones(place: StorePlace, store: DurableStore) -> None:
    store.transact(Ask(InsertAll(tuple(map(row, range(300))))))
    assert len(sequenced(store)) == 300
    assert store.transact(PurgeAudits(NOW + 10, NOW + 1, "old", carry_out=True)).count == 256
    for _ in range(2):
        assert purged_below(store) == 256
        forge(place, "audit purged", purged_text(0, 0))
        assert purged_below(store) == 256
        assert [finding for _, finding in scrub_log(store) if finding] == []
        Sequencer(store, lambda: VAULT, "keys.example/audit", None).sequence()


def test_a_row_with_a_place_beyond_the_log_does_not_stop_it(place: StorePlace, store: DurableStore) -> None:
    store.transact(Ask(Insert(row(0))))
    assert sequenced(store) == ["event"]
    forge(place, idx=1)
    forge(place, idx=1 << 40)
    assert [fault.why for fault in find_faults(store)] == ["it has a place that the log has not given yet"] * 2
    store.transact(Ask(Insert(row(1))))
    assert sequenced(store) == ["event", "event", "rows forged"]
    assert store.custody.faults == {"audit": 2}
    assert not list(find_faults(store))


@in_a_file
def test_a_purge_takes_old_forged_rows_and_leaves_those_that_a_mark_may_know(
    place: StorePlace, store: DurableStore
) -> None:
    forge(place)
    forge(place, "later", mac="NULL")
    run(place, f"UPDATE audit SET at = {NOW + 100} WHERE event = 'later'")
    assert sequenced(store) == ["rows forged"]
    store.transact(Ask(PurgeAudit(0, NOW + 1)))
    assert [each.event for _, each in store.transact(Ask(ReadAudit(0, 9))) if each.is_forged] == ["later"]


@in_a_file
def test_a_copy_of_a_store_has_forged_rows_as_forged_ones(place: StorePlace, store: DurableStore) -> None:
    forge(place)
    assert sequenced(store) == ["rows forged"]
    for number in range(2):
        store.transact(Ask(Insert(row(number))))
        forge(place)
    copy = SealedStore(VAULT)
    copy.transact(Fill(0, lambda: pages(store), NOW, "test"))
    rows = copy.transact(Ask(ReadAudit(0, 9)))
    assert [each.is_forged for _, each in rows] == [True, False, False, True, False, True, False]
    copy.transact(SequenceLog(bytes(SALT_SIZE * 9)))
    assert [each.idx for each in copy.transact(Ask(ReadLog(0, 9)))] == [0, 1, 2, 3]


@in_a_file
def test_nobody_without_the_key_gives_places(place: StorePlace) -> None:
    with closing(place.open(make=True)) as store:
        store.transact(Ask(Insert(row(0))))
    with closing(evolve(place, vault=None).open()) as store:
        with pytest.raises(StoreError, match="only its KEK"):
            store.transact(SequenceLog(bytes(SALT_SIZE)))
        assert len(store.transact(Ask(ReadAudit(0, 9, wanted=AuditWanted(event="event"))))) == 1


@pytest.mark.parametrize("is_told", [False, True])
def test_a_row_that_its_forger_sequences_himself_is_no_entry(
    place: StorePlace, store: DurableStore, *, is_told: bool
) -> None:
    """With its leaf in its tile; ``is_told``: and with size and root of the log as they then are."""
    store.transact(Ask(InsertAll(tuple(map(row, range(300))))))
    assert len(sequenced(store)) == 300
    salt, text = bytes(SALT_SIZE), purged_text(256, 256)
    forged = AuditRow(NOW, "operator", "audit purged", "done", keys=text, idx=300, salt=salt)
    edge = {(each.level, each.tile): each.hashes for each in store.transact(Ask(Scan(LogTileRow)))}
    edge[0, 1] += leaf_of(forged)
    forge(place, "audit purged", text, idx=300, salt=literal(place, salt))
    run(place, f"UPDATE log_tile SET hashes = {literal(place, edge[0, 1])} WHERE level = 0 AND tile = 1")
    if not is_told:
        assert [finding for _, finding in scrub_log(store) if finding] == []
        run(place, "DELETE FROM audit WHERE idx < 256")
        assert purged_below(store) == 0
        assert (0, 255) in [(each.first, each.last) for each in check_stored(store, 300, [], lambda *_: None).findings]
        checkpoint = store.transact(ReadCheckpoint())
        assert checkpoint is not None
        assert checkpoint.size == 300
        with pytest.raises(LogError, match="tile"):  # until the tile is made again
            store.transact(SequenceLog(bytes(SALT_SIZE)))
        return
    root = root_hash(reader(lambda level, number: edge[level, number]), 301)
    run(place, f"UPDATE log_state SET size = 301, root = {literal(place, root)}")
    assert ("log_state", "audit") in [(fault.table, fault.key) for fault in find_faults(store)]
    for unit in (SequenceLog(bytes(SALT_SIZE)), ReadCheckpoint()):
        with pytest.raises(RowNotAuthentic, match="audit of table log_state is not authentic"):
            store.transact(unit)


@in_a_file
def test_an_entry_that_is_changed_with_its_tile_before_a_checkpoint_is_no_announcement(
    place: StorePlace, store: DurableStore
) -> None:
    """The last entry becomes that of a purge: the root of the log, which has a MAC, contradicts it."""
    store.transact(Ask(InsertAll(tuple(map(row, range(300))))))
    assert len(sequenced(store)) == 300
    text = purged_text(256, 256)
    run(place, f"UPDATE audit SET event = 'audit purged', keys = '{text}' WHERE idx = 299")
    run(place, "DELETE FROM audit WHERE idx < 256")
    report = check_stored(store, 300, [], lambda *_: None)
    assert [(each.first, each.last) for each in report.findings] == [(299, 299), (0, 255)]
    assert purged_below(store) == 0, "the scrub begins where nothing has excused it"
    (changed,) = store.transact(Ask(ReadLog(299, 1)))
    tile = store.transact(Ask(ReadTile(0, 1)))
    assert tile is not None
    hashes = literal(place, tile.hashes[:-32] + leaf_of(changed))
    run(place, f"UPDATE log_tile SET hashes = {hashes} WHERE level = 0 AND tile = 1")
    for unit in (SequenceLog(bytes(SALT_SIZE)), ReadCheckpoint()):
        store.transact(Ask(Insert(row(1))))
        with pytest.raises(LogError, match="not those that the server wrote"):
            store.transact(unit)
    state = store.transact(Ask(Read(LogStateRow, "audit")))
    assert state is not None
    report = check_stored(store, 300, [Checkpoint("", 300, state.root)], lambda *_: None)
    assert [each.what for each in report.findings] == ["one of them is not as the checkpoint of 300 entries has it"]


@in_a_file
def test_a_log_whose_state_was_deleted_is_not_begun_again(place: StorePlace, store: DurableStore) -> None:
    store.transact(Ask(Insert(row(0))))
    assert sequenced(store) == ["event"]
    run(place, "DELETE FROM log_state")
    assert [fault.table for fault in find_faults(store)] == ["audit"]
    with pytest.raises(LogError, match="the row that says how many is gone"):
        store.transact(SequenceLog(bytes(SALT_SIZE)))
    assert len(store.transact(Ask(ReadLog(0, 9)))) == 1


def test_a_purge_ends_at_the_edge_of_a_tile(store: DurableStore) -> None:
    old = [evolve(row(number), at=NOW - 50 if number == 255 else NOW - 100) for number in range(512)]
    store.transact(Ask(InsertAll(tuple(old))))
    assert len(sequenced(store)) == 512
    purge = PurgeAudits(NOW, NOW - 60, "old", span=256, carry_out=True)
    assert store.transact(purge) == Purged(0, None), "the last entry of the first tile is not old enough"
    for beyond in (0, 256):
        assert store.transact(evolve(purge, before=NOW - 40, beyond=beyond)) == Purged(256, beyond + 256)
        assert [each.idx for each in store.transact(Ask(ReadLog(0, 1)))] == ([256] if not beyond else [])
        assert purged_below(store) == beyond + 256
        assert check_stored(store, 512, [], lambda *_: None).findings == ()
        assert [finding for _, finding in scrub_log(store) if finding] == []
    assert [(each.level, each.tile) for each in store.transact(Ask(Scan(LogTileRow)))] == [(1, 0)]
    store.transact(SequenceLog(bytes(SALT_SIZE * 9)))
    checkpoint = store.transact(ReadCheckpoint())
    assert checkpoint is not None
    report = check_stored(store, 514, [checkpoint], lambda *_: None)
    assert (report.first, report.findings) == (512, ())
    proof = store.transact(ProveEntry(512, 514, Note(checkpoint.text, ())))
    verify_inclusion(leaf_hash(proof.entry), 512, 514, proof.path, checkpoint.root)


@pytest.mark.parametrize(
    "edits",
    [
        (f"UPDATE audit SET at = {NOW - 100} WHERE idx >= 256",),
        ("DELETE FROM audit WHERE idx BETWEEN 256 AND 800",),
        ("DELETE FROM audit WHERE idx BETWEEN 256 AND 800", "DELETE FROM log_tile WHERE level = 0 AND tile IN (1, 2)"),
    ],
)
def test_a_purge_hides_no_recent_entry_that_was_dated_back_or_removed(
    place: StorePlace, edits: tuple[str, ...]
) -> None:
    """It is an authentic excuse for all that is missing before its end."""
    entries = [evolve(row(number), at=NOW - 100 if number < 256 else NOW) for number in range(900)]
    with closing(place.open(make=True)) as store:
        store.transact(Ask(InsertAll(tuple(entries))))
        assert len(sequenced(store)) == 900
    for edit in edits:
        run(place, edit)
    with closing(place.open()) as store:
        purge = PurgeAudits(NOW, NOW - 60, "old", carry_out=True)
        with pytest.raises(LogError, match=r"entries 256 to 511 was changed or removed"):
            store.transact(purge)
        assert check_stored(store, 900, [], lambda *_: None).findings
        assert store.transact(evolve(purge, span=256)).count == 256, "those that were old are as they were"


@in_a_file
def test_a_server_tells_once_that_the_state_of_its_log_was_forged(place: StorePlace, store: DurableStore) -> None:
    store.transact(Ask(Insert(row(0))))
    assert sequenced(store) == ["event"]
    run(place, "UPDATE log_state SET size = 7")
    with sequencing(store, lambda: VAULT, "keys.example/audit", None):
        for seen in (0, 1):
            store.transact(Ask(Insert(row(1))))
            wait_until(lambda seen=seen: store.custody.faults["log_state"] > seen)  # type: ignore[misc]
    assert len([note for note in store.notes if "audit of table log_state is not authentic" in note]) == 1
