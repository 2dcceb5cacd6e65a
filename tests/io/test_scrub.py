"""The scrub of the audit log: it finds every single change of an entry, and counts its passes."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from chutes_proto.io.log_files import check_stored
from chutes_proto.io.server.scrub import SCRUBS, Scrubber, scrub_log, scrubbing
from chutes_proto.io.server.sequencer import Sequencer
from chutes_proto.io.stores.address import StorePlace
from chutes_proto.store._rows import AuditRow, InsertAll, LogTileRow, Put, ReadLog, ReadTile
from chutes_proto.store._run import Ask, Unit
from chutes_proto.testing.store_suite._parts import NOW, VAULT
from chutes_proto.units.log import SALT_SIZE, SequenceLog
from chutes_proto.units.operator import PurgeAudits
from tests.store.memory import MemoryStore
from tests.store.test_custody import A, copied, fill, go_on, granted, run, sequence
from tests.waiting import wait_until

SIZE = 600


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    store.transact(Ask(InsertAll(tuple(AuditRow(NOW, "operator", f"event {at}", "done") for at in range(SIZE)))))
    assert store.transact(SequenceLog(bytes(range(256)) * SALT_SIZE * 3)) == SIZE
    return store


@pytest.fixture(params=["sqlite", "postgresql"])
def custody(request: pytest.FixtureRequest, tmp_path: Path) -> StorePlace:
    """The place of a store that will be sealed."""
    address: str = "sqlite:keys.db" if request.param == "sqlite" else request.getfixturevalue("empty_schema")
    return StorePlace(address, tmp_path, vault=VAULT)


def findings(store: MemoryStore) -> list[str]:
    return [finding for _, finding in scrub_log(store) if finding]


@pytest.mark.parametrize("index", [0, 255, 256, 511, 512, SIZE - 1])
def test_an_entry_that_was_changed_or_removed_is_named(store: MemoryStore, index: int) -> None:
    assert sum(rows for rows, _ in scrub_log(store)) == SIZE
    assert findings(store) == []
    store.connection.execute("UPDATE audit SET reason = 'forged' WHERE idx = ?", (index,))
    assert findings(store) == [
        f"audit log: entry {index} was changed or removed, or its tile was; run `chutes-proto audit verify`"
    ]
    store.connection.execute("DELETE FROM audit WHERE idx = ?", (index,))
    assert f"entry {index} " in findings(store)[0]


def test_a_deleted_prefix_is_found_unless_a_purge_announced_it(store: MemoryStore) -> None:
    store.connection.execute("DELETE FROM audit WHERE idx < 512")
    assert [each.split(" was ")[0] for each in findings(store)] == ["audit log: entry 0", "audit log: entry 256"]
    store.connection.execute("DELETE FROM audit")
    store.connection.execute("DELETE FROM log_tile")
    assert len(findings(store)) == 3


def test_an_entry_that_cannot_be_read_is_a_finding_and_the_pass_goes_on(store: MemoryStore) -> None:
    store.connection.execute("UPDATE audit SET reason = CAST(x'ff' AS TEXT) WHERE idx IN (0, 3)")
    store.connection.execute("UPDATE audit SET idx = 'x' WHERE idx = 256")
    store.connection.execute("UPDATE audit SET idx = 514.5 WHERE idx = 515")
    found = [each.split(" was ")[0].removeprefix("audit log: ") for each in findings(store)]
    assert found == ["entry 0", "entry 256", "entry 515"]
    report = check_stored(store, SIZE, [], lambda *_: None)
    assert sorted((each.first, each.last) for each in report.findings) == [(0, 0), (3, 3), (256, 256), (515, 515)]


def test_a_change_that_is_carried_into_its_tile_contradicts_the_one_above(store: MemoryStore) -> None:
    tile = store.transact(Ask(ReadTile(1, 0)))
    assert tile is not None
    store.transact(Ask(Put(evolve(tile, hashes=bytes(32) + tile.hashes[32:]))))
    assert findings(store) == [
        "audit log: entries 0 to 255: their tile contradicts the one above it; run `chutes-proto audit verify`"
    ]


def test_a_purge_is_no_finding(store: MemoryStore) -> None:
    pages = scrub_log(store)
    assert next(pages) == (256, "")
    assert store.transact(PurgeAudits(NOW + 10, NOW + 1, "old", span=256, carry_out=True)).count == 256
    read, passed = store.transact, iter([True])

    def then_purged(unit: Unit[Any]) -> Any:
        found = read(unit)
        if isinstance(unit, Ask) and isinstance(unit.op, ReadLog) and unit.op.first == 256 and next(passed, False):
            assert read(PurgeAudits(NOW + 10, NOW + 1, "old", carry_out=True)).count == 256  # between entries and tile
        return found

    store.transact = then_purged  # type: ignore[method-assign]
    assert [finding for _, finding in pages if finding] == []
    store.transact = read  # type: ignore[method-assign]
    assert findings(store) == []
    assert isinstance(store.transact(Ask(ReadTile(1, 0))), LogTileRow)


def test_a_server_scrubs_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chutes_proto.io.server.scrub.EVERY_SECONDS", 0.0)
    told: list[str] = []
    with closing(StorePlace("sqlite:keys.db", tmp_path, vault=VAULT).open(make=True)) as store:
        store.transact(Ask(InsertAll(tuple(AuditRow(NOW, "operator", "event", "done") for _ in range(3)))))
        store.transact(SequenceLog(bytes(3 * SALT_SIZE)))
        scrubber = Scrubber(store, told.append)
        with scrubbing(scrubber):
            wait_until(lambda: scrubber.last.at)
        assert (scrubber.last.rows, scrubber.last.findings, told) == (3 + 5 * (1 + 20 + 20), 0, [])


@pytest.mark.parametrize("most", [0, 1, 2])
def test_of_a_flood_of_findings_the_first_are_told_and_all_counted(
    custody: StorePlace, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr("chutes_proto.io.server.scrub._TOLD", most)
    told: list[str] = []
    with closing(custody.open(make=True)) as store:
        fill(store)
        sequence(store)
        run(custody, "DELETE FROM head")
        scrubber = Scrubber(store, told.append)
        scrubber.scrub()
    assert scrubber.last.findings == 2
    assert [" of table head " in text for text in told] == [*[True] * most, *[False] * (most < 2)]


def test_a_vm_that_went_back_as_a_whole_is_found_with_and_without_its_entries(custody: StorePlace) -> None:
    with closing(custody.open(make=True)) as store:
        fill(store)
        sequence(store)
        back = [copied(custody, table) for table in ("boot_volume", "boot", "vm", "generation", "volume", "head")]
        go_on(store)
        sequence(store)
        size = len(store.transact(Ask(ReadLog(0, 1000))))
        assert [finding for scrub in SCRUBS for _, finding in scrub(store) if finding] == []
        for set_back in back:
            set_back()
        found = [finding for scrub in SCRUBS for _, finding in scrub(store) if finding]
        assert len(found) == 2
        assert all("version 4, and the log has version 7; run `chutes-proto store check`" in each for each in found)
        assert check_stored(store, size, [], lambda *_: None).findings == ()
        run(custody, "DELETE FROM audit WHERE vm_version > 4")
        found_of_log, *of_heads = [finding for scrub in SCRUBS for _, finding in scrub(store) if finding]
        assert "was changed or removed" in found_of_log
        assert len(of_heads) == 2
        assert all("version 4, and version 7 was seen; run `chutes-proto store check`" in each for each in of_heads)
        report = check_stored(store, size, [], lambda *_: None)
        assert {each.what for each in report.findings} == {"it is missing"}


def test_a_vm_that_was_forked_within_the_second_before_its_entries_got_their_places_is_named(
    custody: StorePlace,
) -> None:
    with closing(custody.open(make=True)) as store:
        fill(store)
        back = [copied(custody, table) for table in ("boot_volume", "boot", "vm", "generation", "volume", "head")]
        go_on(store)
    for set_back in back:
        set_back()
    with closing(custody.open()) as store:
        for at in range(4):
            store.transact(granted(f"fork {at}", A, 250 + at))
        Sequencer(store, lambda: VAULT, "keys.example/audit", None).sequence()
        named = f"VM {A.hotkey}/{A.name} has two histories: version 5 follows version 7"
        assert any(named in note for note in store.notes)
        assert store.custody.faults["audit"]
        size = len(store.transact(Ask(ReadLog(0, 1000))))
        assert named in [each.what for each in check_stored(store, size, [], lambda *_: None).findings]
