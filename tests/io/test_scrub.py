"""The scrub of the audit log: it finds every single change of an entry, and counts its passes."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from attrs import evolve

from chutes_proto.io.server.scrub import Scrubber, scrub_log, scrubbing
from chutes_proto.io.stores.address import StorePlace
from chutes_proto.store._run import Ask
from chutes_proto.store.rows import AuditRow, InsertAll, LogTileRow, Put, ReadTile
from chutes_proto.testing.store_suite._parts import NOW
from chutes_proto.units.log import SALT_SIZE, SequenceLog
from chutes_proto.units.operator import PurgeAudits
from tests.store.memory import MemoryStore
from tests.waiting import wait_until

SIZE = 600


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    store.transact(Ask(InsertAll(tuple(AuditRow(NOW, "operator", f"event {at}", "done") for at in range(SIZE)))))
    assert store.transact(SequenceLog(bytes(range(256)) * SALT_SIZE * 3)) == SIZE
    return store


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
    if index:  # the first ones may have been purged: `audit verify` wants an entry that says so
        assert f"entry {index} " in findings(store)[0]


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
    assert store.transact(PurgeAudits(NOW + 10, NOW + 1, "old", carry_out=True)).count == 512
    assert [finding for _, finding in pages if finding] == []
    assert findings(store) == []
    assert isinstance(store.transact(Ask(ReadTile(1, 0))), LogTileRow)


def test_a_server_scrubs_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chutes_proto.io.server.scrub.EVERY_SECONDS", 0.0)
    told: list[str] = []
    with closing(StorePlace("sqlite:keys.db", tmp_path).open(migrate=True)) as store:
        store.transact(Ask(InsertAll(tuple(AuditRow(NOW, "operator", "event", "done") for _ in range(3)))))
        store.transact(SequenceLog(bytes(3 * SALT_SIZE)))
        scrubber = Scrubber(store, told.append)
        with scrubbing(scrubber):
            wait_until(lambda: scrubber.last.at)
        assert (scrubber.last.rows, scrubber.last.findings, told) == (3, 0, [])
